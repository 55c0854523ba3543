"""quantize-weights: run the method on every weight that has a format; the IR records what it said.

%w = lb.weight {...} : () -> !lb.q<64x64, "int4.g64.sym">
-> %w = lb.weight {..., method = "gptq 0.0012"} : () -> !lb.q<64x64, "int4.g64.sym">
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.passes import ModulePass

from lowbit.compiler.ir.graph import Weight
from lowbit.compiler.ir.types import QType
from lowbit.passes.session import session_of
from lowbit.quantizers.formats import parse_format

__all__ = ["QuantizeWeights"]


@dataclass(frozen=True)
class QuantizeWeights(ModulePass):
    """Needs a session: the weights are not in the IR."""

    name = "quantize-weights"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        session = session_of(ctx, self.name)
        for weight in [w for w in op.walk() if isinstance(w, Weight) and w.method is None]:
            if isinstance(type_ := weight.outs[0].type, QType):
                path = weight.names.data[0].data.removesuffix(".weight")
                weight.method = StringAttr(session.quantize(path, parse_format(type_.fmt.data)))
