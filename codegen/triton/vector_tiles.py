"""Tile arithmetic of kernels for vector formats.

An output tile covers `tile_n` accumulator rows: `vectors` rows of vectors with `lanes` elements each, where `lanes` is
the vector length rounded up to a power of two. Tiles never cross segments, because segments have codebooks of their
own. A step covers `tile_k` main columns; outlier columns, whose vectors have another length, follow in a second loop.

Vectors along the input lie the other way: accumulator rows are output columns, and a step's `tile_k` columns are
`positions` vectors with `lanes` elements each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.quantizers.formats import VectorFormat

__all__ = ["PIECE", "VectorTiles", "power_of_two", "vector_tiles_of"]

PIECE = 512
"""Columns one program of the kernel that prepares activations covers."""

_OUTLIER_STEP = 32


def power_of_two(value: int) -> int:
    """The smallest power of two that is not less than `value`."""
    return 1 << (value - 1).bit_length()


@dataclass(frozen=True)
class VectorTiles:
    """The tile arithmetic of one (spec of a vector format, schedule)."""

    spec: KernelSpec
    schedule: Schedule

    @cached_property
    def fmt(self) -> VectorFormat:
        """The weight format."""
        assert self.spec.vector is not None
        return self.spec.vector

    @cached_property
    def gemv(self) -> bool:
        """Without matrix instructions."""
        return bool(self.schedule.get("gemv", 0))

    @cached_property
    def lanes(self) -> int:
        """Elements of a vector, rounded up to a power of two."""
        return power_of_two(self.fmt.dim)

    @cached_property
    def rowwise(self) -> bool:
        """Whether vectors run along the input."""
        return self.fmt.axis == "in"

    @cached_property
    def height(self) -> int:
        """Output columns of a vector."""
        return 1 if self.rowwise else self.fmt.dim

    @cached_property
    def vectors(self) -> int:
        """Rows of vectors in a tile."""
        return self.schedule.tile_n if self.rowwise else max(self.schedule.tile_n // self.lanes, 1)

    @cached_property
    def positions(self) -> int:
        """Columns of indices in a step."""
        return max(self.schedule.tile_k // self.lanes, 1) if self.rowwise else self.schedule.tile_k

    @cached_property
    def outputs(self) -> int:
        """Output columns a tile computes: its accumulator rows without padded lanes."""
        return self.vectors * self.height

    @cached_property
    def outliers(self) -> int:
        """Outlier columns; they come first in the stored order."""
        return self.fmt.partition(self.spec.k)[0]

    @cached_property
    def columns(self) -> int:
        """Main columns."""
        return self.spec.k - self.outliers

    @cached_property
    def group_columns(self) -> int:
        """Main columns that share a codebook."""
        return self.fmt.partition(self.spec.k)[1]

    @cached_property
    def step_columns(self) -> int:
        """Main columns a step covers: without padded lanes."""
        return self.positions * self.fmt.dim if self.rowwise else self.schedule.tile_k

    @cached_property
    def steps(self) -> int:
        """Steps that cover the main columns."""
        return -(-self.columns // self.step_columns)

    @cached_property
    def outlier_step(self) -> int:
        """Outlier columns one step covers: matrix instructions need 16."""
        return min(max(power_of_two(self.outliers), 16), _OUTLIER_STEP)

    @cached_property
    def accumulators(self) -> tuple[int, ...]:
        """Output tiles held at once: two for a gated MLP."""
        return (0, 1) if "silu_mul" in self.spec.epilogue else (0,)

    @cached_property
    def n_acc(self) -> int:
        """Columns of the output."""
        return self.spec.n_out

    @cached_property
    def tiled(self) -> tuple[int, ...]:
        """Segments that tiles walk through: of a gated MLP the first stands for both."""
        return self.spec.segments[:1] if len(self.accumulators) > 1 else self.spec.segments

    @cached_property
    def first_tiles(self) -> tuple[int, ...]:
        """The first tile of every walked segment, and the number of tiles."""
        return tuple(accumulate((-(-n // self.outputs) for n in self.tiled), initial=0))

    @cached_property
    def n_tiles(self) -> int:
        """Tiles that cover the output's columns."""
        return self.first_tiles[-1]

    def first_vectors(self, dim: int) -> tuple[int, ...]:
        """The first row of vectors with `dim` elements of every segment, and their number."""
        return tuple(accumulate((-(-n // dim) for n in self.spec.segments), initial=0))

    @cached_property
    def column_mask(self) -> bool:
        """Whether the last step has columns beyond the matrix, or every step padded lanes."""
        return self.columns % self.step_columns != 0 or self.step_columns != self.schedule.tile_k

    @cached_property
    def prepared(self) -> bool:
        """Whether activations are reordered, scaled and summed by a kernel of their own; without matrix instructions
        there are too few of them to be worth a launch."""
        return not self.gemv and (self.fmt.ordered or self.fmt.norm != "none")

    @cached_property
    def pieces(self) -> int:
        """Programs per token of the kernel that prepares activations."""
        return -(-self.spec.k // PIECE)

    def book_size(self, name: str) -> int:
        """Elements of one segment's and group's codebook."""
        o = self.fmt.outliers
        outlier = o.dim * o.centroids if o else 0
        return {
            "book": self.fmt.dim * self.fmt.centroids,
            "residual_book": self.fmt.dim * self.fmt.residual,
            "outlier_book": outlier,
        }[name]


@lru_cache(maxsize=4096)
def vector_tiles_of(spec: KernelSpec, schedule: Schedule) -> VectorTiles:
    """`VectorTiles(spec, schedule)`, remembered."""
    return VectorTiles(spec, schedule)
