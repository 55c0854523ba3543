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
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import ActivationFormat, Element, FloatElement, Format, WeightFormat, exact_integers

__all__ = ["OPERANDS", "Expansion", "OperandType", "expand", "operand_for"]

OperandType = Literal["e4m3", "f16", "bf16"]
OPERANDS: dict[OperandType, tuple[int, int, torch.dtype]] = {
    "e4m3": (4, 3, torch.float8_e4m3fn),
    "f16": (5, 10, torch.float16),
    "bf16": (8, 7, torch.bfloat16),
}
"""(exponent bits, mantissa bits, storage) of operands that are floats."""

_POWERS = sorted(range(-24, 25), key=abs)  # tried for elements that are no small floats, the smallest first
_FIRST_FP8 = 89  # sm_89


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


def operand_for(
    fmt: WeightFormat, target: Target, activation: ActivationFormat | None, x_dtype: str = "bf16"
) -> tuple[OperandType | Literal["s8"], str]:
    """The type in which weights of `fmt` enter a GPU's matrix instructions, and the reason.

    activation: what x is rounded to, None for numbers of `x_dtype` (`f16` or `bf16`). e4m3 where both sides are e4m3
    and the target multiplies them (sm_89 on; sm_90's `mma.sync` would emulate it, so there only warpgroup instructions
    of 64 rows and more gain), s8 where both sides are integers of a byte, else the 16-bit float.
    Raises KernelError (LB0419) where the 16-bit float is not exact either.
    """
    wide: OperandType = "f16" if x_dtype == "f16" else "bf16"
    if not isinstance(fmt, Format):
        return wide, f"{fmt} is decoded from a codebook"
    why = f"activations are {activation or x_dtype}"
    if activation is not None and activation.integer:
        levels = exact_integers(fmt)
        if levels is not None and levels.largest < 128:
            return "s8", f"{fmt.element.name} and {activation.element.name} are integers of a byte"
        why = f"{fmt} is no integer of a byte"
    elif activation is not None and str(activation.element.name) == "e4m3":
        refusal = _no_fp8(fmt, target)
        if refusal is None:
            return "e4m3", f"every number of {fmt.element.name} is one of e4m3 times a power of two"
        why = refusal
    expand(fmt.element, wide)
    return wide, why


def _no_fp8(fmt: Format, target: Target) -> str | None:
    """Why weights of `fmt` cannot be e4m3 operands on `target`, or None."""
    if target.kind != "cuda" or int(target.arch.removeprefix("sm_").rstrip("a")) < _FIRST_FP8:
        return f"{target} has no FP8 matrix instructions"
    if fmt.zero or fmt.offset:
        return f"{fmt} shifts its numbers, which e4m3 then does not hold"
    try:
        expand(fmt.element, "e4m3")
    except KernelError as e:
        return e.message
    return None
