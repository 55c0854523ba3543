"""Small floats: a sign, `exponent` bits and `mantissa` bits, 2 to 8 bits together; one class for all of them.

Value of exponent field E and mantissa M with bias b = 2**(exponent - 1) - 1: M / 2**mantissa * 2**(1 - b) where E is 0,
else (1 + M / 2**mantissa) * 2**(E - b). Unless `specials` says otherwise every code is a finite number, as in FP6-LLM
("FP6-LLM: Efficiently Serving Large Language Models Through FP6-Centric Algorithm-System Co-Design", Xia et al.) and
in "OCP Microscaling Formats (MX) Specification". e4m3 and e5m2 are the FP8 formats of the latter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.program import Program, ProgramBuilder, program
from lowbit.quantizers.formats.base import Element

__all__ = ["FLOAT_NAMES", "FloatElement", "Specials"]

Specials = Literal["none", "fn", "ieee"]

FLOAT_NAMES = ("e2m1", "e2m2", "e3m1", "e3m2", "e2m3", "e4m1", "e4m3", "e5m2")
"""What `catalog` lists; every other e<exponent>m<mantissa> of at most 8 bits exists too."""

_USUAL: dict[tuple[int, int], Specials] = {(4, 3): "fn", (5, 2): "ieee"}
_HALF_EXPONENT, _HALF_MANTISSA, _HALF_BIAS = 5, 10, 15


@dataclass(frozen=True)
class FloatElement(Element):
    """`exponent` and `mantissa` bits. specials: `none`; `fn`, the largest magnitude is NaN; `ieee`, the largest
    exponent holds infinity and NaN. Codes from the top: sign, exponent, mantissa."""

    exponent: int
    mantissa: int
    specials: Specials = "none"
    bits: int = field(init=False, repr=False)
    symmetric: bool = field(init=False, default=True, repr=False)
    always_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", 1 + self.exponent + self.mantissa)
        if not (1 <= self.exponent <= 7 and 0 <= self.mantissa and self.bits <= 8):
            raise FormatError(
                "LB0210",
                f"no float has {self.exponent} exponent and {self.mantissa} mantissa bits",
                hint="use 1 to 7 exponent bits, and at most 8 bits with the sign, such as e3m2",
            )
        fits = {
            "none": True,
            "fn": self.exponent < _HALF_EXPONENT and self.mantissa > 0,
            "ieee": self.exponent == _HALF_EXPONENT,
        }
        if not fits[self.specials]:
            raise FormatError("LB0210", f"{self.name} does not exist", hint="leave the suffix out")

    @property
    def name(self) -> str:
        usual = _USUAL.get((self.exponent, self.mantissa), "none")
        suffix = "" if self.specials == usual else {"none": "finite"}.get(self.specials, self.specials)
        return f"e{self.exponent}m{self.mantissa}{suffix}"

    @property
    def integer(self) -> bool:
        return False

    @property
    def exponent_bias(self) -> int:
        """What the exponent field exceeds the exponent by."""
        return int(2 ** (self.exponent - 1)) - 1

    def levels(self) -> torch.Tensor:
        top = self.exponent + self.mantissa
        codes = torch.arange(2**self.bits)
        power = (codes >> self.mantissa) & (2**self.exponent - 1)
        fraction = codes & (2**self.mantissa - 1)
        significand = fraction + (power > 0) * 2**self.mantissa
        exponent = power.clamp(min=1) - self.exponent_bias - self.mantissa
        value = torch.ldexp(significand.double(), exponent)
        largest = codes & (2**top - 1) == 2**top - 1
        if self.specials == "fn":
            value[largest] = torch.nan
        if self.specials == "ieee":
            full = power == 2**self.exponent - 1
            value[full] = torch.where(fraction[full] > 0, torch.nan, torch.inf).double()
        return torch.where(codes >> top > 0, -value, value).float()

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """uint8 codes of the nearest finite numbers, ties to even codes; what is too large becomes the largest.

        Zeros keep their sign. Raises FormatError (LB0217) for NaN, which no weight is encoded as.
        """
        if bool(values.isnan().any()):
            raise FormatError("LB0217", f"NaN has no code in {self.name}", hint="check the weight for NaN first")
        magnitudes = self.levels()[: 2 ** (self.bits - 1)].double()
        magnitudes = magnitudes[magnitudes.isfinite()]
        middle = (magnitudes[1:] + magnitudes[:-1]) / 2
        # A value on the edge gets the lower code: right for even ones, so edges above odd codes move below the tie.
        middle[1::2] = torch.nextafter(middle[1::2], torch.tensor(0.0, dtype=torch.float64))
        index = torch.bucketize(values.double().abs(), middle)
        sign = values.signbit().long() << (self.bits - 1)
        return (index | sign).to(torch.uint8)

    def decode(self) -> Program:
        """Through the bits of a float16 where its exponents reach, else a table.

        A float16 with the same fields is the value times 2**(bias - 15), for subnormal codes too: they become
        subnormal float16, whose conversion costs nothing, where a subnormal float32 operand would be slow on CPUs and
        flushed to zero on some GPUs.
        """
        with program("code") as p:
            code = p.arg("code")
            if self.exponent == _HALF_EXPONENT and self.specials == "ieee":
                p.result(p.half(p.shl(code, p.int(_HALF_MANTISSA - self.mantissa))))
            elif self.exponent >= _HALF_EXPONENT:
                p.result(p.lut(code, tuple(self.levels().tolist())))
            else:
                self._decode_half(p)
        return p.done()

    def _decode_half(self, p: ProgramBuilder) -> None:
        code, up = p.arg("code"), _HALF_MANTISSA - self.mantissa
        sign = p.shl(p.and_(code, p.int(2 ** (self.bits - 1))), p.int(16 - self.bits))
        number = p.shl(p.and_(code, p.int(2 ** (self.bits - 1) - 1)), p.int(up))
        value = p.mul(p.half(p.or_(sign, number)), p.const(2.0 ** (_HALF_BIAS - self.exponent_bias)))
        if self.specials == "fn":
            # Only the NaN code's magnitude overflows here, and infinity times zero is NaN.
            ulp = 2.0 ** (2**self.exponent - 1 - self.exponent_bias - self.mantissa)
            overflow = p.mul(value, p.const(2.0**128 / ((2.0 ** (self.mantissa + 1) - 1.5) * ulp)))
            value = p.fma(overflow, p.const(0.0), value)
        p.result(value)

    @staticmethod
    def parse(name: str, symmetric: bool) -> FloatElement | None:
        """The element called `name`, None when the name is not a float's.

        Raises FormatError (LB0210) for floats that do not exist, and for zero points.
        """
        m = re.fullmatch(r"e(\d)m(\d)(finite|fn|ieee)?", name)
        if not m:
            return None
        if not symmetric:
            raise FormatError("LB0210", f"{name} has no zero points: floats are symmetric", hint=f"write {name}.g64")
        size = (int(m[1]), int(m[2]))
        given: dict[str | None, Specials] = {"finite": "none", "fn": "fn", "ieee": "ieee"}
        return FloatElement(*size, given.get(m[3], _USUAL.get(size, "none")))
