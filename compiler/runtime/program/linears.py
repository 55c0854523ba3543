"""The matrices of a decoder: read off modules that are known, refused where they are not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lowbit.compiler.errors import RunError
from lowbit.compiler.runtime.fused import QuantGatedMLP, SiblingLinear
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear

__all__ = ["Gated", "LinearPart", "check_children", "read_gated", "read_linear", "refuse", "stacked"]


@dataclass(frozen=True)
class LinearPart:
    """One matrix: packed, or `dense` [N, K]; with the epilogue its kernel gets. `n`: columns of its result."""

    n: int
    k: int
    packed: PackedLinear | None = None
    dense: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    epilogue: tuple[str, ...] = ()

    def behind(self, step: str) -> LinearPart:
        """The same matrix with one more step behind it."""
        return replace(self, epilogue=(*self.epilogue, step))


Gated = dict[str, LinearPart]
"""A feed-forward part: gate, up and down; up is absent where gate holds both, or already their product."""


def refuse(path: str, why: str) -> RunError:
    """LB0560: the model has a part that the program does not do."""
    return RunError("LB0560", f"no program for this model: {why}", where=path, hint="use mode='modules'")


def check_children(module: nn.Module, path: str, what: str, known: Collection[str], needed: Collection[str]) -> None:
    """Refuse a module with children beyond `known` or parameters of its own, or without a child that is `needed`."""
    names = {name for name, _ in module.named_children()}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if unknown := sorted((names - set(known)) | own):
        raise refuse(f"{path}.{unknown[0]}", f"{what} has a part it does not know")
    if missing := sorted(set(needed) - names):
        raise refuse(path, f"{what} has no {missing[0]}")


def stacked(packed: PackedLinear, path: str) -> LinearPart:
    """Siblings in one matrix."""
    weight = _in_kernel(packed, path).packed()
    return LinearPart(weight.n, weight.k, packed)


def read_linear(module: Any, path: str) -> LinearPart:
    """A linear layer, dense or quantized."""
    bias = getattr(module, "bias", None)
    epilogue = ("bias",) if bias is not None else ()
    bias = None if bias is None else bias.detach()
    if isinstance(module, QuantLinear):
        packed = module.prepare().inner
        assert packed is not None
        _in_kernel(packed, path)
        return LinearPart(module.out_features, module.in_features, packed, bias=bias, epilogue=epilogue)
    if type(module) is nn.Linear:
        n, k = module.weight.shape
        return LinearPart(n, k, dense=module.weight.detach(), bias=bias, epilogue=epilogue)
    raise refuse(path, f"a {type(module).__name__} stands where a linear layer should")


def _in_kernel(packed: PackedLinear, path: str) -> PackedLinear:
    if packed._rotates_first:
        raise refuse(path, "its inputs are rotated outside of the kernel")
    return packed


def read_gated(mlp: nn.Module, path: str) -> Gated:
    """A dense feed-forward part."""
    if isinstance(mlp, QuantGatedMLP):
        gate = stacked(mlp.gate_up, path)
        return {"gate": replace(gate, n=gate.n // 2, epilogue=("silu_mul",)), "down": read_linear(mlp.reader, path)}
    names = ("gate_proj", "up_proj", "down_proj")
    check_children(mlp, path, "the feed-forward part", {*names, "act_fn"}, names)
    gate_proj: Any = mlp.gate_proj
    if isinstance(gate_proj, SiblingLinear):
        return {"gate": stacked(gate_proj.shared, path), "down": read_linear(mlp.down_proj, f"{path}.down_proj")}
    return {name.split("_")[0]: read_linear(getattr(mlp, name), f"{path}.{name}") for name in names}
