"""The fixed numbers of one kernel that multiplies codebooks of bytes with activations of int8 digits."""

from __future__ import annotations

import math
from functools import cached_property
from itertools import pairwise

from lowbit.codegen.cpp.input_plan import input_plan
from lowbit.codegen.cpp.machines import VBMI_ARCHES
from lowbit.codegen.cpp.plan import PANEL, align
from lowbit.codegen.cpp.vector_plan import TILE, Book, Part, VectorPlan, lanes_of
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import CHUNK_BLOCKS, KernelSpec

__all__ = ["BLOCK", "PERMUTED", "BytesPlan", "byte_entries", "pair_bytes", "table_bytes", "vector_plan"]

BLOCK = 64
"""Bytes of a vector register: one column of 4 to 16 vectors, whose rows are padded to 4, 8 or 16 bytes."""

PERMUTED = {"avx512bf16": 256, "avx512vbmi": 256, "avx512vnni": 256, "avx512": 256, "avx2vnni": 64, "avx2": 64}
"""The most centroids that permutes of registers look up, by instruction set (`pair_of` in `text/bytes_*.h`)."""


def pair_bytes(book: Book) -> int:
    """Bytes of two coordinates of all centroids in the tables that permutes read."""
    return 2 * align(book.size)


def table_bytes(book: Book) -> int:
    """Bytes of the tables of one codebook: pairs of coordinates, the last of which may be half empty."""
    return math.ceil(book.dim / 2) * pair_bytes(book)


def byte_entries(arch: str) -> int:
    """The most entries of a table of bytes; those of larger tables are words, of two coordinates."""
    return 256 if arch in VBMI_ARCHES else 64


def vector_plan(spec: KernelSpec, schedule: Schedule) -> VectorPlan:
    """The plan of a kernel of a vector format."""
    if spec.vector and spec.vector.axis == "in":
        return input_plan(spec, schedule)
    return BytesPlan(spec, schedule) if spec.limbs else VectorPlan(spec, schedule)


class BytesPlan(VectorPlan):
    """Sizes of a kernel whose products are of bytes.

    A *block* is the vectors whose centroids fill 64 bytes: a pass of a direct kernel, and four panels of 16 padded rows
    of a buffered one. Main and residual centroids are added as bytes, which share a scale; parts' sums meet as floats.

    Parts with small codebooks may be *permuted*: a block then is 16 vectors, whose centroids are looked up coordinate
    by coordinate in tables (`text/bytes_permute.h`), and every coordinate is a panel. Schedule fields, besides those of
    every kernel: extra `permute`: the most centroids of codebooks that are looked up so, 0 for none. tile_n of direct
    kernels: 16 rows for each coordinate that a permuted part sums up at a time, in pairs, which may share a lookup.
    extra `words`: 1 to multiply 16-bit numbers, half as many at once, for instruction sets without dot products of
    bytes above 127.
    """

    @property
    def words(self) -> bool:
        """True when products are of 16-bit numbers instead of bytes."""
        return bool(self.schedule.get("words", 0))

    @property
    def item(self) -> str:
        """C++ type of prepared activations."""
        return "int16_t" if self.words else "int8_t"

    @property
    def digits(self) -> int:
        """Digits of an activation, the high one first."""
        return 1 if self.words else self.spec.limbs

    @property
    def permute(self) -> int:
        """The most centroids that are looked up by permutes."""
        return self.schedule.get("permute", 0)

    def permuted(self, part: Part) -> bool:
        """Whether a part's centroids are looked up by permutes: both codebooks', whose sums share an order."""
        return all(book.size <= self.permute for book in part.books)

    @property
    def permutes(self) -> bool:
        """Whether any part is permuted."""
        return any(self.permuted(part) for part in self.parts)

    def _block(self, dim: int, centroids: int) -> int:
        """Vectors of a block of a part whose largest codebook has so many centroids."""
        return PANEL if centroids <= self.permute else BLOCK // lanes_of(dim)

    def many(self, part: Part) -> int:
        return self._block(part.dim, max(book.size for book in part.books))

    def operands(self, part: Part) -> int:
        """Operands of byte dot products that a step of four columns of a block makes, and panels of a block: of a
        coordinate each, or of padded centroids."""
        return part.dim if self.permuted(part) else BLOCK // PANEL

    def sweeps(self, part: Part) -> tuple[range, ...]:
        """The operands that a direct kernel sums up at a time: as even as possible, permuted ones in pairs."""
        total = self.operands(part)
        if not self.permuted(part):
            return (range(total),)
        most = math.ceil(total / 2) if self.np >= total else max(1, self.np // 2)
        return tuple(range(2 * a, min(2 * b, total)) for a, b in pairwise(_even(math.ceil(total / 2), most)))

    def copy_bytes(self, book: Book) -> int:
        permuted = any(book in part.books and self.permuted(part) for part in self.parts)
        return book.count * table_bytes(book) if permuted else 0

    @cached_property
    def unit_rows(self) -> int:
        """Rows of one unit of work in one segment: whole tiles and whole blocks of every part."""
        fmt, o = self.fmt, self.fmt.outliers
        books = [(fmt.dim, max(fmt.centroids, fmt.residual)), *([(o.dim, o.centroids)] if o else [])]
        return math.lcm(*(dim * max(TILE, self._block(dim, size)) for dim, size in books))

    @cached_property
    def chunk_cols(self) -> int:
        """Columns of one chunk of activations, as many as those of scalar formats."""
        outliers, size = self.fmt.partition(self.spec.k)
        return min(CHUNK_BLOCKS * 32, math.ceil(max(size, outliers) / 16) * 16)

    def blocks(self, part: Part) -> int:
        """Blocks of one unit of one segment."""
        return part.per_unit // self.many(part)

    def part_panels(self, part: Part) -> int:
        """Panels of one unit, of padded rows or of coordinates, up rows after gate rows."""
        return self.blocks(part) * self.pair * self.operands(part)

    def split(self, part: Part) -> tuple[int, ...]:
        """Register tiles that the panels of one segment are split into."""
        return tuple(b - a for a, b in pairwise(_even(self.part_panels(part) // self.pair, self.np)))

    @property
    def token_stride(self) -> int:
        return self.digits * self.chunk_cols

    @property
    def token_bytes(self) -> int:
        """Digits, then scale, starting value and sum of every chunk, then what norms add."""
        return self.chunks * (self.token_stride * (1 + self.words) + 12) + 4

    @property
    def code_bytes(self) -> int:
        """Scratch bytes of one decoded chunk of one unit."""
        return max(self.part_panels(p) for p in self.parts) * PANEL * self.chunk_cols * (1 + self.words)

    def sums_at(self, part: Part) -> int:
        """Where the part's sums begin, in floats of one token times tokens."""
        return sum(self.part_panels(p) * PANEL for p in self.parts if p.chunk < part.chunk) * self.tokens

    @property
    def sum_bytes(self) -> int:
        """Scratch bytes of the sums of one unit, and of one token's finished rows."""
        if self.buffered:
            sums = sum(self.part_panels(p) for p in self.parts) * PANEL * self.tokens
            return align((sums + self.pair * self.row_stride) * 4)
        return align(self.pair * self.tile_m * self.row_stride * 4)


def _even(total: int, most: int) -> list[int]:
    """0, then the ends of as few and as even pieces of `total` as there can be with at most `most` in each."""
    count = math.ceil(total / most)
    return [total * i // count for i in range(count + 1)]
