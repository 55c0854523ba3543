"""fuse-prologue: what happens to the input of a quantized linear layer moves into its kernel.

%r = lb.hadamard %x {block = 64}; %q = lb.quantize %r {format = "int8.token"}; %y = lb.linear %q, %w
-> %y = lb.linear %x, %w {rotate = 64, activation = "int8.token"}
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from lowbit.compiler.ir.graph import Hadamard, Linear, Quantize
from lowbit.compiler.ir.types import QType
from lowbit.quantizers.formats import VectorFormat, parse_format

__all__ = ["FusePrologue"]


@dataclass(frozen=True)
class FusePrologue(ModulePass):
    """Every kernel that reads a rounded input rounds for itself: fused siblings do it once. What still has other
    readers stays. Groups of columns in another order than the weight's stay apart."""

    name = "fuse-prologue"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for linear in [f for f in op.walk() if isinstance(f, Linear) and _takes(f)]:
            _fold(linear)


def _takes(linear: Linear) -> bool:
    type_ = linear.args_[1].type
    return isinstance(type_, QType) and not isinstance(parse_format(type_.fmt.data), VectorFormat)


def _fold(linear: Linear) -> None:
    step = linear.args_[0].owner
    if isinstance(step, Quantize) and linear.activation is None and linear.rotate is None:
        if step.order != linear.order:
            return
        linear.activation, linear.scales = step.format, step.scales
        _skip(linear, step)
    step = linear.args_[0].owner
    if isinstance(step, Hadamard) and linear.rotate is None:
        linear.rotate = step.block
        _skip(linear, step)


def _skip(linear: Linear, step: Quantize | Hadamard) -> None:
    linear.operands[0] = step.args_[0]
    if not list(step.outs[0].uses):
        Rewriter.erase_op(step)
