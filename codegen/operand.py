"""Decoded weights as operands of matrix instructions: which number type holds a format's values, and how to get there.

A small float and a wider one differ by where their fields stand: sign to the top, the others in front of zeros. That
is the value times a power of two, for every code, subnormals included ("FP6-LLM: Efficiently Serving Large Language
Models Through FP6-Centric Algorithm-System Co-Design", Xia et al., for float16; here for any pair of codecs). With e4m3
as the wider one, weights of up to 8 bits meet e4m3 activations on FP8 tensor cores (W6A8), and only scales are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.program import Program, program
from lowbit.quantizers.formats import Element, FloatElement

__all__ = ["OPERANDS", "Expansion", "OperandType", "expand"]

OperandType = Literal["e4m3", "f16", "bf16"]
OPERANDS: dict[OperandType, tuple[int, int, torch.dtype]] = {
    "e4m3": (4, 3, torch.float8_e4m3fn),
    "f16": (5, 10, torch.float16),
    "bf16": (8, 7, torch.bfloat16),
}
"""(exponent bits, mantissa bits, storage) of operands that are floats."""

_POWERS = sorted(range(-24, 25), key=abs)  # tried for elements that are no small floats, the smallest first


@dataclass(frozen=True)
class Expansion:
    """value of a code = (operand with the bits codes[code]) * 2**exponent, exactly.

    program: `code` -> the operand's bits, where a move of fields gives them; None where only the table does.
    """

    operand: OperandType
    codes: tuple[int, ...]
    exponent: int
    program: Program | None


@cache
def expand(element: Element, operand: OperandType) -> Expansion:
    """The expansion of `element`; raises KernelError (LB0419) when some code has no exact operand."""
    levels = element.levels()
    wide_exponent, wide_mantissa, _ = OPERANDS[operand]
    if isinstance(element, FloatElement) and element.exponent <= wide_exponent and element.mantissa <= wide_mantissa:
        moved = _move(element, operand)
        codes = _run(moved, levels.numel())
        exponent = 2 ** (wide_exponent - 1) - 2 ** (element.exponent - 1)
        if _agree(levels, codes, exponent, operand):
            return Expansion(operand, tuple(codes.tolist()), exponent, moved)
    for exponent in _POWERS:
        codes = _bits(torch.ldexp(levels, torch.tensor(-exponent)), operand)
        if _agree(levels, codes, exponent, operand):
            return Expansion(operand, tuple(codes.tolist()), exponent, None)
    raise KernelError(
        "LB0419",
        f"{operand} does not hold every number of {element.name} times a power of two",
        hint="multiply as f16, bf16 or integers",
    )


def _move(element: FloatElement, operand: OperandType) -> Program:
    """Sign to the top; exponent and mantissa to the operand's, the missing bits of both being zeros."""
    wide_exponent, wide_mantissa, _ = OPERANDS[operand]
    top = element.bits - 1
    with program("code") as p:
        code = p.arg("code")
        sign = p.shl(p.and_(code, p.int(2**top)), p.int(wide_exponent + wide_mantissa - top))
        rest = p.shl(p.and_(code, p.int(2**top - 1)), p.int(wide_mantissa - element.mantissa))
        p.result(p.or_(sign, rest))
    return p.done()


def _run(moved: Program, count: int) -> torch.Tensor:
    """int32 bits for every code."""
    table: dict[str, Callable[..., torch.Tensor]] = {
        "int": torch.tensor,
        "and": torch.bitwise_and,
        "or": torch.bitwise_or,
        "shl": torch.bitwise_left_shift,
    }
    return moved.run(table, {"code": torch.arange(count)}).int()


def _bits(values: torch.Tensor, operand: OperandType) -> torch.Tensor:
    """int32 bits of the operands nearest to `values`."""
    stored = values.to(OPERANDS[operand][2])
    return stored.view(torch.uint8).int() if stored.itemsize == 1 else stored.view(torch.int16).int() & 0xFFFF


def _agree(levels: torch.Tensor, codes: torch.Tensor, exponent: int, operand: OperandType) -> bool:
    """Whether the bits stand for the levels. Codes that stand for no number, which no weight has, may be anything."""
    dtype = OPERANDS[operand][2]
    stored = codes.to(torch.uint8).view(dtype) if dtype.itemsize == 1 else codes.to(torch.int16).view(dtype)
    values = torch.ldexp(stored.double(), torch.tensor(exponent))
    finite = levels.isfinite()
    return torch.equal(values[finite], levels[finite].double())
