"""Elements given by a table: any set of up to 256 numbers is a format.

    register_element(LevelElement("pot3", (0.0, 1.0, 2.0, 4.0, -1.0, -2.0, -4.0, -8.0)))

is all a new one takes: methods, packing, kernels, storage and `quantize formats` then know `pot3.g64`. The 4-bit normal
float `nf4` of "QLoRA: Efficient Finetuning of Quantized LLMs" (Dettmers et al.) is such a table, `iq4nl` of llama.cpp
another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.program import Program, program
from lowbit.quantizers.formats.base import Element

__all__ = ["IQ4_NL", "NORMAL_FLOAT4", "LevelElement"]

NORMAL_FLOAT4 = (
    -1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.079580300, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, the largest scaled to 1: eight above zero, seven below it, and zero. As float32
these are the numbers bitsandbytes has, to the bit, so that what was tuned for them meets them."""

IQ4_NL = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
"""llama.cpp's non-linear 4-bit levels (ggml's `ggml-common.h`): signed bytes, so products are those of integers."""


@dataclass(frozen=True)
class LevelElement(Element):
    """`table[code]` is the value of a code; a power of two of finite numbers, 2 to 256."""

    label: str
    table: tuple[float, ...]
    bits: int = field(init=False, repr=False)
    symmetric: bool = field(init=False, default=True, repr=False)
    always_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        size = len(self.table)
        object.__setattr__(self, "bits", size.bit_length() - 1)
        if not 2 <= size <= 256 or size & (size - 1) or not bool(self.levels().isfinite().all()):
            raise FormatError("LB0210", f"{self.label}: a table has a power of two of finite numbers, 2 to 256")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.label):
            raise FormatError("LB0210", f"{self.label!r} is no name for an element", hint="use a-z, 0-9 and _")

    @property
    def name(self) -> str:
        return self.label

    @property
    def integer(self) -> bool:
        return False

    def levels(self) -> torch.Tensor:
        return torch.tensor(self.table, dtype=torch.float32)

    def decode(self) -> Program:
        with program("code") as p:
            p.result(p.lut(p.arg("code"), tuple(self.levels().tolist())))
        return p.done()
