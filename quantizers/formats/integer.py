"""Uniform integers of 1 to 8 bits, symmetric and asymmetric.

Codes are offset binary: code c of a symmetric b-bit format stands for c - 2**(b-1). One bit symmetric is the pair
{-1, +1} (sign quantization), because {-1, 0} has no use. Asymmetric formats store the zero point as a code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from lowbit.compiler.ir.program import Program, program
from lowbit.quantizers.formats.base import Element

__all__ = ["IntElement"]


@dataclass(frozen=True)
class IntElement(Element):
    """A `bits`-wide integer."""

    bits: int
    symmetric: bool

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def integer(self) -> bool:
        return not (self.symmetric and self.bits == 1)

    @property
    def bias(self) -> int:
        return 2 ** (self.bits - 1) if self.symmetric else 0

    def levels(self) -> torch.Tensor:
        codes = torch.arange(2**self.bits, dtype=torch.float32)
        if self.symmetric and self.bits == 1:
            return 2 * codes - 1
        return codes - self.bias

    def decode(self) -> Program:
        with program("code") as p:
            number = p.int_to_float(p.arg("code"))
            if self.symmetric and self.bits == 1:
                p.result(p.fma(number, p.const(2.0), p.const(-1.0)))
            elif self.symmetric:
                p.result(p.add(number, p.const(-float(self.bias))))
            else:
                p.result(number)
        return p.done()

    @staticmethod
    def parse(name: str, symmetric: bool) -> IntElement | None:
        """The element called `name`, or None when the name is not an integer format's."""
        m = re.fullmatch(r"int([1-8])", name)
        return IntElement(int(m[1]), symmetric) if m else None
