"""choose-layout: one packed layout per target family, so that all kernels of a weight share the same bytes.

!lb.q<64x64, "int4.g64.sym">  ->  !lb.q<64x64, "int4.g64.sym", "panel16">
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from lowbit.codegen import BACKENDS, load_backend
from lowbit.compiler.ir.graph import Weight
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.ir.types import QType
from lowbit.quantizers.formats import WeightFormat, parse_format

__all__ = ["ChooseLayout", "layout_of"]


@dataclass(frozen=True)
class ChooseLayout(ModulePass):
    """`target` in text form; empty means this machine's CPU."""

    name = "choose-layout"
    target: str = ""

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        target = Target.parse(self.target) if self.target else host_target()
        for weight in [w for w in op.walk() if isinstance(w, Weight)]:
            if isinstance(t := weight.outs[0].type, QType):
                layout = layout_of(target, parse_format(t.fmt.data))
                Rewriter.replace_value_with_new_type(weight.outs[0], QType.get(t.n.data, t.k.data, t.fmt.data, layout))


def layout_of(target: Target, fmt: WeightFormat) -> str:
    """The packed layout for `fmt` of the first backend that serves the target's kind of device."""
    return next(b.layout_of(fmt) for b in map(load_backend, BACKENDS) if target.kind in b.kinds)
