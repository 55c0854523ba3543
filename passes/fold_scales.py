"""fold-scales: the power of two that ends the decoding of a small float moves into its scales, where it stays in range.

    %v = lbk.mul %half, 4096.0;  %w = lbk.mul %v, %scale
    -> %w = lbk.mul %half, %scale        {scales = {place = "epilogue", factor = 4096.0, reason = "..."}}

`place` says where scales are applied: `epilogue` for one a row, `loop` for groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from xdsl.context import Context
from xdsl.dialects.builtin import DictionaryAttr, FloatAttr, ModuleOp, StringAttr, f32
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from lowbit.codegen.operand import OPERANDS
from lowbit.codegen.scales import Fold, fold_scale, place_of
from lowbit.compiler.errors import IRError
from lowbit.compiler.ir import kernel as lbk
from lowbit.passes.lower_kernels import spec_of
from lowbit.quantizers.formats import WIDE_DTYPES

__all__ = ["FoldScales"]


@dataclass(frozen=True)
class FoldScales(ModulePass):
    """`operand`: the type weights are decoded to (`f16`, `bf16`, `e4m3`). `kept`: the type of folded scales. `largest`:
    a bound of all scales, 0 where none is known."""

    name = "fold-scales"
    operand: str = "f16"
    kept: str = "f32"
    largest: float = 0.0

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.operand not in OPERANDS or self.kept not in WIDE_DTYPES:
            raise IRError("LB0303", f"no scales are folded for {self.operand} operands into {self.kept}")
        for kernel in [k for k in op.walk() if isinstance(k, lbk.Kernel)]:
            spec = spec_of(kernel)
            if spec.vector:
                continue
            fold = Fold(1.0, "integers are multiplied, and their unit is part of the activations' scale")
            if not spec.limbs:
                fold = fold_scale(spec.fmt, self.operand, self.kept, self.largest)
            if fold.factor != 1.0 and self.operand == "f16" and not _drop(kernel, fold.factor):
                fold = Fold(1.0, "the decode program does not end in the power of two")
            kernel.scales = DictionaryAttr(
                {
                    "place": StringAttr(place_of(spec.fmt, spec.k)),
                    "factor": FloatAttr(fold.factor, f32),
                    "reason": StringAttr(fold.reason),
                }
            )


def _drop(kernel: lbk.Kernel, factor: float) -> bool:
    """Remove the multiplication by `factor` before that by the scale; False where there is none."""
    last = kernel.decode.block.last_op
    assert isinstance(last, lbk.Yield)
    scaled = last.values[0].owner
    if not isinstance(scaled, lbk.Mul):
        return False
    value = scaled.operands[0].owner
    if not isinstance(value, lbk.Mul) or _constant(value.operands[1]) != factor:
        return False
    constant = cast(Operation, value.operands[1].owner)
    scaled.operands[0] = value.operands[0]
    Rewriter.erase_op(value)
    if not any(constant.results[0].uses):
        Rewriter.erase_op(constant)
    return True


def _constant(value: SSAValue) -> float | None:
    return value.owner.value.value.data if isinstance(value.owner, lbk.Const) else None
