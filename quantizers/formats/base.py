"""What a number format is, independent of any layout, method or backend.

A `WeightFormat` says how one matrix is stored. `Format`, the scalar kind, is an element codec (which number each code
stands for), a granularity (which weights share a scale), and the side values stored with the codes; `VectorFormat`
(in `vector.py`) stores several weights as one code. The text form round-trips and is used on the command line, in the
IR, in file metadata and as the tuning key: `int4.g128.asym`, `int2.g64.fz`, `vq.d4.k256`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.program import Program
from lowbit.quantizers.formats.scaled import IntegerLevels, find_integer_levels

__all__ = ["K_ALIGN", "MOST_TERMS", "SCALE_DTYPES", "WIDE_DTYPES", "Element", "Format", "Granularity", "WeightFormat"]

SCALE_DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
    "i8ch": torch.int8,
}
"""Types of scales. e8m0 are powers of two (the MX formats), e4m3 usually go with a float32 scale per tensor (NVFP4).
i8ch are whole numbers from 1 up, under a float16 scale per row: level * scale is a byte ("QServe: W4A8KV4 Quantization
and System Co-design for Efficient LLM Serving")."""

WIDE_DTYPES = {name: SCALE_DTYPES[name] for name in ("f16", "bf16", "f32")}
"""Types that codebooks, norms and offsets can have as well."""

K_ALIGN = 32
"""Columns of a packed group are padded to a multiple of this, so that kernels never meet a partial block."""


MOST_TERMS = 4
"""Signs that a weight is the sum of, at most: of Gaussian weights in groups of 128 four have 20.1 dB, uniform integers
of 4 bits 20.3 already."""


class Element(ABC):
    """The codec of one number: which value each code stands for, before scale and zero point."""

    bits: int
    symmetric: bool
    always_symmetric: ClassVar[bool] = False
    """True for families without zero points: their text forms do not say `sym`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Text form of the element, such as `int4`."""

    @property
    def window(self) -> int:
        """Codes of a row that the value of the last of them depends on: 1, its own, but for trellises."""
        return 1

    @property
    def state_bits(self) -> int:
        """Bits of such a window of codes: those of a code where its value is its own."""
        return self.bits * self.window

    @abstractmethod
    def levels(self) -> torch.Tensor:
        """float32 [2**state_bits]: the value of every code, or state. What every decode program is tested against.

        Codes that are never written, because they stand for infinity or NaN, have these as values.
        """

    @abstractmethod
    def decode(self) -> Program:
        """The decode program: code (or state) -> value, over integer and float operations (`compiler.ir.program`)."""

    def windows(self, codes: torch.Tensor) -> torch.Tensor:
        """int64 [..., K]: the states of rows of codes [..., K], which are the codes themselves but for trellises."""
        return codes.long()

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 [..., K]: what rows of codes [..., K], as they are stored, stand for."""
        return self.levels().to(codes.device)[self.windows(codes)]

    @property
    @abstractmethod
    def integer(self) -> bool:
        """True when value = code - `bias` exactly, so that dot products can run on the codes as integers."""

    @property
    def integer_levels(self) -> IntegerLevels | None:
        """The values as small integers times a power of two, or None; follows from `levels` alone."""
        return find_integer_levels(tuple(self.levels().tolist()))

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


class WeightFormat(ABC):
    """How one [N, K] matrix is stored. Frozen, hashable, and written as text by `str`."""

    @abstractmethod
    def check(self, n: int, k: int, where: str) -> None:
        """Raise FormatError (LB0213) when the format does not fit an [n, k] matrix."""

    @abstractmethod
    def bits_per_weight(self, n: int, k: int) -> float:
        """Stored bits per weight of an [n, k] matrix, everything included: codes, scales, codebooks, permutation."""

    @property
    @abstractmethod
    def scale_dtype(self) -> torch.dtype:
        """torch dtype of the stored side values (scales, offsets, codebooks)."""

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of an [n, k] matrix on disk, rounded up per tensor."""
        return math.ceil(self.bits_per_weight(n, k) * n * k / 8)


@dataclass(frozen=True)
class Format(WeightFormat):
    """One code per weight: `element` codes, a scale per `granularity` unit, and what shifts the scale's origin.

    value = (element value - zero point) * scale, where the zero point is an integer code offset and only present in
    asymmetric formats (`asym`); or value = element value * scale + offset with an offset of the scale's type (`fz`,
    the "float zero point" of decoupleQ), in which case `offset` is set and the element is symmetric. With `tensor`
    every scale is multiplied by one float32 of the whole matrix, and the product rounded to float32 is the scale.
    `ordered` formats keep their columns in an order of their own, by which groups and blocks are formed (GPTQ's
    activation order, the permutations of Atom and COMET), and store it in 16 bits a column. A weight of a format with
    several `terms` is the sum of so many such numbers of one bit, each with a scale of its own: binary coding, `bcq3`
    ("Alternating Multi-bit Quantization for Recurrent Neural Networks", Xu et al.).
    """

    element: Element
    granularity: Granularity
    scale: str = "f16"
    offset: bool = False
    tensor: bool = False
    ordered: bool = False
    terms: int = 1

    def __post_init__(self) -> None:
        if self.scale not in SCALE_DTYPES:
            raise FormatError(
                "LB0211", f"unknown scale type {self.scale!r}", hint="use one of " + ", ".join(SCALE_DTYPES)
            )
        if self.granularity.kind == "g" and self.granularity.group < 1:
            raise FormatError("LB0212", f"group size must be positive, not {self.granularity.group}")
        if self.offset and self.zero:
            raise FormatError("LB0214", f"{self.element.name} cannot have both a zero point and an offset")
        if self.offset and self.scale not in WIDE_DTYPES:
            raise FormatError(
                "LB0216", f"{self.scale} cannot hold offsets", hint="use one of " + ", ".join(WIDE_DTYPES)
            )
        if self.channel and (self.granularity.kind != "g" or not self.element.integer):
            raise FormatError(
                "LB0216", "scales in i8ch are those of groups of integers", hint="write int4.g128.asym.i8ch"
            )
        if self.tensor and self.scale != "e4m3":
            raise FormatError(
                "LB0216", f"{self.scale} scales need no second one per tensor", hint="leave t32 out, or use e4m3.t32"
            )
        if self.terms > 1:
            self._check_terms()
        if self.element.window > 1:
            self._check_windows()

    def _check_terms(self) -> None:
        """Raise FormatError (LB0233) for sums that nothing stores or runs."""
        g = self.granularity
        if self.terms > MOST_TERMS or self.bits > 1 or not self.element.symmetric:
            raise FormatError("LB0233", f"sums are of 2 to {MOST_TERMS} signs", hint="write bcq2.g64, or bcq3.g128")
        if self.offset or self.tensor or self.ordered or self.channel:
            raise FormatError("LB0233", "binary coding has a scale per sign, and nothing else", hint="write bcq2.g64")
        if g.kind == "t" or (g.kind == "g" and g.group < K_ALIGN):
            hint = f"write bcq{self.terms}.g64, or bcq{self.terms}.ch"
            raise FormatError("LB0233", f"binary coding has scales per row or per {K_ALIGN} columns or more", hint=hint)

    def _check_windows(self) -> None:
        """Raise FormatError (LB0234) for trellises that nothing runs: groups are packed without padding between them,
        so that a window's codes are neighbours."""
        g, name = self.granularity, self.element.name
        if g.kind == "g" and g.group % K_ALIGN:
            why = f"groups of {g.group} columns are no multiple of {K_ALIGN}, which trellises need"
            raise FormatError("LB0234", why, hint=f"write {name}.g64, or {name}.ch")
        if self.offset or self.channel or self.tensor:
            raise FormatError("LB0234", "trellises have a scale per group, and nothing else", hint=f"write {name}.g64")

    def __str__(self) -> str:
        if self.terms > 1:
            return f"bcq{self.terms}.{self.granularity}" + ("" if self.scale == "f16" else f".{self.scale}")
        symmetry = ".fz" if self.offset else ".sym" if self.element.symmetric else ".asym"
        symmetry = "" if symmetry == ".sym" and self.element.always_symmetric else symmetry
        tail = ("" if self.scale == "f16" else f".{self.scale}") + (".t32" if self.tensor else "")
        tail += ".perm" if self.ordered else ""
        return f"{self.element.name}.{self.granularity}{symmetry}{tail}"

    @property
    def channel(self) -> bool:
        """True when every row has a second scale."""
        return self.scale == "i8ch"

    @property
    def bits(self) -> int:
        """Bits per code: of one term, where a weight is a sum."""
        return self.element.bits

    @property
    def code_bits(self) -> int:
        """Bits of a weight's code: those of all terms, the first one's lowest."""
        return self.bits * self.terms

    @property
    def zero(self) -> bool:
        """True when a zero point is stored with each scale."""
        return not self.element.symmetric

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scale]

    def packed_scale_dtype(self, container: int) -> torch.dtype:
        """Type of scales and offsets in a layout of `container` bits: in bytes scales of one byte stay as they are,
        others are float16 or float32, the narrower one that is exact."""
        if container == 8 and self.scale_dtype.itemsize == 1 and not self.channel:
            return self.scale_dtype
        narrow = self.scale == "f16" or (self.scale == "e4m3" and not self.tensor)
        return torch.float16 if narrow else torch.float32

    def check(self, n: int, k: int, where: str) -> None:
        g = self.granularity
        if min(n, k) < 1:
            why = f"there is nothing to quantize in a matrix of {n}x{k}"
            raise FormatError("LB0213", why, where=where, hint="leave the layer out with `ignore`")
        if g.kind == "g" and g.group > k:
            raise FormatError(
                "LB0213",
                f"group size {g.group} is larger than the {k} input columns",
                where=where,
                hint=f"use a group of at most {k}, or 'ch' for one scale per output row",
            )
        if self.ordered and k > 2**16:
            raise FormatError(
                "LB0213",
                f"{self} stores an order of columns in 16 bits, which {k} input columns do not fit",
                where=where,
                hint="leave perm out",
            )

    def side_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the scales (and zero points or offsets) of an [n, k] matrix: [n or 1, groups * terms], those of a
        group's terms side by side."""
        return (1 if self.granularity.kind == "t" else n, self.granularity.groups(k) * self.terms)

    def bits_per_weight(self, n: int, k: int) -> float:
        rows, groups = self.side_shape(n, k)
        stored = 8 * self.scale_dtype.itemsize
        side = stored + (self.bits if self.zero else stored if self.offset else 0)
        once = (32 if self.tensor else 0) + (16 * k if self.ordered else 0) + (16 * n if self.channel else 0)
        return self.code_bits + (rows * groups * side + once) / (n * k)
