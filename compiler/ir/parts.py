"""What codes are cut into where no container of a power of two holds them: planes, or whole codes and what is left."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from lowbit.compiler.errors import FormatError

__all__ = ["Part", "place", "plane_bits", "plane_parts", "whole_parts"]


class Part(NamedTuple):
    """Neighbouring bits of a code that lie side by side: in which plane, in which of the containers that differ in the
    digit between block and position alone, `width` bits from bit `shift` on."""

    plane: int
    container: int
    shift: int
    width: int


def plane_bits(bits: int) -> tuple[int, ...]:
    """Plane widths that store a `bits`-wide code, low bits first: 3 -> (2, 1), 6 -> (4, 2), 8 -> (8,).

    Widths are powers of two, so each divides the container: the "4+2" split of FP6-LLM, for any width.
    """
    if not 1 <= bits <= 8:
        raise FormatError("LB0201", f"codes have 1 to 8 bits, not {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@cache
def plane_parts(bits: int, container: int) -> tuple[tuple[Part, ...], ...]:
    """`Layout.parts` of codes split into planes."""
    widths = list(enumerate(plane_bits(bits)))
    return tuple(tuple(Part(i, *divmod(code * w, container), w) for i, w in widths) for code in range(container))


@cache
def whole_parts(bits: int, container: int, low: int) -> tuple[tuple[Part, ...], ...]:
    """`Layout.parts` of whole codes; see `compiler.ir.layout`."""
    codes: list[list[tuple[int, int]]] = []
    left: list[tuple[int, int]] = []
    for word in range(bits):
        taken = [list(range(slot * bits, (slot + 1) * bits)) for slot in range(container // bits)]
        if len(taken) == 1 and bits > low:
            taken = [[*range(low), *range(container - 1, container - 1 - bits + low, -1)]]
        codes += [[(word, bit) for bit in places] for places in taken]
        left += [(word, bit) for bit in range(container) if not any(bit in places for places in taken)]
        while len(left) >= bits:
            codes.append(left[:bits])
            left = left[bits:]
    return tuple(map(_joined, codes))


def _joined(places: list[tuple[int, int]]) -> tuple[Part, ...]:
    """Parts of a code, given where each of its bits lies."""
    parts: list[Part] = []
    for word, bit in places:
        if parts and parts[-1].container == word and parts[-1].shift + parts[-1].width == bit:
            parts[-1] = parts[-1]._replace(width=parts[-1].width + 1)
        else:
            parts.append(Part(0, word, bit, 1))
    return tuple(parts)


def place(parts: tuple[Part, ...], bit: int) -> tuple[int, int]:
    """Container and position of one bit of a code."""
    for part in parts:
        if bit < part.width:
            return part.container, part.shift + bit
        bit -= part.width
    raise IndexError(bit)
