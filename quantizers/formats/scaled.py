"""Elements whose values are small integers times a power of two: dot products of those can be sums of integers.

Plain integers are, and so are most floats of up to 6 bits: e2m1 is (0, 1, 2, 3, 4, 6, 8, 12) / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

__all__ = ["DIGIT_BITS", "IntegerLevels", "find_integer_levels"]

DIGIT_BITS = 6
"""Bits of a digit where integers take two, beside the sign: its bytes are below 128."""
_LARGEST = 2047
"""Largest integer: 32 products with 16-bit numbers then still have a sum below 2**31."""
_EXPONENTS = range(-32, 33)


@dataclass(frozen=True)
class IntegerLevels:
    """The value of a code is integers[code] * 2**exponent, exactly.

    Kernels multiply bytes that are never negative: integers[code] + bias, or two digits of it.
    """

    integers: tuple[int, ...]
    exponent: int

    @cached_property
    def largest(self) -> int:
        """The largest magnitude of an integer."""
        return max(map(abs, self.integers))

    @cached_property
    def digits(self) -> tuple[tuple[int, ...], ...]:
        """Tables of bytes by code: integer + bias, or where that exceeds a byte its two digits, the high one first:
        integer + bias = high * 2**DIGIT_BITS + low, where integers of opposite signs have digits of constant sum."""
        low = min(self.integers)
        if max(self.integers) - low < 256:
            return (tuple(i - low for i in self.integers),)
        base = 2**DIGIT_BITS
        high = tuple(int(math.copysign(abs(i) // base, i)) + self.largest // base for i in self.integers)
        return high, tuple(int(math.copysign(abs(i) % base, i)) + base - 1 for i in self.integers)

    @cached_property
    def bias(self) -> int:
        """What the bytes stand for beyond the integers."""
        if len(self.digits) == 1:
            return -min(self.integers)
        base: int = 2**DIGIT_BITS
        return self.largest // base * base + base - 1

    @property
    def plain(self) -> bool:
        """True when the bytes are the codes themselves."""
        return self.digits == (tuple(range(len(self.integers))),)


@cache
def find_integer_levels(levels: tuple[float, ...]) -> IntegerLevels | None:
    """The integers behind `levels`, or None when there are none small enough."""
    if not all(map(math.isfinite, levels)):
        return None
    exponent = min((_trailing(v) for v in levels if v), default=0)
    if exponent not in _EXPONENTS or max(map(abs, levels)) > _LARGEST * 2.0**exponent:
        return None
    return IntegerLevels(tuple(int(v / 2.0**exponent) for v in levels), exponent)


def _trailing(value: float) -> int:
    """The exponent of the lowest bit that is set."""
    numerator, denominator = value.as_integer_ratio()
    return (numerator & -numerator).bit_length() - denominator.bit_length()
