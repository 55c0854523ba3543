"""The fixed numbers of one kernel of a vector format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from lowbit.codegen.cpp.plan import PANEL, KernelPlan, align
from lowbit.codegen.decode import outlier_program, vector_program
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.program import Program
from lowbit.quantizers.formats import VectorFormat
from lowbit.quantizers.vqtensor import byte_of_zero, scale_of

__all__ = ["TILE", "Book", "Part", "VectorPlan", "lanes_of", "vector_book"]

TILE = 8
"""Vectors of one column that lie together."""
_WIDE_BYTES = 1 << 19
"""Codebooks up to this size are widened to float32 at the start of a call."""


@dataclass(frozen=True)
class Book:
    """One codebook operand: `size` centroids of `dim` elements, `count` of them (segments x groups), and its index.

    lanes: floats of the vector that holds a centroid. wide: kept as float32 rows of `lanes` in scratch memory.
    item_bytes: of a stored element; bytes have scales, the operand `scale`, and exceed levels by `zero`.
    """

    name: str
    index: str
    size: int
    dim: int
    count: int
    lanes: int
    wide: bool
    item_bytes: int
    scale: str = ""
    zero: int = 0

    @property
    def index_bits(self) -> int:
        """Bits of an index in memory."""
        return 8 if self.size <= 256 else 16

    @property
    def index_type(self) -> str:
        """C++ type of an index."""
        return f"uint{self.index_bits}_t"

    @property
    def row_bytes(self) -> int:
        """Bytes from one centroid to the next where lookups read them."""
        return self.lanes * 4 if self.wide else self.stored_row * self.item_bytes

    @property
    def stored_row(self) -> int:
        """Elements from one centroid to the next in the operand: bytes are padded to whole vectors."""
        return self.lanes if self.item_bytes == 1 else self.dim

    @property
    def wide_bytes(self) -> int:
        """Bytes of the widened copies."""
        return align(self.count * self.size * self.lanes * 4) if self.wide else 0


@dataclass(frozen=True)
class Part:
    """The main columns or the outlier columns: vectors of `dim` rows, looked up in `books` by `program`.

    columns: of the part's indices; span: columns of activations that an index stands for. groups: column groups, each
    with books of its own. batch: vectors that are decoded together and lie in one tile; per_unit: vectors of one unit
    of work; tiles: tiles of each segment. chunk: index of the part's first chunk of activations; group_chunks: chunks
    of one group.
    """

    name: str
    dim: int
    columns: int
    groups: int
    books: tuple[Book, ...]
    program: Program
    batch: int
    per_unit: int
    tiles: tuple[int, ...]
    chunk: int
    group_chunks: int
    span: int = 1

    @property
    def lanes(self) -> int:
        """Floats of the vector that holds a centroid."""
        return lanes_of(self.dim)

    @property
    def group_size(self) -> int:
        """Columns of activations of one group."""
        return self.columns * self.span // self.groups


@dataclass(frozen=True)
class VectorPlan(KernelPlan):
    """Sizes of one kernel of a vector format. Schedule fields it reads, besides those of every kernel:

    extra `vectors`: vectors whose sums a direct kernel keeps in registers at a time, a power of two up to 8.
    extra `prefetch`: bytes ahead of which indices are fetched, 1024 without it; kernels of floats do not fetch.
    A unit of work is the fewest whole tiles (of 8 vectors) whose rows are also whole outlier vectors.
    """

    def __post_init__(self) -> None:
        if self.tile_m < 1 or self.np < 1 or self.vectors not in (1, 2, 4, 8):
            raise KernelError("LB0412", f"no C++ kernel has tiles of {self.tile_m} x {self.schedule.tile_n}")

    @property
    def fmt(self) -> VectorFormat:
        """The weight format."""
        assert self.spec.vector is not None
        return self.spec.vector

    @property
    def vectors(self) -> int:
        """Vectors of one pass of a direct kernel."""
        return self.schedule.get("vectors", TILE)

    @property
    def prefetch(self) -> int:
        """Bytes ahead of which indices are fetched."""
        return self.schedule.get("prefetch", 1024)

    @property
    def pair(self) -> int:
        """Segments that a unit of work reads: gate and up, or one."""
        return 2 if self.silu else 1

    @property
    def tile(self) -> int:
        """Vectors whose indices lie together."""
        return TILE

    def many(self, part: Part) -> int:
        """Vectors of `part` that one pass of a direct kernel takes."""
        return min(self.vectors, part.batch)

    def per_call(self, part: Part) -> int:
        """Vectors of `part` that one call of a direct kernel's function takes: of one pass, or of several."""
        return self.many(part)

    @cached_property
    def unit_rows(self) -> int:
        """Rows of one unit of work in one segment; panels of 16 for buffered kernels."""
        outlier = self.fmt.outliers.dim if self.fmt.outliers else 1
        base = math.lcm(TILE * self.fmt.dim, outlier, PANEL if self.buffered else 1)
        return base * (max(1, self.schedule.tile_n // self.pair // base) if self.buffered else 1)

    @cached_property
    def units(self) -> tuple[int, ...]:
        """Units of each segment that are counted: the gate's alone with silu_mul."""
        segments = self.spec.segments[: 1 if self.silu else None]
        return tuple(math.ceil(n / self.unit_rows) for n in segments)

    @property
    def row_stride(self) -> int:
        """Floats of one token's sums of one unit; a vector may be stored whole at the very end."""
        return self.unit_rows + PANEL

    @property
    def panels(self) -> int:
        """Panels of a buffered unit, up rows after gate rows."""
        return self.unit_rows * self.pair // PANEL

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Register tiles the panels of a unit are split into, as even as possible."""
        parts = math.ceil(self.panels / self.np)
        return tuple(self.panels * (i + 1) // parts - self.panels * i // parts for i in range(parts))

    @cached_property
    def chunk_cols(self) -> int:
        """Columns of one chunk of activations: for buffered kernels so many that a decoded chunk takes 16 KiB,
        which leaves codebooks some of the first-level cache."""
        outliers, size = self.fmt.partition(self.spec.k)
        most = max(32, 4096 // (self.panels * PANEL) // 16 * 16) if self.buffered else 1024
        return min(most, math.ceil(max(size, outliers) / 16) * 16)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Outlier columns if there are any, then main columns."""
        fmt, spec, found, chunk = self.fmt, self.spec, [], 0
        outliers, size = fmt.partition(spec.k)
        if o := fmt.outliers:
            book = vector_book(spec, "outlier_book", "outlier_index", o.centroids, o.dim, 1)
            chunk = math.ceil(outliers / self.chunk_cols)
            found.append(self._part("outlier", o.dim, outliers, 1, (book,), outlier_program(), 0, chunk))
        books = [vector_book(spec, "book", "index", fmt.centroids, fmt.dim, fmt.groups)]
        if fmt.residual:
            books.append(vector_book(spec, "residual_book", "residual_index", fmt.residual, fmt.dim, fmt.groups))
        chunks = math.ceil(size / self.chunk_cols)
        columns = size * fmt.groups
        found.append(self._part("main", fmt.dim, columns, fmt.groups, tuple(books), vector_program(fmt), chunk, chunks))
        return tuple(p for p in found if p.columns)

    def _part(
        self,
        name: str,
        dim: int,
        columns: int,
        groups: int,
        books: tuple[Book, ...],
        program: Program,
        chunk: int,
        group_chunks: int,
    ) -> Part:
        per_unit = self.unit_rows // dim
        tiles = tuple(math.ceil(math.ceil(n / dim) / TILE) for n in self.spec.segments)
        batch = math.gcd(TILE, per_unit)
        return Part(name, dim, columns, groups, books, program, batch, per_unit, tiles, chunk, group_chunks)

    @property
    def chunks(self) -> int:
        """Chunks of activations of all parts."""
        return sum(p.groups * p.group_chunks for p in self.parts)

    @property
    def books(self) -> tuple[Book, ...]:
        """All codebooks."""
        return tuple(b for p in self.parts for b in p.books)

    @property
    def token_stride(self) -> int:
        return self.chunk_cols

    def copy_bytes(self, book: Book) -> int:
        """Scratch bytes of what a call makes of a codebook first; 0 where kernels read it as it is."""
        return book.wide_bytes

    @property
    def shared_bytes(self) -> int:
        return sum(self.copy_bytes(b) for b in self.books)

    @property
    def token_bytes(self) -> int:
        return self.chunks * self.token_stride * 4 + 4

    @property
    def row_bytes(self) -> int:
        return align(self.spec.k * 4)

    @property
    def code_bytes(self) -> int:
        """Scratch bytes of one decoded chunk of one unit."""
        return self.panels * PANEL * self.chunk_cols * 4 + 64

    @property
    def sum_bytes(self) -> int:
        """Scratch bytes of the sums of one unit."""
        if self.buffered:
            return self.tokens * self.panels * PANEL * 4
        return align(self.pair * self.tile_m * self.row_stride * 4)

    @property
    def thread_bytes(self) -> int:
        return self.row_bytes + (self.code_bytes if self.buffered else 0) + self.sum_bytes


def lanes_of(dim: int) -> int:
    """Elements of the padded row that a centroid takes."""
    return 4 if dim <= 4 else 8 if dim <= 8 else 16


def vector_book(spec: KernelSpec, name: str, index: str, size: int, dim: int, groups: int) -> Book:
    """The codebook operand `name` of a spec, read by `index`, with `groups` codebooks of `size` centroids a segment."""
    lanes, count = lanes_of(dim), len(spec.segments) * groups
    if spec.scale_dtype == "u8":
        # Bytes are multiplied as such, or widened for products of floats.
        return Book(name, index, size, dim, count, lanes, not spec.limbs, 1, scale_of(name), byte_of_zero(name))
    # float32 books of whole vectors are read as they are; wide copies must pay for themselves within a call.
    stored = spec.scale_dtype == "f32" and dim == lanes
    small = size * lanes * 4 <= _WIDE_BYTES and count * size * 8 <= sum(spec.segments) // dim * spec.k
    item_bytes = 2 if spec.scale_dtype == "f16" else 4
    return Book(name, index, size, dim, count, lanes, small and not stored, item_bytes)
