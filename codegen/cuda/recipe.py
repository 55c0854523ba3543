"""How a lane turns its packed words into operands of matrix instructions: the cheapest sequence, proven for every code.

A register holds two weights of one row. What it holds of a weight is a 16-bit float d with

    value of the code = d * factor + addend(h)

where h is the half of the rows (0 or 1) that the register belongs to. Factor and addend meet sums, not weights: the
kernel multiplies d with the activations, adds up the activations too, and applies scale, factor, addend and zero point
to the two sums of a group. So an integer costs no float operation: its bits are put into the mantissa of a power of
two. What is left is to find shifts that serve several registers; all ways are tried when the kernel is generated.

After "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models" (Frantar et al.), which
places integers in mantissas, and "FP6-LLM" (Xia et al.), which splits planes; here derived from the decode program.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

import torch

from lowbit.codegen.cuda.bits import NarrowType, Operand, Sequence, Type16, half_of, run
from lowbit.codegen.cuda.value import Move, Number, read_value
from lowbit.compiler.ir.layout import LAYOUTS, plane_bits
from lowbit.quantizers.formats import Element

__all__ = ["Piece", "Recipe", "find_recipe", "gather", "pieces_of", "trial_words"]

_MANTISSA = {"f16": 10, "bf16": 7}
_BIAS = {"f16": 15, "bf16": 127}
_HALVES, _BYTES = 0x00010001, 0x01010101
_STEPS = 4  # of 16 columns: a block of 64


@dataclass(frozen=True)
class Recipe:
    """Words `w<plane>[i]` of 16 rows x 64 columns -> registers `a[step][2 * c + h]`.

    addend: for each half of the rows. table: 16-bit numbers by code, where the sequence looks them up.
    """

    dtype: Type16 | NarrowType
    sequence: Sequence
    factor: float
    addend: tuple[float, float]
    table: tuple[float, ...] = ()

    @property
    def cost(self) -> float:
        """Instructions a weight (a lane decodes 32)."""
        return self.sequence.cost / 32

    @property
    def sums_activations(self) -> bool:
        """Whether the addend asks for sums of activations."""
        return self.addend != (0.0, 0.0)


@dataclass(frozen=True)
class Piece:
    """`width` bits of the code from bit `low` of plane `plane` on go to bit `to` of the register's half (or byte)."""

    plane: int
    low: int
    width: int
    to: int


def pieces_of(moves: tuple[Move, ...], bits: int) -> list[Piece]:
    """The moves cut where planes end."""
    found, start = [], 0
    for plane, width in enumerate(plane_bits(bits)):
        for mask, up in moves:
            part = (mask >> start) & (2**width - 1)
            while part:
                low = (part & -part).bit_length() - 1
                run_ = ((part >> low) + 1 & -((part >> low) + 1)).bit_length() - 1
                found.append(Piece(plane, low, run_, start + low + up))
                part &= ~((2**run_ - 1) << low)
        start += width
    return found


def _source(bits: int, plane: int, step: int, h: int) -> tuple[str, int]:
    """The word of a plane that holds the codes of a step and half, and their bit in it (of column 0)."""
    width = plane_bits(bits)[plane]
    part, per = step * 2 + h, 8 // width
    return f"w{plane}[{part // per}]", part % per * width


def gather(
    s: Sequence,
    bits: int,
    pieces: list[Piece],
    at: tuple[int, int],
    up: int,
    base: Operand,
    lanes: int,
    join: Literal["andor", "andxor"] = "andor",
) -> Operand:
    """The pieces of one register (or of four bytes), joined with `base`. up: where its codes begin."""
    masks: dict[Operand, int] = {}
    for p in pieces:
        word, bit = _source(bits, p.plane, *at)
        moved = s.shift(word, bit + up + p.low - p.to)
        masks[moved] = masks.get(moved, 0) | ((2**p.width - 1) << p.to) * lanes
    result: Operand = base
    for moved, mask in masks.items():
        if result:
            result = s.add(join, moved, mask, result)
        else:
            result = moved if mask == 0xFFFFFFFF else s.add("and", moved, mask)
    return result


def _direct(bits: int, pieces: list[list[Piece]], base: tuple[int, int]) -> Sequence:
    """Register by register: halves of words are masked where they stand after a shift. pieces, base: by h."""
    s = Sequence()
    for step, h, c in product(range(_STEPS), range(2), range(2)):
        s.outputs[f"a[{step}][{2 * c + h}]"] = gather(s, bits, pieces[h], (step, h), 8 * c, base[h] * _HALVES, _HALVES)
    return s


def _by_bytes(bits: int, pieces: list[Piece], magic: int, high: bool) -> Sequence:
    """Four weights at once as bytes, then spread: below the byte `magic`, or (`high`) above a zero byte."""
    s = Sequence()
    for step, h in product(range(_STEPS), range(2)):
        four = gather(s, bits, pieces, (step, h), 0, 0, _BYTES)
        for c in range(2):
            if high and c:
                out = s.add("and", four, 0xFF00FF00)
            elif high:
                out = s.add("prmt", four, 0, 0x2404)
            else:
                out = s.add("prmt", four, magic, 0x4341 if c else 0x4240)
            s.outputs[f"a[{step}][{2 * c + h}]"] = out
    return s


def _by_two_bytes(bits: int, pieces: list[Piece]) -> Sequence:
    """The low and the high bytes of four weights at once, then interleaved."""
    s = Sequence()
    cut = [_cut(p) for p in pieces]
    low, high = [p for p, _ in cut if p], [p for _, p in cut if p]
    for step, h in product(range(_STEPS), range(2)):
        below, above = (gather(s, bits, part, (step, h), 0, 0, _BYTES) for part in (low, high))
        for c in range(2):
            s.outputs[f"a[{step}][{2 * c + h}]"] = s.add("prmt", below, above, 0x7351 if c else 0x6240)
    return s


def _cut(p: Piece) -> tuple[Piece | None, Piece | None]:
    """What of a piece comes to the low byte, and to the high byte."""
    below = min(max(8 - p.to, 0), p.width)
    return (
        Piece(p.plane, p.low, below, p.to) if below else None,
        Piece(p.plane, p.low + below, p.width - below, p.to + below - 8) if below < p.width else None,
    )


def _scaled(s: Sequence, factor: float, addend: float, dtype: Type16) -> Sequence:
    """The same with every register multiplied and added to."""
    pair = [half_of(v, dtype) * _HALVES for v in (factor, addend)]
    s.outputs = {name: s.add("fma", at, *pair) for name, at in s.outputs.items()}
    return s


def _integers(n: Number, bits: int, dtype: Type16) -> Iterator[Recipe]:
    mantissa = _MANTISSA[dtype]
    if bits > mantissa:  # as a subnormal number, which one multiplication makes a normal one
        (pieces,) = [pieces_of(n.moves, bits)]
        unit = 2.0 ** (1 - _BIAS[dtype] - mantissa)
        up, shrink = 2.0 ** _BIAS[dtype], 2.0 ** _BIAS[dtype] * unit
        centre = n.addend / n.factor  # exact: a small integer
        s = _scaled(_by_bytes(bits, pieces, 0, False), up, centre * shrink, dtype)
        yield Recipe(dtype, s, n.factor / shrink, (0.0, 0.0))
        return

    def magic(place: int) -> int:
        return (_BIAS[dtype] + mantissa - place) << mantissa  # bit `place` of its mantissa is worth 1

    def addend(place: int) -> float:
        return n.addend - n.factor * 2.0 ** (mantissa - place)

    places = range(mantissa - bits + 1)
    for q in product(places, places):
        pieces2 = [pieces_of(((2**bits - 1, place),), bits) for place in q]
        s = _direct(bits, pieces2, (magic(q[0]), magic(q[1])))
        yield Recipe(dtype, s, n.factor, (addend(q[0]), addend(q[1])))
    s = _by_bytes(bits, pieces_of(n.moves, bits), magic(0) >> 8, False)
    yield Recipe(dtype, s, n.factor, (addend(0),) * 2)


def _floats(n: Number, bits: int, dtype: Type16) -> Iterator[Recipe]:
    """A float16's fields; in a bfloat16 they stand three bits lower, and the exponent's bias is multiplied in."""
    down = _MANTISSA["f16"] - _MANTISSA[dtype]
    moves: list[Move] = []
    for mask, up in n.moves:
        sign = mask & (0x8000 >> up if up >= 0 else 0x8000 << -up)
        moves += [(part, up - by) for part, by in ((sign, 0), (mask & ~sign, down)) if part]
    pieces = pieces_of(tuple(moves), bits)
    lift = 2.0 ** (_BIAS[dtype] - _BIAS["f16"])
    ways = [_direct(bits, [pieces, pieces], (0, 0))] if min(p.to for p in pieces) >= 0 else []
    if all(p.to >= 8 for p in pieces):
        lower = [Piece(p.plane, p.low, p.width, p.to - 8) for p in pieces]
        ways.append(_by_bytes(bits, lower, 0, True))
    elif ways:
        ways.append(_by_two_bytes(bits, pieces))
    for s in ways:
        yield Recipe(dtype, s if lift == 1.0 else _scaled(s, lift, 0.0, dtype), n.factor, (n.addend, n.addend))


def _tables(n: Number, bits: int, dtype: Type16) -> Iterator[Recipe]:
    s = Sequence()
    pieces = pieces_of(((2**bits - 1, 0),), bits)
    for step, h in product(range(_STEPS), range(2)):
        four = gather(s, bits, pieces, (step, h), 0, 0, _BYTES)
        for c in range(2):
            s.outputs[f"a[{step}][{2 * c + h}]"] = s.add("lookup", four, c)
    # A power of two keeps the largest entry in range.
    top = max(abs(v) for v in n.table)
    shrink = 2.0 ** max(math.frexp(top)[1] - _BIAS[dtype], 0) if math.isfinite(top) else 1.0
    yield Recipe(dtype, s, n.factor * shrink, (n.addend, n.addend), tuple(v / shrink for v in n.table))


def trial_words(bits: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(codes [2**bits, 32], their words): one lane's 32 codes, of step, c, h and e in this order. Every place has one
    code after the other, beside others that must not disturb it."""
    codes = torch.arange(2**bits)
    lane = (codes[:, None] * 1 + torch.arange(32) * 7) % len(codes)
    tile = torch.zeros((len(codes), 64, 64), dtype=torch.uint8)
    where = [(h * 8, step * 16 + c * 8 + e) for step in range(_STEPS) for c in (0, 1) for h in (0, 1) for e in (0, 1)]
    for i, (row, col) in enumerate(where):
        tile[:, row, col] = lane[:, i].to(torch.uint8)
    planes = LAYOUTS["fragments"].pack(tile.reshape(-1, 64), bits)
    words: dict[str, torch.Tensor] = {}
    for p, (width, plane) in enumerate(zip(plane_bits(bits), planes, strict=True)):
        first = plane.reshape(len(codes), -1)[:, :width].to(torch.int64) & 0xFFFFFFFF
        words |= {f"w{p}[{i}]": first[:, i] for i in range(width)}
    return lane, words


def _proven(recipe: Recipe, element: Element) -> bool:
    """Whether every register gets exactly the value of every code (codes for infinity and NaN aside)."""
    assert recipe.dtype in ("f16", "bf16")
    levels = element.levels().double()
    lane, words = trial_words(element.bits)
    table = torch.tensor(recipe.table, dtype=torch.float64) if recipe.table else None
    found = run(recipe.sequence, words, recipe.dtype, table)
    for i in range(0, 32, 4):
        step, c = i // 8, i // 4 % 2
        for h, e in product(range(2), range(2)):
            got = found[f"a[{step}][{2 * c + h}]"][e] * recipe.factor + recipe.addend[h]
            want = levels[lane[:, i + 2 * h + e]]
            if not torch.equal(got[want.isfinite()], want[want.isfinite()]):
                return False
    return True


@cache
def find_recipe(element: Element, dtype: Type16) -> Recipe | None:
    """The cheapest proven way for an element, or None when there is none that is exact.

    Among equally cheap ones that with the smallest addend: it costs the least accuracy in sums.
    """
    number = read_value(element.decode(), element.bits)
    if number is None:
        return None
    ways = {"integer": _integers, "half": _floats, "table": _tables}[number.kind](number, element.bits, dtype)
    ranked = sorted(ways, key=lambda r: (r.cost, max(map(abs, r.addend))))
    return next((r for r in ranked if _proven(r, element)), None)
