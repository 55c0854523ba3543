"""Where two versions of a model part ways: outputs of modules with the same path, in the order they run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.compiler.errors import RunError

__all__ = ["ModuleDifference", "ModuleDivergence", "locate"]


@dataclass(frozen=True)
class ModuleDifference:
    """One module: largest difference of its output, and the root mean square of the difference relative to the
    reference's."""

    path: str
    largest: float
    relative: float


@dataclass(frozen=True)
class ModuleDivergence:
    """modules: in the order they ran. kl: mean KL(reference || model) of the logits per token, in nats; None where the
    model gives none. first: path of the first module beyond the tolerance, or None."""

    modules: list[ModuleDifference]
    kl: float | None
    first: str | None

    def text(self, most: int = 20) -> str:
        """The worst modules, in order, and where it begins."""
        worst = {m.path for m in sorted(self.modules, key=lambda m: -m.relative)[:most]}
        lines = [f"{m.relative:10.2e} {m.largest:10.2e}  {m.path}" for m in self.modules if m.path in worst]
        kl = "" if self.kl is None else f"KL per token: {self.kl:.3e}\n"
        return "\n".join(["relative     largest  module", *lines]) + f"\n{kl}first divergence: {self.first or 'none'}"


def locate(model: nn.Module, reference: nn.Module, ids: torch.Tensor, tolerance: float = 1e-2) -> ModuleDivergence:
    """Run both on token ids [tokens] or [batch, tokens] and compare every module that both have.

    A model that runs as a native program, or through torch.compile, shows no modules: compare it in mode `modules`.
    Raises RunError (LB0573) when nothing can be compared.
    """
    batch = ids if ids.dim() == 2 else ids[None]
    with torch.no_grad(), _recorded(model) as got:
        logits = _logits(model(batch))
    with torch.no_grad(), _recorded(reference) as want:
        reference_logits = _logits(reference(batch))
    found = [_difference(path, got[path], tensor) for path, tensor in want.items() if path in got]
    differences = [f for f in found if f is not None]
    kl = _kl(logits, reference_logits) if logits is not None and reference_logits is not None else None
    if not differences and kl is None:
        raise RunError("LB0573", "the models have no module and no logits in common", where=type(model).__name__)
    first = next((d.path for d in differences if not d.relative <= tolerance), None)
    return ModuleDivergence(differences, kl, first)


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """First outputs of all modules by path, in the order they finish."""
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            tensor = out[0] if isinstance(out, tuple) and out else out
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                seen.setdefault(path, tensor.detach().float())

        return hook

    hooks = [m.register_forward_hook(keep(path)) for path, m in model.named_modules() if path]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _difference(path: str, got: torch.Tensor, want: torch.Tensor) -> ModuleDifference | None:
    if got.shape != want.shape or not want.numel():
        return None
    difference = got - want
    scale = want.square().mean().sqrt().clamp(min=1e-12)
    return ModuleDifference(path, float(difference.abs().max()), float(difference.square().mean().sqrt() / scale))


def _logits(out: Any) -> torch.Tensor | None:
    return getattr(out, "logits", None)


def _kl(logits: torch.Tensor, reference: torch.Tensor) -> float:
    p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
