"""What a number format is, independent of any layout, method or backend.

A `Format` is an element codec (which number each code stands for), a granularity (which weights share a scale), and
the side values stored with the codes. Its text form round-trips and is used on the command line, in the IR, in file
metadata and as the tuning key: `int4.g128.asym`, `int8.ch.sym`, `int3.g64.asym.f32`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.program import Program

__all__ = ["K_ALIGN", "SCALE_DTYPES", "Element", "Format", "Granularity"]

SCALE_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
K_ALIGN = 32
"""Columns of a packed group are padded to a multiple of this, so that kernels never meet a partial block."""


class Element(ABC):
    """The codec of one number: which value each code stands for, before scale and zero point."""

    bits: int
    symmetric: bool

    @property
    @abstractmethod
    def name(self) -> str:
        """Text form of the element, such as `int4`."""

    @abstractmethod
    def levels(self) -> torch.Tensor:
        """float32 [2**bits]: the value of every code. The definition that every decode program is tested against."""

    @abstractmethod
    def decode(self) -> Program:
        """The decode program: code -> value, over integer and float operations (see `compiler.ir.program`)."""

    @property
    @abstractmethod
    def integer(self) -> bool:
        """True when value = code - `bias` exactly, so that dot products can run on the codes as integers."""

    @property
    def bias(self) -> int:
        """The integer subtracted from a code to get its value; only meaningful when `integer`."""
        return 0


@dataclass(frozen=True)
class Granularity:
    """Which weights of a [N, K] matrix share a scale: all (`t`), a row (`ch`), `group` columns of a row (`g64`)."""

    kind: Literal["t", "ch", "g"]
    group: int = 0

    def __str__(self) -> str:
        return f"g{self.group}" if self.kind == "g" else self.kind

    def group_size(self, k: int) -> int:
        """Columns that share a scale in a matrix with `k` columns."""
        return self.group if self.kind == "g" else k

    def groups(self, k: int) -> int:
        """Scales per row; the last group is ragged when `group` does not divide `k`."""
        return math.ceil(k / self.group_size(k))


@dataclass(frozen=True)
class Format:
    """How one weight matrix is stored: `element` codes, a scale (and zero point when `zero`) per `granularity` unit.

    value = (element value - zero point) * scale, where the zero point is an integer code offset and only present in
    asymmetric formats.
    """

    element: Element
    granularity: Granularity
    scale: str = "f16"

    def __post_init__(self) -> None:
        if self.scale not in SCALE_DTYPES:
            raise FormatError(
                "LB0211", f"unknown scale type {self.scale!r}", hint="use one of " + ", ".join(SCALE_DTYPES)
            )
        if self.granularity.kind == "g" and self.granularity.group < 1:
            raise FormatError("LB0212", f"group size must be positive, not {self.granularity.group}")

    def __str__(self) -> str:
        symmetry = "sym" if self.element.symmetric else "asym"
        tail = "" if self.scale == "f16" else f".{self.scale}"
        return f"{self.element.name}.{self.granularity}.{symmetry}{tail}"

    @property
    def bits(self) -> int:
        """Bits per code."""
        return self.element.bits

    @property
    def zero(self) -> bool:
        """True when a zero point is stored with each scale."""
        return not self.element.symmetric

    @property
    def scale_dtype(self) -> torch.dtype:
        """torch dtype of the stored scales."""
        return SCALE_DTYPES[self.scale]

    def check(self, n: int, k: int, where: str) -> None:
        """Raise FormatError (LB0213) when the format does not fit an [n, k] matrix."""
        g = self.granularity
        if g.kind == "g" and g.group > k:
            raise FormatError(
                "LB0213",
                f"group size {g.group} is larger than the {k} input columns",
                where=where,
                hint=f"use a group of at most {k}, or 'ch' for one scale per output row",
            )

    def side_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the scales (and zero points) of an [n, k] matrix: [n or 1, groups]."""
        return (1 if self.granularity.kind == "t" else n, self.granularity.groups(k))

    def bits_per_weight(self, n: int, k: int) -> float:
        """Stored bits per weight including scales and zero points (packed to `bits` bits each)."""
        rows, groups = self.side_shape(n, k)
        side = 8 * self.scale_dtype.itemsize + (self.bits if self.zero else 0)
        return self.bits + rows * groups * side / (n * k)

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of an [n, k] matrix on disk, rounded up per tensor."""
        return math.ceil(self.bits_per_weight(n, k) * n * k / 8)
