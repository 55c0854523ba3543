"""Trellis coding: the number that a code stands for depends on the codes before it in its row.

A weight's code and those of the columns before it are a *state*, a window of the row's codes; the value is computed
from the state by a hash that makes close to normally distributed numbers of it. Neighbouring weights share most of
their states' bits, so each is chosen among many more values than its own bits can tell apart ("Trellis Coded
Quantization", Marcellin and Fischer), and no table is stored ("QTIP: Quantization with Trellises and Incoherence
Processing", Tseng et al.). At 2 bits normally distributed weights have 11.0 dB, where the best scalar codes have 9.3.

Values are bytes, so that products with rounded activations are those of plain 8-bit integers. Codes before a row's
first one are 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import torch

from lowbit.compiler.ir.parts import plane_bits
from lowbit.compiler.ir.program import Program, program
from lowbit.quantizers.formats.base import Element
from lowbit.quantizers.formats.scaled import IntegerLevels

__all__ = ["STATE_BITS", "TrellisElement", "state_of"]

STATE_BITS = 12
"""Bits of a state, which the codes of 1, 2, 3 and 4 bits fill: a search keeps 4096 paths. With 16 bits, 2-bit codes
gain another 0.2 dB, for sixteen times the search."""
_MULTIPLIER = 0xDB5B
"""Of the hash: of two dozen odd numbers that were tried, one of the best on normal numbers at all widths. Numbers of 32
bits were no better, and take another multiplication where lanes have 16 bits."""
_DROPPED = 2  # the sum of four bytes has ten bits, of which a byte keeps eight
_MIDDLE, _LARGEST = 96, 182
"""The mean and the largest of the sums that are left."""


@dataclass(frozen=True)
class TrellisElement(Element):
    """Codes of `bits` bits whose values follow from `window` codes each, a column's own one the last."""

    bits: int
    symmetric: bool = field(init=False, default=True, repr=False)
    always_symmetric: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"tcq{self.bits}"

    @property
    def window(self) -> int:
        return STATE_BITS // self.bits

    @property
    def integer(self) -> bool:
        return False

    def levels(self) -> torch.Tensor:
        return _levels()

    @property
    def integer_levels(self) -> IntegerLevels | None:
        """The integers from the lowest to the highest value: kernels compute the bytes and look nothing up."""
        return IntegerLevels(tuple(range(-_MIDDLE, _LARGEST + 1 - _MIDDLE)), 0)

    def decode(self) -> Program:
        with program("code") as p:
            hashed = p.multiply(p.arg("code"), p.int(_MULTIPLIER))
            sums = p.plus(p.and_(hashed, p.int(0x00FF00FF)), p.and_(p.shr(hashed, p.int(8)), p.int(0x00FF00FF)))
            total = p.plus(p.and_(sums, p.int(0xFFFF)), p.shr(sums, p.int(16)))
            p.result(p.add(p.int_to_float(p.shr(total, p.int(_DROPPED))), p.const(-float(_MIDDLE))))
        return p.done()

    def windows(self, codes: torch.Tensor) -> torch.Tensor:
        states = torch.zeros(codes.shape, dtype=torch.int64, device=codes.device)
        wide = codes.to(torch.int64)
        for back in range(min(self.window, codes.shape[-1])):
            states[..., back:] |= state_of(wide[..., : codes.shape[-1] - back], self.bits, back)
        return states

    @staticmethod
    def parse(name: str, symmetric: bool) -> TrellisElement | None:
        """The element called `name`, or None when the name is not a trellis's."""
        m = re.fullmatch(r"tcq([1-4])", name)
        return TrellisElement(int(m[1])) if m and symmetric else None


def state_of(codes: torch.Tensor, bits: int, back: int) -> torch.Tensor:
    """What codes [...] that stand `back` columns before a weight have in its state.

    Planes of a code (4, 2 or 1 bits) have a field of the state each, low ones first, in which a later column's bits
    stand above an earlier one's: such a field is a run of bits of words that hold the plane's columns in their order.
    """
    window, found, low, at = STATE_BITS // bits, torch.zeros_like(codes), 0, 0
    for width in plane_bits(bits):
        found = found | ((codes >> low) & (2**width - 1)) << (at + width * (window - 1 - back))
        low, at = low + width, at + width * window
    return found


@cache
def _levels() -> torch.Tensor:
    hashed = torch.arange(2**STATE_BITS) * _MULTIPLIER & 0xFFFFFFFF
    total = sum(((hashed >> 8 * i) & 0xFF for i in range(1, 4)), hashed & 0xFF)
    return ((total >> _DROPPED) - _MIDDLE).float()
