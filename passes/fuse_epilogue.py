"""fuse-epilogue: what follows a linear layer moves into its kernel.

%a = lb.linear %x, %wgu {segments = [F, F]}; %g, %u = lb.split %a; %y = lb.silu_mul %g, %u
-> %y = lb.linear %x, %wgu {segments = [F, F], epilogue = ["silu_mul"]}

%y = lb.linear %x, %w; %z = lb.add %r, %y
-> %z = lb.linear %x, %w, %r {epilogue = ["residual"]}
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, ModuleOp, StringAttr
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from lowbit.compiler.ir.graph import Add, Linear, SiluMul, Split, at, path_of
from lowbit.compiler.ir.types import QType, dims

__all__ = ["FuseEpilogue"]


@dataclass(frozen=True)
class FuseEpilogue(ModulePass):
    """Bias already is an operand of `lb.linear`; silu-mul and, unless `residual` is off, the residual add move in.

    Module-by-module execution turns `residual` off: there the add belongs to the surrounding module.
    """

    name = "fuse-epilogue"
    residual: bool = True

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for found in list(op.walk()):
            if isinstance(found, SiluMul):
                _silu_mul(found)
        for found in list(op.walk()):
            if self.residual and isinstance(found, Add):
                _residual(found)


def _quantized(linear: Linear) -> bool:
    return isinstance(linear.args_[1].type, QType)


def _silu_mul(op: SiluMul) -> None:
    """Gate and up must be the two halves, in order, of one fused linear and used by nothing else."""
    gate, up = op.args_
    split = gate.owner
    if not isinstance(split, Split) or up.owner is not split or list(split.outs) != [gate, up]:
        return
    linear = split.args_[0].owner
    halves = dims(gate.type)[-1] == dims(up.type)[-1]
    if not isinstance(linear, Linear) or not _quantized(linear) or not halves or linear.steps() not in ((), ("bias",)):
        return
    if not (gate.has_one_use() and up.has_one_use() and split.args_[0].has_one_use()):
        return
    fused = _with_step(linear, "silu_mul", [], op.outs[0])
    Rewriter.replace_op(op, at(fused, path_of(linear)))
    Rewriter.erase_op(split)
    Rewriter.erase_op(linear)


def _residual(op: Add) -> None:
    """The sum's other operand must have the linear's full shape and be computed before it."""
    for value, other in ((op.args_[0], op.args_[1]), (op.args_[1], op.args_[0])):
        linear = value.owner
        fits = isinstance(linear, Linear) and _quantized(linear) and "residual" not in linear.steps()
        if fits and value.has_one_use() and other is not value and dims(other.type) == dims(value.type):
            assert isinstance(linear, Linear)
            fused = _with_step(linear, "residual", [other], op.outs[0])
            Rewriter.replace_op(op, at(fused, path_of(linear)))
            Rewriter.erase_op(linear)
            return


def _with_step(linear: Linear, step: str, extra: list[SSAValue], result: SSAValue) -> Linear:
    attributes = dict(linear.attributes)
    attributes["epilogue"] = ArrayAttr(StringAttr(s) for s in (*linear.steps(), step))
    operands = list(linear.args_)
    end = len(operands) - (linear.norm is not None)  # the norm's weight stays last
    return Linear([*operands[:end], *extra, *operands[end:]], [result.type], attributes)
