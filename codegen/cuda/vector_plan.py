"""The arithmetic of kernels for vector formats: rows of vectors, runs of columns, codebooks in shared memory.

A *tile* is eight rows of vectors, whose indices lie together column by column (layout `vectors8`). A *unit* is a tile
by a run of columns of one column group; a warp takes a unit at once, and warps of a thread block take turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.quantizers.formats import VectorFormat

__all__ = ["VectorPlan"]

_STEP = 16  # places along the depth of a matrix instruction


@dataclass(frozen=True)
class VectorPlan:
    """See the module's docstring. Schedule: tile_m tokens, warps. Extra: `resident` thread blocks a multiprocessor
    holds; `far`: the main codebook stays in memory."""

    spec: KernelSpec
    schedule: Schedule

    prepared = True
    warpgroup = False
    reads_rows = False
    operand_bits = 16

    @cached_property
    def fmt(self) -> VectorFormat:
        """The weight format."""
        assert self.spec.vector is not None
        return self.spec.vector

    @property
    def phases(self) -> int:
        """Vectors that share eight rows of an operand."""
        return 8 // self.fmt.dim if 8 % self.fmt.dim == 0 else 1

    @property
    def vector_rows(self) -> int:
        """Rows of operands that a vector takes."""
        return 16 if self.fmt.dim > 8 else 8 // self.phases

    @property
    def tile_rows(self) -> int:
        """Rows of operands of a tile."""
        return 8 * self.vector_rows

    @property
    def row_tiles(self) -> int:
        """Tiles of a set: gate and up where they are multiplied."""
        return 2 if "silu_mul" in self.spec.epilogue else 1

    @property
    def tiles(self) -> int:
        """Tiles of the packed matrix."""
        return self.spec.rows // 8

    @property
    def tile_sets(self) -> int:
        """Sets of tiles."""
        return self.tiles // self.row_tiles

    @property
    def index_bytes(self) -> int:
        """Bytes of a main index."""
        return 1 if self.fmt.index_bits <= 8 else 2

    @property
    def residual_bytes(self) -> int:
        """Bytes of a residual index; 0 without."""
        return 0 if not self.fmt.residual else 1 if self.fmt.residual_bits <= 8 else 2

    @property
    def unit_steps(self) -> int:
        """Matrix instructions along a unit: the fewer the more registers a column's indices take."""
        return 8 if self.index_bytes + self.residual_bytes == 1 and not self.far else 4

    @property
    def run(self) -> int:
        """Columns of a unit."""
        return self.unit_steps * _STEP // self.phases

    @cached_property
    def outliers(self) -> int:
        """Outlier columns, which come first."""
        return self.fmt.partition(self.spec.k)[0]

    @property
    def outlier_pad(self) -> int:
        """Packed columns of activations for outliers."""
        return -(-self.outliers // _STEP) * _STEP

    @cached_property
    def group_columns(self) -> int:
        """Columns of a column group."""
        return self.fmt.partition(self.spec.k)[1]

    @property
    def group_units(self) -> int:
        """Units of a column group."""
        return math.ceil(self.group_columns / self.run)

    @property
    def x_columns(self) -> int:
        """Columns of prepared activations, every group padded to whole units."""
        return self.outlier_pad + self.fmt.groups * self.group_units * self.run

    @property
    def tile_units(self) -> int:
        """Units of a tile."""
        return self.fmt.groups * self.group_units

    @property
    def units_per_set(self) -> int:
        """Units of a set of tiles."""
        return self.tile_units * self.row_tiles

    @property
    def units(self) -> int:
        """Units of the whole matrix."""
        return self.tile_sets * self.units_per_set

    @property
    def far(self) -> bool:
        """Whether the main codebook is gathered from memory."""
        return bool(self.schedule.get("far", 0))

    @property
    def book_bytes(self) -> int:
        """Shared memory for the main codebooks of a segment: a centroid takes a row of 16 bytes for every phase."""
        return 0 if self.far else self._rows(self.fmt.centroids)

    @property
    def residual_book_bytes(self) -> int:
        """The same for the residual ones."""
        return self._rows(self.fmt.residual)

    def _rows(self, centroids: int) -> int:
        return self.fmt.groups * centroids * 16 * (2 if self.fmt.dim > 8 else self.phases)

    @property
    def ring_bytes(self) -> int:
        """Codebooks, and where they are far, rows of two units for every warp."""
        rows = 2 * self.unit_steps * (self.tile_rows // 16) * 512 * self.schedule.warps if self.far else 0
        return self.book_bytes + self.residual_book_bytes + rows

    @property
    def reduce_stride(self) -> int:
        """Floats between two tokens' sums."""
        return self.row_tiles * self.tile_rows + 4

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block."""
        return self.ring_bytes + self.schedule.warps * self.schedule.tile_m * self.reduce_stride * 4 + 128 + 16

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.schedule.warps * 32

    def token_blocks(self, tokens: int) -> int:
        """Tiles along the tokens."""
        return math.ceil(tokens / self.schedule.tile_m)

    def grid(self, multiprocessors: int, tokens: int) -> tuple[int, int]:
        """Thread blocks along the matrix, as many as run at once or one a unit, and along the tokens."""
        return max(1, min(self.units, self.schedule.get("resident", 1) * multiprocessors)), self.token_blocks(tokens)

    def part_floats(self, grid: tuple[int, int], tokens: int) -> int:
        """float32 of workspace for partial sums: two sets of tiles for every thread block."""
        return grid[0] * grid[1] * 2 * self.schedule.tile_m * self.row_tiles * self.tile_rows

    def counts(self, grid: tuple[int, int], tokens: int) -> int:
        """Arrival counters: one for every set and token tile."""
        return self.tile_sets * self.token_blocks(tokens)

    def x_bytes(self, tokens: int) -> tuple[int, int]:
        """Bytes of prepared activations; of the power of two and the sum of every token."""
        return tokens * self.x_columns * 2, tokens * 8
