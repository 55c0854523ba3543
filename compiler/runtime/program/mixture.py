"""Mixtures of experts of a decoder: a router of a kind that is known, its experts, and an expert for all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowbit.compiler.runtime.experts import DOWN, GATE, UP, Experts, as_experts
from lowbit.compiler.runtime.program.linears import (
    Gated,
    LinearPart,
    check_children,
    read_gated,
    read_linear,
    refuse,
)

__all__ = ["MixtureParts", "is_mixture", "odds", "pair_experts", "read_mixture"]


@dataclass(frozen=True)
class MixtureParts:
    """What stands in the place of a feed-forward part.

    router: [experts, hidden], whose softmax over all experts is taken in float32; a token goes to the `active` most
    likely ones, with shares that are their probabilities, divided by their sum where `normalised`. shared: an expert
    for every token, scaled with the sigmoid of what shared_gate gives; None where there is none.
    """

    router: LinearPart
    active: int
    normalised: bool
    experts: list[Gated]
    shared: Gated | None = None
    shared_gate: LinearPart | None = None

    def all_linears(self) -> Iterator[LinearPart]:
        """Every matrix."""
        yield self.router
        for gated in (*self.experts, self.shared or {}):
            yield from gated.values()
        if self.shared_gate is not None:
            yield self.shared_gate


def is_mixture(mlp: nn.Module) -> bool:
    """Whether there are experts in the place of a feed-forward part."""
    return hasattr(mlp, "experts")


def read_mixture(mlp: nn.Module, path: str) -> MixtureParts:
    """The parts of a sparse block; raises RunError (LB0560) for what the program does not do."""
    shared_names = {"shared_expert", "shared_expert_gate"}
    has_shared = any(hasattr(mlp, name) for name in shared_names)
    needed = {"gate", "experts"} | (shared_names if has_shared else set())
    check_children(mlp, path, "the mixture of experts", needed, needed)
    router, active, normalised = _read_router(cast(nn.Module, mlp.gate), f"{path}.gate")
    experts = _read_experts(cast(nn.Module, mlp.experts), f"{path}.experts")
    if len(experts) != router.n:
        raise refuse(path, f"a router of {router.n} experts stands before {len(experts)}")
    if not has_shared:
        return MixtureParts(router, active, normalised, experts)
    shared = read_gated(cast(nn.Module, mlp.shared_expert), f"{path}.shared_expert")
    gate = read_linear(mlp.shared_expert_gate, f"{path}.shared_expert_gate")
    return MixtureParts(router, active, normalised, experts, shared, gate)


def odds(weight: Tensor, x: Tensor) -> Tensor:
    """float32 [tokens, experts]: how likely a router with `weight` [experts, hidden] finds each expert for `x`."""
    return nn.functional.linear(x, weight).float().softmax(-1)


def _read_router(router: nn.Module, path: str) -> tuple[LinearPart, int, bool]:
    """(matrix, active experts, whether shares add up to one). What it does is found by asking it, as architectures have
    classes of their own for the same."""
    held = {name for name, _ in (*router.named_parameters(), *router.named_buffers())}
    weight = getattr(router, "weight", None)
    if held != {"weight"} or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise refuse(path, f"{type(router).__name__} routes in a way it does not know")
    weight = weight.detach()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x = torch.randn(64, weight.shape[1], generator=rng).to(weight)
        given: Any = router(x)
        if not isinstance(given, tuple) or len(given) != 3 or given[1].shape != given[2].shape:
            raise refuse(path, f"{type(router).__name__} routes in a way it does not know")
        shares, chosen = given[1].float(), given[2]
        best, index = odds(weight, x).topk(chosen.shape[-1])
        for normalised, wanted in ((False, best), (True, best / best.sum(-1, keepdim=True))):
            if torch.equal(index, chosen) and torch.allclose(shares, wanted.to(given[1].dtype).float()):
                count, width = weight.shape
                return LinearPart(count, width, dense=weight), int(chosen.shape[-1]), normalised
    raise refuse(path, f"{type(router).__name__} does not choose the largest of a softmax over all experts")


def _read_experts(module: nn.Module, path: str) -> list[Gated]:
    held = as_experts(module)
    if held is None:
        raise refuse(path, f"{type(module).__name__} is not understood as experts")
    if not held.slicing.gate or not held.plain_gate:
        raise refuse(path, "what its experts compute between their layers is not activation(gate) * up")
    return [_read_expert(held, index, f"{path}.{index}") for index in range(held.num_experts)]


def _read_expert(held: Experts, index: int, path: str) -> Gated:
    down = read_linear(held.layer(index, DOWN), f"{path}.{DOWN}")
    if (both := held.paired(index)) is not None:
        return {"gate": LinearPart(down.k, both.packed().k, both, epilogue=("silu_mul",)), "down": down}
    gate, up = (read_linear(held.layer(index, name), f"{path}.{name}") for name in (GATE, UP))
    return {"gate": gate, "up": up, "down": down}


def pair_experts(model: nn.Module) -> None:
    """Let gate and up of each expert lie one behind the other, so that one kernel computes silu(gate) * up."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.pair()
