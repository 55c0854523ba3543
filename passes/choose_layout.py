"""choose-layout: one packed layout per target family, so that all kernels of a weight share the same bytes.

!lb.q<64x64, "int4.g64.sym">  ->  !lb.q<64x64, "int4.g64.sym", "panel16">
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from lowbit.codegen.select import layout_name
from lowbit.compiler.ir.graph import Linear, Weight
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.ir.types import QType
from lowbit.quantizers.formats import parse_format

__all__ = ["ChooseLayout"]


@dataclass(frozen=True)
class ChooseLayout(ModulePass):
    """`target` in text form; empty means this machine's CPU."""

    name = "choose-layout"
    target: str = ""

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        target = Target.parse(self.target) if self.target else host_target()
        for weight in [w for w in op.walk() if isinstance(w, Weight)]:
            if isinstance(t := weight.outs[0].type, QType):
                layout = layout_name(parse_format(t.fmt.data), target, _activation(weight))
                Rewriter.replace_value_with_new_type(weight.outs[0], QType.get(t.n.data, t.k.data, t.fmt.data, layout))


def _activation(weight: Weight) -> str:
    """What the layers that use a weight round their inputs to."""
    users = [use.operation for use in weight.outs[0].uses if isinstance(use.operation, Linear)]
    return next((op.activation.data for op in users if op.activation), "")
