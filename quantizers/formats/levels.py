"""Elements given by a table: any set of up to 256 numbers is a format.

    register_element(LevelElement("pot3", (0.0, 1.0, 2.0, 4.0, -1.0, -2.0, -4.0, -8.0)))

is all a new one takes: methods, packing, kernels, storage and `quantize formats` then know `pot3.g64`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.program import Program, program
from lowbit.quantizers.formats.base import Element

__all__ = ["LevelElement"]


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
