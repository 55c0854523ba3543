"""fuse-norm: a root-mean-square norm moves into the kernels of the quantized linear layers that read it.

%n = lb.rms_norm %x, %g {eps = 1e-6}; %y = lb.linear %n, %w -> %y = lb.linear %x, %w, %g {norm = 1e-6}
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import FloatAttr, ModuleOp, f64
from xdsl.passes import ModulePass
from xdsl.rewriter import InsertPoint, Rewriter

from lowbit.compiler.ir.graph import Linear, RmsNorm, at, path_of
from lowbit.compiler.ir.types import QType, dims
from lowbit.quantizers.formats import VectorFormat, parse_format

__all__ = ["FuseNorm", "norm_gain"]

_BYTES_A_SECOND = 2e10
"""Rate of a pass over a row that is in the cache."""


def norm_gain(columns: int, kernels: int, call: float = 1e-6) -> float:
    """Predicted seconds a token that are saved when `kernels` kernels compute a norm of `columns` columns themselves.

    On its own a norm is a call, reads its input, writes its result, and that is read again; a kernel sums the squares
    of a row it then reads once more, with the norm's weight. Every kernel does that anew.
    """
    row = 4 * columns / _BYTES_A_SECOND
    return call + 3 * row - kernels * 2 * row


@dataclass(frozen=True)
class FuseNorm(ModulePass):
    """Taken where the cost model says that it pays, and only whole: a norm that something else reads too has to be
    computed anyway. Kernels of vector formats, and layers that rotate what they read, do without.

    call: seconds that a norm costs as a call of its own, whatever its size.
    """

    name = "fuse-norm"
    call: float = 1e-6

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for norm in [f for f in op.walk() if isinstance(f, RmsNorm)]:
            readers = [use.operation for use in norm.outs[0].uses]
            layers = [r for r in readers if isinstance(r, Linear) and _takes(r, norm)]
            columns = dims(norm.outs[0].type)[-1] or 0
            if layers and len(layers) == len(readers) and norm_gain(columns, len(layers), self.call) > 0:
                for layer in layers:
                    _fold(layer, norm)
                Rewriter.erase_op(norm)


def _takes(linear: Linear, norm: RmsNorm) -> bool:
    """Whether the layer's kernel can normalise its input: numbers of one type, in and out, and nothing in between."""
    type_ = linear.args_[1].type
    if not isinstance(type_, QType) or isinstance(parse_format(type_.fmt.data), VectorFormat) or norm.eps is None:
        return False
    plain = linear.rotate is None and linear.norm is None and linear.input is None
    used = [value for value in linear.args_ if value is norm.outs[0]]
    return plain and len(used) == 1 and norm.args_[0].type == norm.outs[0].type


def _fold(linear: Linear, norm: RmsNorm) -> None:
    assert norm.eps is not None
    attributes = {**linear.attributes, "norm": FloatAttr(norm.eps.value.data, f64)}
    operands = [norm.args_[0], *linear.args_[1:], norm.args_[1]]
    fused = Linear(operands, [linear.outs[0].type], attributes)
    Rewriter.insert_op(at(fused, path_of(linear)), InsertPoint.before(linear))
    linear.outs[0].replace_all_uses_with(fused.outs[0])
    Rewriter.erase_op(linear)
