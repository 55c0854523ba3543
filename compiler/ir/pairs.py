"""The pair layout: two weights come out of packed words in place, as 16-bit floats, with one rotation and mask a plane.

A 16-bit float with the fields of a small one is its value times a power of two. Its bits are not neighbours: the sign
stands on top, exponent and mantissa further down. So the codes' top bits are stored at the distance at which they are
needed, and a word is rotated until the pair at hand stands right: `rotr(w, r) & mask` gives those bits of both halves,
and bits of other pairs never meet because the rotations tile the half-word. After section "Ahead-of-time bit-level
pre-packing" of "FP6-LLM" (Xia et al.), with fewer operations a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowbit.compiler.errors import FormatError

__all__ = ["HALF_FORMATS", "PairLayout"]

HALF_FORMATS = {"f16": (5, 10), "bf16": (8, 7)}
"""(exponent, mantissa) bits of the 16-bit targets."""

_LOW = 4  # bits of the second plane


@dataclass(frozen=True)
class PairLayout:
    """Sixteen codes of 5 or 6 bits (32 of 5) in one word of top bits and words of 4 low bits.

    top: mask of a pair's top bits in both halves. low: mask of its low bits. turns: rotation to the right of the top
    word for each pair; the low word p // 4 is rotated by 4 * (p % 4). exponent: what is read is value * 2**-exponent.
    """

    bits: int
    top: int
    low: int
    turns: tuple[int, ...]
    exponent: int

    @staticmethod
    def derive(exponent: int, mantissa: int, target: str) -> PairLayout:
        """The layout of e<exponent>m<mantissa> codes for a 16-bit float `target`.

        Raises FormatError (LB0207) for codes of other widths than 5 and 6, and where sign and exponent would need the
        same place in the word.
        """
        wide_exponent, wide_mantissa = HALF_FORMATS[target]
        bits = 1 + exponent + mantissa
        if bits not in (5, 6) or exponent > wide_exponent:
            raise FormatError("LB0207", f"no pair layout holds e{exponent}m{mantissa} for {target}")
        fields = [15] + [wide_mantissa + exponent - 1 - i for i in range(bits - 1)]  # the code's bits from the top
        top, low = fields[:-_LOW], fields[-_LOW:]
        both = 0x00010001
        return PairLayout(
            bits,
            sum(both << f for f in top),
            sum(both << f for f in low),
            _tiling(top[0] - top[-1]),
            2 ** (wide_exponent - 1) - 2 ** (exponent - 1),
        )

    @property
    def group(self) -> int:
        """Codes that share one word of top bits; code 2 * p + h stands in half h of pair p."""
        return 2 * len(self.turns)

    def pack(self, codes: list[int]) -> tuple[int, list[int]]:
        """`group` codes -> the word of their top bits, and the words of their low bits."""
        top, low = 0, [0] * (self.group // 8)
        for i, code in enumerate(codes):
            p, half = divmod(i, 2)
            here = _spread(code >> _LOW, self.top & 0xFFFF) << 16 * half
            top |= _rotate(here, 32 - self.turns[p])
            here = _spread(code & (2**_LOW - 1), self.low & 0xFFFF) << 16 * half
            low[p // 4] |= _rotate(here, 32 - 4 * (p % 4))
        return top, low

    def read(self, top: int, low: list[int], pair: int) -> int:
        """What a kernel computes: both numbers of a pair as the two halves of a word."""
        high = _rotate(top, self.turns[pair]) & self.top
        return high | (_rotate(low[pair // 4], 4 * (pair % 4)) & self.low)


def _tiling(distance: int) -> tuple[int, ...]:
    """Rotations by which the bits {0, -distance} (one bit when 0) fill the 16 positions of a half-word exactly once."""
    if distance == 0:
        return tuple(range(16))
    step = math.gcd(distance, 16)
    if step == 16:
        raise FormatError("LB0207", f"bits at distance {distance} do not tile a half-word")
    return tuple((start + 2 * i * distance) % 16 for start in range(step) for i in range(8 // step))


def _rotate(word: int, by: int) -> int:
    """32 bits to the right."""
    by %= 32
    return (word >> by | word << (32 - by)) & 0xFFFFFFFF


def _spread(value: int, mask: int) -> int:
    """The bits of `value` put into the set bits of `mask`, lowest first."""
    out = 0
    for place in range(16):
        if mask >> place & 1:
            out |= (value & 1) << place
            value >>= 1
    return out
