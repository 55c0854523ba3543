"""assign-formats: the scheme gives every linear weight a format, with the reason.

%w = lb.weight {names = ["a.q_proj.weight"]} : () -> tensor<64x64xf32>
-> %w = lb.weight {names = [...], reason = "scheme w4a16"} : () -> !lb.q<64x64, "int4.g64.sym">
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from lowbit.compiler.ir.graph import Linear, Weight
from lowbit.compiler.ir.types import QType, dims
from lowbit.quantizers.scheme import load_scheme

__all__ = ["AssignFormats"]


@dataclass(frozen=True)
class AssignFormats(ModulePass):
    """`scheme` is a preset or TOML file, `format` replaces its weight format; without either the context's scheme."""

    name = "assign-formats"
    scheme: str = ""
    format: str = ""

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        held = getattr(ctx, "scheme", None)
        scheme = held if held and not self.scheme else load_scheme(self.scheme or "w4a16", format=self.format or None)
        for weight in [w for w in op.walk() if isinstance(w, Weight)]:
            if isinstance(weight.outs[0].type, QType) or not _multiplied(weight):
                continue
            if any(not isinstance(use.operation, Linear) for use in weight.outs[0].uses):
                weight.reason = StringAttr("kept: shared with an operation other than a linear layer")
                continue
            path = weight.names.data[0].data.removesuffix(".weight")
            fmt = scheme.format_for(path)
            if fmt is None:
                weight.reason = StringAttr(f"kept: excluded by scheme {scheme.name}")
                continue
            n, k = dims(weight.outs[0].type)
            assert n is not None
            assert k is not None
            fmt.check(n, k, path)
            weight.reason = StringAttr(f"scheme {scheme.name}")
            Rewriter.replace_value_with_new_type(weight.outs[0], QType.get(n, k, str(fmt)))


def _multiplied(weight: Weight) -> bool:
    """True when the weight is the matrix of a linear layer."""
    return any(isinstance(use.operation, Linear) and use.index == 1 for use in weight.outs[0].uses)
