"""Where files have the layers of experts: under their own names, under older ones, or stacked in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # the runtime reads files too: with kernels
    from lowbit.compiler.runtime.experts import Slicing

__all__ = ["StackedSlice", "fits", "names_in_files", "stacked_slices", "unstack_tensors"]

_OLDER = ((".mlp.", ".block_sparse_moe."), (".gate_proj.", ".w1."), (".up_proj.", ".w3."), (".down_proj.", ".w2."))
"""How Mixtral's published files call what transformers calls otherwise."""


@dataclass(frozen=True)
class StackedSlice:
    """One layer's tensor inside a stacked one: `stack` is the name of that."""

    stack: str
    expert: int
    layer: str
    slicing: Slicing

    def of(self, part: Tensor) -> Tensor:
        """The layer's tensor, from the stack's entry for the expert."""
        return self.slicing.take(part[None], 0, self.layer).contiguous()


def names_in_files(name: str, prefix: str) -> tuple[str, ...]:
    """Names a file may have for the tensor `name`, the likeliest first. prefix: of the base model (`model.`), which may
    be missing."""
    older = name
    for ours, theirs in _OLDER:
        older = older.replace(ours, theirs) if ".mlp.experts." in name or ".mlp.gate." in name else older
    return tuple(dict.fromkeys((name, name.removeprefix(prefix), older)))


def stacked_slices(model: nn.Module) -> dict[str, StackedSlice]:
    """Where a stacked file has each tensor of the experts of `model`, by the tensor's name."""
    from lowbit.compiler.runtime.experts import Experts

    found = {}
    for path, experts in model.named_modules():
        if isinstance(experts, Experts):
            for expert, layer, module in experts.layers():
                for kind, _ in module.named_parameters():
                    stack = f"{path}.{experts.slicing.stack(layer, kind)}"
                    found[f"{path}.{expert}.{layer}.{kind}"] = StackedSlice(stack, expert, layer, experts.slicing)
    return found


def unstack_tensors(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`tensors` by name, with those that stack the experts of `model` taken apart."""
    slices = stacked_slices(model)
    stacks = {s.stack for s in slices.values()}
    apart = {name: s.of(tensors[s.stack][s.expert]) for name, s in slices.items() if s.stack in tensors}
    return {**{name: t for name, t in tensors.items() if name not in stacks}, **apart}


def fits(slice_: StackedSlice, stack: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a stack of this shape holds a layer of the shape `wanted`."""
    if len(stack) < 2 or slice_.expert >= stack[0]:
        return False
    return tuple(slice_.of(torch.empty(stack[1:], device="meta")).shape) == wanted
