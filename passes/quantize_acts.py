"""quantize-acts: what a layer does to its input becomes operations, shared by all layers that do the same to it.

%y = lb.linear %x, %w {input = {activation = "int8.token", rotate = 64}}
-> %r = lb.hadamard %x {block = 64}; %q = lb.quantize %r {format = "int8.token"}; %y = lb.linear %q, %w
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IntAttr, ModuleOp, StringAttr
from xdsl.ir import Attribute, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import InsertPoint, Rewriter

from lowbit.compiler.errors import IRError
from lowbit.compiler.ir.graph import GraphOp, Hadamard, Linear, Quantize, at, path_of

__all__ = ["QuantizeActs"]

_Made = dict[tuple[SSAValue, type[GraphOp], tuple[tuple[str, str], ...]], GraphOp]


@dataclass(frozen=True)
class QuantizeActs(ModulePass):
    """Rotation comes first. The order of a weight's columns stays with the layer: rounding only forms groups by it."""

    name = "quantize-acts"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        made: _Made = {}
        for linear in [f for f in op.walk() if isinstance(f, Linear) and f.input is not None]:
            _expand(linear, made)


def _expand(linear: Linear, made: _Made) -> None:
    assert linear.input is not None
    asked = dict(linear.input.data)
    block, text = asked.pop("rotate", None), asked.pop("activation", None)
    order, scales = asked.pop("order", None), asked.pop("scales", None)
    if asked:
        raise IRError("LB0312", f"a layer asks for {', '.join(asked)}, which is not known", where=path_of(linear))
    x = linear.args_[0]
    if isinstance(block, IntAttr):
        x = _shared(linear, x, Hadamard, {"block": block}, made)
    if isinstance(text, StringAttr):
        attributes = {"format": text, "order": order, "scales": scales}
        x = _shared(linear, x, Quantize, {name: a for name, a in attributes.items() if a is not None}, made)
    linear.operands[0] = x
    linear.input = None
    if isinstance(order, StringAttr):
        linear.order = order


def _shared(linear: Linear, x: SSAValue, cls: type[GraphOp], attributes: dict[str, Attribute], made: _Made) -> SSAValue:
    """The result of `cls` on `x`, made before the first layer that needs it."""
    key = (x, cls, tuple(sorted((name, str(a)) for name, a in attributes.items())))
    if key not in made:
        made[key] = cls([x], [x.type], attributes)
        Rewriter.insert_op(at(made[key], path_of(linear)), InsertPoint.before(linear))
    return made[key].outs[0]
