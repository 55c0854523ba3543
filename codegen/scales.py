"""Where a kernel's scales are applied, and which power of two they take over from the decode program.

A small float read as a wider one is its value times a power of two (`codegen.operand`), so decoding costs one
multiplication by a constant; folded into the scales it costs nothing ("FP6-LLM", Xia et al., multiplies twice). That
is exact unless the product leaves the range of the type that scales are kept in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lowbit.codegen.operand import OperandType, expand
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.formats import WIDE_DTYPES, FloatElement, Format

__all__ = ["Fold", "fold_scale", "place_of"]

Place = Literal["epilogue", "loop"]


@dataclass(frozen=True)
class Fold:
    """factor: what scales are multiplied with beforehand, 1 for nothing; reason: why, or why not."""

    factor: float
    reason: str


def place_of(fmt: Format, k: int) -> Place:
    """`epilogue` where a row of `k` columns has one scale, so that it meets the finished sum; else `loop`."""
    return "epilogue" if fmt.granularity.groups(k) == 1 else "loop"


def fold_scale(fmt: Format, operand: OperandType, kept: str = "f32", largest: float = 0.0) -> Fold:
    """The power of two that scales of `fmt` take over from weights decoded as `operand`.

    kept: type in which scales times the power are kept (`f32`, `f16`, `bf16`). largest: the largest scale where it is
    known, 0 where any that the format can store must be reckoned with.
    """
    if not isinstance(fmt.element, FloatElement):
        return Fold(1.0, f"{fmt.element.name} is decoded without a power of two")
    try:
        found = expand(fmt.element, operand)
    except KernelError as e:
        return Fold(1.0, e.message)
    if not found.exponent:
        return Fold(1.0, f"{fmt.element.name} has the exponents of {operand}")
    if fmt.offset:
        return Fold(1.0, "offsets are added to scaled weights, not to their multiples")
    limit = torch.finfo(WIDE_DTYPES[kept]).max
    top = largest or torch.finfo(fmt.scale_dtype).max * (1.0 if not fmt.tensor else 2.0**100)
    if top * 2.0**found.exponent > limit:
        edge = limit / 2.0**found.exponent
        known = f"they reach {largest:g}" if largest else f"{fmt.scale} scales may be larger"
        return Fold(1.0, f"scales of {edge:.4g} and more times 2**{found.exponent} overflow {kept}: {known}")
    return Fold(2.0**found.exponent, f"{fmt.element.name} as {operand} is its value times 2**-{found.exponent}")
