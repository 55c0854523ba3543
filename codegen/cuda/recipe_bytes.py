"""How a lane's packed words become operands of four bytes, signed integers or FP8 numbers, or of eight nibbles.

The layout was made for 16-bit operands, whose columns 2t, 2t + 1 and 8 + 2t, 8 + 2t + 1 of 16 belong to lane t. Taken
as four bytes they are in the order 2t, 8 + 2t, 2t + 1, 9 + 2t, which does no harm where activations, which a kernel of
their own rounds, are stored in that order too; so all matrix instructions share one packed matrix.

A code stands at the top of its byte and the sign bit is turned: (code << p) ^ 0x80 is (code - 2**(bits - 1)) * 2**p
for p = 8 - bits, and the power of two waits until the end. So symmetric integers take one instruction for four weights
where they lie right, two where they have to be shifted. After "COMET: Towards Practical W4A4KV4 LLMs Serving" (16
times 4-bit codes, without unpacking), for any width. Small floats are spread into the fields of e4m3
(`codegen.operand`).

Nibbles (`s4`) are those of two steps of 16 columns, the first in the low halves: 64 columns an instruction, for
activations of four bits on GPUs whose matrix units multiply such integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import torch

from lowbit.codegen.cuda.bits import NarrowType, Operand, Sequence, run_words
from lowbit.codegen.cuda.recipe import Recipe, gather, pieces_of, trial_words
from lowbit.codegen.cuda.value import Move, read_moves, read_value
from lowbit.codegen.operand import expand
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.formats import Element

__all__ = ["find_byte_recipe"]

_LANES = 0x01010101
_SUMS_COST = 0.5  # instructions a weight that sums of activations are worth


def _sequence(bits: int, moves: tuple[Move, ...], base: int) -> Sequence:
    """Words `w<plane>[i]` -> registers `a[step of 32 columns][2 * q + h]`, q being which half of the columns."""
    s, pieces = Sequence(), pieces_of(moves, bits)
    for step, q, h in product(range(2), range(2), range(2)):
        four = gather(s, bits, pieces, (2 * step + q, h), 0, base * _LANES, _LANES, "andxor")
        s.outputs[f"a[{step}][{2 * q + h}]"] = four
    return s


def _nibbles(bits: int, moves: tuple[Move, ...], base: int) -> Sequence:
    """The same -> registers `a[0][2 * q + h]` of eight nibbles."""
    s = Sequence()
    for q, h in product(range(2), range(2)):
        eight: Operand = base * _LANES * 0x11
        for i in range(2):
            pieces = pieces_of(tuple((mask, up + 4 * i) for mask, up in moves), bits)
            eight = gather(s, bits, pieces, (2 * q + i, h), 0, eight, _LANES, "andxor")
        s.outputs[f"a[0][{2 * q + h}]"] = eight
    return s


def _integers(element: Element, width: int, plain: bool) -> Iterator[Recipe]:
    number, bits = read_value(element.decode(), element.bits), element.bits
    if number is None or number.kind != "integer":
        return
    sign = 1 << (width - 1)
    for p in range(width + 1 - bits):
        tops = [sign] if p + bits == width else [sign, 0]
        halves = [0, 1 << (p - 1)] if p else [0]
        for top, half in product(tops, halves):
            if plain and (p or top or half):
                continue
            unit = number.factor / 2**p
            addend = number.addend + unit * (top - half)
            build = _sequence if width == 8 else _nibbles
            sequence = build(bits, ((2**bits - 1, p),), top | half)
            yield Recipe("s8" if width == 8 else "s4", sequence, unit, (addend, addend))


def _floats(element: Element) -> Iterator[Recipe]:
    try:
        found = expand(element, "e4m3")
    except KernelError:
        return
    moves = read_moves(found.program, element.bits) if found.program else None
    if moves is not None:
        yield Recipe("e4m3", _sequence(element.bits, moves, 0), 2.0**found.exponent, (0.0, 0.0))


def _proven(recipe: Recipe, element: Element) -> bool:
    """Whether every byte, or half of one, stands for the value of its code (codes for infinity and NaN aside)."""
    levels = element.levels().double()
    lane, words = trial_words(element.bits)
    found = run_words(recipe.sequence, words)
    places = list(product(range(4), (0, 1), (0, 1), (0, 1)))  # step, c, h, e: the order of `lane`
    for i, (step, c, h, e) in enumerate(places):
        number = _number(found, recipe.dtype, (step, c, h, e))
        got, want = number * recipe.factor + recipe.addend[0], levels[lane[:, i]]
        if not torch.equal(got[want.isfinite()], want[want.isfinite()]):
            return False
    return True


def _number(found: dict[str, torch.Tensor], dtype: str, at: tuple[int, int, int, int]) -> torch.Tensor:
    """What the registers hold of the weight at (step, c, h, e), as float64."""
    step, c, h, e = at
    if dtype == "s4":
        half = found[f"a[0][{2 * (step // 2) + h}]"] >> 8 * (2 * e + c) + 4 * (step % 2) & 15
        return ((half ^ 8) - 8).double()
    byte = (found[f"a[{step // 2}][{2 * (step % 2) + h}]"] >> 8 * (2 * e + c) & 255).to(torch.uint8)
    return byte.view(torch.int8 if dtype == "s8" else torch.float8_e4m3fn).double()


@cache
def find_byte_recipe(element: Element, operand: NarrowType, plain: bool = False) -> Recipe | None:
    """The cheapest proven way to bytes or their halves, or None. plain: bytes are the codes themselves, for zero points
    that are taken away from bytes."""
    widths = {"s8": 8, "s4": 4}
    ways = list(_integers(element, widths[operand], plain) if operand in widths else _floats(element))
    ways.sort(key=lambda r: (r.cost + _SUMS_COST * r.sums_activations, abs(r.addend[0])))
    return next((r for r in ways if _proven(r, element)), None)
