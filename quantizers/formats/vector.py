"""Vector quantization: one index into a codebook stands for several weights.

A column of the [N, K] matrix is cut into vectors of `dim` consecutive *output* rows, each stored as the index of a
centroid; with a residual codebook the value is the sum of two centroids. The most important columns may have a codebook
of their own (outliers), the others may be split into column groups with a codebook each. After "VPTQ: Extreme Low-bit
Vector Post-Training Quantization for Large Language Models" (Liu et al.).

With axis `in` vectors are of consecutive *input* columns of a row, as in "Extreme Compression of Large Language Models
via Additive Quantization" (AQLM, Egiazarian et al.): a centroid's product with activations is the same in every row, so
kernels for few tokens look sums of products up. All columns share the codebooks then.

Text form: `vq.d8.k4096`, then any of `r256` (residual centroids), `in` (vectors along the input), `c4` (column groups),
`o16v4k4096` or `o2pv4k4096` (16 columns, or 2 percent of them, as outliers with vectors of 4 and 4096 centroids), `cn`
or `rn` (scale and bias per input column, or per output row), and the codebooks' type: a float, or `s8`, signed bytes
that one float32 scale for each codebook (of each column group) turns into values; residual codebooks share the main
one's, and sums of two centroids are bytes again. Products of those are sums of integers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats.base import WIDE_DTYPES, WeightFormat
from lowbit.quantizers.formats.scaled import IntegerLevels

__all__ = ["Outliers", "VectorFormat"]

_MAX_DIM, _MAX_CENTROIDS = 16, 2**16
_MOST_SUMS = 256  # centroids whose products are worth a table
_BOOKS = {**WIDE_DTYPES, "s8": torch.int8}
"""Types of codebooks."""
_BYTE_LEVELS = IntegerLevels(tuple(range(-128, 128)), 0)
"""The integers of `s8` codebooks."""


@dataclass(frozen=True)
class Outliers:
    """Columns with a codebook of their own: `count` of them, or `percent` of all columns when count is 0."""

    dim: int
    centroids: int
    count: int = 0
    percent: int = 0

    def __str__(self) -> str:
        return f"o{self.count or f'{self.percent}p'}v{self.dim}k{self.centroids}"


@dataclass(frozen=True)
class VectorFormat(WeightFormat):
    """`dim`-dimensional vectors along the features of `axis`, one of `centroids` each; see the module's docstring.

    groups: column groups with own codebooks. norm: `col` (value * scale[column] + bias[column]), `row`, or `none`.
    table: type of codebooks and norms; norms beside codebooks of bytes (`s8`) are float16. axis: `out` or `in`; `in`
    has one group and no outliers.
    """

    dim: int
    centroids: int
    residual: int = 0
    groups: int = 1
    outliers: Outliers | None = None
    norm: Literal["none", "col", "row"] = "none"
    table: str = "f16"
    axis: Literal["out", "in"] = "out"

    def __post_init__(self) -> None:
        books = [("k", self.dim, self.centroids), *([("r", self.dim, self.residual)] if self.residual else [])]
        if self.outliers:
            books.append(("o", self.outliers.dim, self.outliers.centroids))
            if not (0 < self.outliers.percent < 100 or self.outliers.count > 0):
                raise FormatError("LB0215", "outliers must be a positive number of columns or 1 to 99 percent")
        for name, dim, size in books:
            if not 1 <= dim <= _MAX_DIM:
                raise FormatError("LB0215", f"vectors have 1 to {_MAX_DIM} elements, not {dim}")
            if not 2 <= size <= _MAX_CENTROIDS or size & (size - 1):
                raise FormatError("LB0215", f"{name}{size}: a codebook has a power of two of centroids, 2 to 65536")
        if self.groups < 1:
            raise FormatError("LB0215", f"column groups must be positive, not {self.groups}")
        if self.axis == "in" and self.ordered:
            raise FormatError(
                "LB0215",
                "vectors along the input have one codebook for all columns: no column groups, no outliers",
                hint="leave `in` out, or c and o",
            )
        if self.table not in _BOOKS:
            raise FormatError("LB0211", f"unknown codebook type {self.table!r}", hint="use " + ", ".join(_BOOKS))

    def __str__(self) -> str:
        parts = [f"vq.d{self.dim}.k{self.centroids}"]
        parts += [f"r{self.residual}"] if self.residual else []
        parts += ["in"] if self.axis == "in" else []
        parts += [f"c{self.groups}"] if self.groups > 1 else []
        parts += [str(self.outliers)] if self.outliers else []
        parts += [{"col": "cn", "row": "rn"}[self.norm]] if self.norm != "none" else []
        parts += [self.table] if self.table != "f16" else []
        return ".".join(parts)

    @property
    def scale_dtype(self) -> torch.dtype:
        """torch dtype of norms, and of codebooks that are not bytes."""
        return WIDE_DTYPES.get(self.table, torch.float16)

    @property
    def book_dtype(self) -> torch.dtype:
        """torch dtype of stored codebooks."""
        return _BOOKS[self.table]

    @property
    def scaled(self) -> bool:
        """True when codebooks have a scale: their elements are bytes."""
        return self.table == "s8"

    @property
    def integer_levels(self) -> IntegerLevels | None:
        """What elements of codebooks are, scales aside, where kernels multiply them as integers."""
        return _BYTE_LEVELS if self.scaled and self.axis == "out" else None

    @property
    def table_sums(self) -> bool:
        """True when a centroid's product with activations is the same in every row, and there are few centroids:
        kernels for few tokens then make tables of all products first, and look sums up."""
        return self.axis == "in" and max(self.centroids, self.residual) <= _MOST_SUMS

    @property
    def index_bits(self) -> int:
        """Bits of a main index."""
        return self.centroids.bit_length() - 1

    @property
    def residual_bits(self) -> int:
        """Bits of a residual index; 0 without a residual codebook."""
        return self.residual.bit_length() - 1 if self.residual else 0

    @property
    def ordered(self) -> bool:
        """True when columns are stored in an order of their own: needed to tell groups and outliers apart."""
        return self.groups > 1 or self.outliers is not None

    def partition(self, k: int) -> tuple[int, int]:
        """(outlier columns, columns per group) of a matrix with `k` columns, as in VPTQ's released code.

        Outliers come first in the stored order; columns that do not divide into groups join them.
        """
        if self.outliers is None:
            return (0, k // self.groups)
        outliers = self.outliers.count or math.ceil(self.outliers.percent * k / 100)
        outliers += (k - outliers) % self.groups if not self.outliers.count else 0
        return outliers, (k - outliers) // self.groups

    def vectors(self, n: int) -> int:
        """Rows of the matrix of indices of `n` rows: vectors a column is cut into, the last of which is padded, or
        (axis `in`) the rows themselves."""
        return n if self.axis == "in" else math.ceil(n / self.dim)

    def positions(self, columns: int) -> int:
        """Columns of the matrix of indices of so many columns: vectors a row is cut into, or the columns themselves."""
        return columns // self.dim if self.axis == "in" else columns

    def check(self, n: int, k: int, where: str) -> None:
        outliers, size = self.partition(k)
        if size < 1 or outliers + size * self.groups != k:
            raise FormatError(
                "LB0213",
                f"{self} does not divide {k} input columns into {self.groups} groups",
                where=where,
                hint="change the number of column groups or of outliers",
            )
        if self.ordered and k > 2**16:
            raise FormatError(
                "LB0213",
                f"{self} stores an order of columns in 16 bits, which {k} input columns do not fit",
                where=where,
                hint="use one column group and no outliers",
            )
        if self.axis == "in" and k % self.dim:
            text = f"{k} input columns do not divide into vectors of {self.dim}"
            raise FormatError("LB0213", text, where=where, hint="choose a shorter vector")
        if self.axis == "out" and self.dim > n:
            raise FormatError("LB0213", f"vectors of {self.dim} are longer than the {n} output rows", where=where)

    def bits_per_weight(self, n: int, k: int) -> float:
        """Bits on disk: index rows padded to 32-bit words, 16-bit outlier indices, codebooks, norms, permutation."""
        outliers, size = self.partition(k)
        width, scale = 8 * self.book_dtype.itemsize, 32 * self.scaled  # residual books share it
        words = math.ceil(self.positions(size) * (self.index_bits + self.residual_bits) / 32)
        bits = self.groups * self.vectors(n) * words * 32
        bits += self.groups * (self.dim * (self.centroids + self.residual) * width + scale)
        if self.outliers:
            bits += math.ceil(n / self.outliers.dim) * outliers * 16
            bits += self.outliers.dim * self.outliers.centroids * width + scale
        bits += 16 * k if self.ordered else 0
        bits += {"none": 0, "col": 2 * k, "row": 2 * n}[self.norm] * 8 * self.scale_dtype.itemsize
        return bits / (n * k)

    @staticmethod
    def parse(text: str) -> VectorFormat | None:
        """The format written as `text`, None when it is not a vector format's; FormatError (LB0210, LB0215)."""
        head, *parts = text.split(".")
        if head != "vq":
            return None
        values: dict[str, object] = {}
        for part in parts:
            values.update(_field(text, part))
        if "dim" not in values or "centroids" not in values:
            raise _unknown(text, "vector length and number of centroids are needed")
        return VectorFormat(**values)  # type: ignore[arg-type]


def _field(text: str, part: str) -> dict[str, object]:
    if m := re.fullmatch(r"([dkrc])(\d{1,6})", part):
        return {{"d": "dim", "k": "centroids", "r": "residual", "c": "groups"}[m[1]]: int(m[2])}
    if m := re.fullmatch(r"o(\d{1,6})(p?)v(\d{1,3})k(\d{1,6})", part):
        amount = {"percent" if m[2] else "count": int(m[1])}
        return {"outliers": Outliers(int(m[3]), int(m[4]), **amount)}
    if part in ("cn", "rn"):
        return {"norm": "col" if part == "cn" else "row"}
    if part == "in":
        return {"axis": part}
    if part in _BOOKS:
        return {"table": part}
    raise _unknown(text, f"{part!r} is no part of a vector format")


def _unknown(text: str, why: str) -> FormatError:
    return FormatError(
        "LB0210",
        f"cannot read format {text!r}: {why}",
        hint="write vq.d<length>.k<centroids>, such as vq.d4.k256 or vq.d8.k256.r256; `quantize formats` explains it",
    )
