"""The fixed numbers of one kernel of vectors along the input."""

from __future__ import annotations

import math
from functools import cached_property

from lowbit.codegen.cpp.plan import PANEL, align
from lowbit.codegen.cpp.vector_plan import Book, Part, VectorPlan, vector_book
from lowbit.codegen.decode import vector_program
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec

__all__ = ["ROWS", "SUMLESS", "TOGETHER", "InputPlan", "SumsPlan", "entries", "input_plan", "looks_sums_up"]

ROWS = 64
"""Rows whose indices lie together: the layout's tile."""
TOGETHER = 4
"""Looked up sums that are added up as 16-bit words; tables are scaled so that these fit."""
SUMLESS = ("avx2vnni", "avx2")
"""Instruction sets that do not look sums up: without permutes of words that takes two loads each, and loading a
centroid and multiplying it with as many activations takes no more."""
_COLUMNS = 128  # of a chunk of activations, which tables share a scale in
_ROW_COLUMNS = 1024  # of a chunk of kernels that decode some rows at a time
_BLOCK_BYTES = 1 << 14
"""Bytes of tables that a thread uses for all of its rows before it goes on: they stay in the first-level cache."""


def input_plan(spec: KernelSpec, schedule: Schedule) -> InputPlan:
    """The plan of a kernel of vectors along the input."""
    return SumsPlan(spec, schedule) if schedule.get("sums", 0) else InputPlan(spec, schedule)


def looks_sums_up(spec: KernelSpec) -> bool:
    """Whether kernels of a spec may look sums of products up: in 16 bits, of few centroids."""
    return spec.table_sums and spec.compute == "int16"


def entries(book: Book) -> int:
    """Entries of a table of sums: whole vectors of words."""
    return max(32, book.size)


class InputPlan(VectorPlan):
    """Sizes of a kernel that decodes vectors along the input: to panels, as those along the output are, or `vectors`
    rows at a time for few tokens.

    A vector is of one row, so a unit of work is whole tiles of 64 rows, and a chunk of activations whole vectors.
    """

    @cached_property
    def unit_rows(self) -> int:
        return ROWS * max(1, self.schedule.tile_n // self.pair // ROWS)

    @cached_property
    def chunk_cols(self) -> int:
        """Columns of one chunk of activations: whole vectors, and so many that a decoded chunk, or the indices of 64
        rows, take up to 16 KiB."""
        dim = self.fmt.dim
        most = max(32, 4096 // (self.panels * PANEL) // 16 * 16) if self.buffered else _ROW_COLUMNS
        return max(1, min(most, self.spec.k) // dim) * dim

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        fmt, spec = self.fmt, self.spec
        books = [vector_book(spec, "book", "index", fmt.centroids, fmt.dim, 1)]
        if fmt.residual:
            books.append(vector_book(spec, "residual_book", "residual_index", fmt.residual, fmt.dim, 1))
        chunks = math.ceil(spec.k / self.chunk_cols)
        tiles = tuple(math.ceil(n / ROWS) for n in spec.segments)
        columns, program, rows = spec.k // fmt.dim, vector_program(fmt), self.unit_rows
        return (Part("main", fmt.dim, columns, 1, tuple(books), program, 8, rows, tiles, 0, chunks, fmt.dim),)

    @property
    def part(self) -> Part:
        """All columns."""
        return self.parts[0]

    @property
    def tile(self) -> int:
        return ROWS

    def per_call(self, part: Part) -> int:
        return ROWS


class SumsPlan(InputPlan):
    """Sizes of a kernel that looks sums of products up, for few tokens.

    What a centroid gives with a vector of activations is the same in all rows, so a call first makes tables of these
    products, one for every vector of activations and codebook, and then only adds up entries: the weights' indices are
    never decoded. After "T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge" (Wei et al.), with
    whole codebooks in place of a few low bits. tile_m: tokens that share a pass over the indices. tile_n: rows that
    share a load of a table.
    """

    @property
    def buffered(self) -> bool:
        return False

    @cached_property
    def heights(self) -> tuple[int, ...]:
        return (1,)

    @cached_property
    def chunk_cols(self) -> int:
        dim = self.fmt.dim
        return max(1, min(_COLUMNS, self.spec.k) // dim) * dim

    @property
    def pass_tiles(self) -> int:
        """Tiles of rows of one unit."""
        return self.unit_rows // ROWS

    @property
    def steps(self) -> int:
        """Vectors of activations whose entries are added up as words."""
        return max(1, TOGETHER // len(self.part.books))

    @property
    def step_entries(self) -> int:
        """Entries of all tables of one vector of activations."""
        return sum(entries(book) for book in self.part.books)

    @property
    def chunk_entries(self) -> int:
        """Entries of all tables of one chunk of activations."""
        return self.step_entries * (self.chunk_cols // self.fmt.dim)

    @property
    def block_chunks(self) -> int:
        """Chunks of activations that a thread uses for all of its rows before it goes on."""
        return max(1, _BLOCK_BYTES // (2 * self.chunk_entries * self.tile_m))

    def copy_bytes(self, book: Book) -> int:
        return align(book.count * book.dim * entries(book) * 4)

    @property
    def table_slots(self) -> int:
        """Chunks' tables of a tile of tokens that there is room for: those of two blocks."""
        return 2 * len(self.spec.segments) * self.tile_m * min(self.block_chunks, self.chunks)

    @property
    def table_bytes(self) -> int:
        """Bytes of these tables (of floats at most), and of the scales of their chunks."""
        return align(self.table_slots * 4) + align(self.table_slots * self.chunk_entries * 4)

    @property
    def shared_bytes(self) -> int:
        return super().shared_bytes + self.table_bytes

    @property
    def sum_floats(self) -> int:
        """Sums of all rows of a tile of tokens."""
        return sum(self.units) * self.pair * self.unit_rows * self.tile_m

    @property
    def sum_bytes(self) -> int:
        """Scratch bytes of these, and of one chunk's tables as floats."""
        return align((self.sum_floats + self.chunk_entries) * 4)
