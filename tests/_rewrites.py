"""What a rewrite sees of a small model, and what it makes of it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lowbit.compiler.frontend.structure import model_structure
from lowbit.compiler.io.rewritten import rewrite_module
from lowbit.compiler.ir.sites import Structure
from lowbit.quantizers.formats import parse_activation, parse_format
from lowbit.quantizers.observe import SiteObserver, SiteStats
from lowbit.quantizers.rewrites import Outcome, Rewrite, Scene

__all__ = ["IDS", "applied", "difference", "observed", "scene_of", "with_run_time"]

IDS = torch.randint(0, 80, (2, 24), generator=torch.Generator().manual_seed(1))


def observed(model: nn.Module, readers: list[str]) -> dict[str, SiteStats]:
    """Statistics of the inputs of some layers."""
    with SiteObserver({p: model.get_submodule(p) for p in readers}, IDS.numel()) as seen, torch.no_grad():
        model(IDS)
    return seen.stats()


def scene_of(
    model: nn.Module,
    weight: str = "int8.ch.sym",
    structure: Structure | None = None,
    online: dict[str, int] | None = None,
) -> Scene:
    """Everything but the output layer gets rounded."""
    structure = structure or model_structure(model)
    state = {name: p.detach() for name, p in model.named_parameters()}
    rounded = parse_activation("int8.token")
    return Scene(
        structure,
        state.__getitem__,
        lambda path: None if path.endswith(("lm_head", "embed_out")) else rounded,
        lambda path: parse_format(weight),
        observed(model, [s.name for s in structure.sites]),
        online or {},
    )


def applied(model: nn.Module, rewrite: Rewrite) -> tuple[nn.Module, Outcome]:
    """A rewritten copy."""
    scene = scene_of(model)
    outcome = rewrite.outcome(scene, rewrite.decide(scene))
    changed = copy.deepcopy(model)
    rewrite_module(changed, outcome.edits)
    return changed, outcome


def with_run_time(model: nn.Module, outcome: Outcome) -> nn.Module:
    """The model with the rotations that happen at run time."""
    from lowbit.quantizers.hadamard import rotate

    for path, block in outcome.online.items():
        hook = lambda _m, args, block=block: (rotate(args[0], block),)  # noqa: E731
        model.get_submodule(path).register_forward_pre_hook(hook)
    return model


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of logits, relative to the largest logit."""
    x, y = a(IDS).logits, b(IDS).logits
    return float((x - y).abs().max() / x.abs().max())
