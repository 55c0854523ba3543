"""canonicalize: remove what does nothing.

%p = lb.permute %x {order = [0, 1, 2]}        (gone: %x is used directly)
%d = lb.silu %x, never used                   (gone)
%s = lb.silu %g; %y = lb.mul %s, %u     ->    %y = lb.silu_mul %g, %u
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter
from xdsl.transforms.dead_code_elimination import dce

from lowbit.compiler.ir.graph import Mul, Permute, Silu, SiluMul, at, path_of

__all__ = ["Canonicalize"]


@dataclass(frozen=True)
class Canonicalize(ModulePass):
    """Identity permutations, dead operations (unless `dead` is off: graphs whose calls may write to their arguments),
    and the silu-mul idiom."""

    name = "canonicalize"
    dead: bool = True

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for found in list(op.walk()):
            if isinstance(found, Permute) and _is_identity(found):
                Rewriter.replace_op(found, [], [found.args_[0]])
            elif isinstance(found, Mul):
                _silu_mul(found)
        if self.dead:
            dce(op)


def _is_identity(op: Permute) -> bool:
    order = [a.value.data for a in op.order.data if isinstance(a, IntegerAttr)]
    return order == list(range(len(op.order.data)))


def _silu_mul(op: Mul) -> None:
    for silu, other in ((op.args_[0], op.args_[1]), (op.args_[1], op.args_[0])):
        if isinstance(silu.owner, Silu) and silu.has_one_use():
            fused = SiluMul([silu.owner.args_[0], other], [op.outs[0].type])
            Rewriter.replace_op(op, at(fused, path_of(op)))
            Rewriter.erase_op(silu.owner)
            return
