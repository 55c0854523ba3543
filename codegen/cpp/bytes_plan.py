"""The fixed numbers of one kernel that multiplies codebooks of bytes with activations of int8 digits."""

from __future__ import annotations

import math
from functools import cached_property

from lowbit.codegen.cpp.plan import PANEL, align
from lowbit.codegen.cpp.vector_plan import TILE, Part, VectorPlan
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import CHUNK_BLOCKS, KernelSpec

__all__ = ["BLOCK", "BytesPlan", "vector_plan"]

BLOCK = 64
"""Bytes of a vector register: one column of 4 to 16 vectors, whose rows are padded to 4, 8 or 16 bytes."""


def vector_plan(spec: KernelSpec, schedule: Schedule) -> VectorPlan:
    """The plan of a kernel of a vector format."""
    return BytesPlan(spec, schedule) if spec.limbs else VectorPlan(spec, schedule)


class BytesPlan(VectorPlan):
    """Sizes of a kernel whose products are of bytes.

    A *block* is the vectors whose centroids fill 64 bytes: a pass of a direct kernel, and four panels of 16 padded rows
    of a buffered one. Each codebook is a pass of its own, because each has a scale; parts' sums meet as floats.
    """

    @property
    def digits(self) -> int:
        """int8 digits of an activation, the high one first."""
        return self.spec.limbs

    def many(self, part: Part) -> int:
        return BLOCK // part.lanes

    @cached_property
    def unit_rows(self) -> int:
        """Rows of one unit of work in one segment: whole tiles and whole blocks of every part."""
        dims = [self.fmt.dim, *([self.fmt.outliers.dim] if self.fmt.outliers else [])]
        return math.lcm(*(dim * (2 * TILE if dim <= 4 else TILE) for dim in dims))

    @cached_property
    def chunk_cols(self) -> int:
        """Columns of one chunk of activations, as many as those of scalar formats."""
        outliers, size = self.fmt.partition(self.spec.k)
        return min(CHUNK_BLOCKS * 32, math.ceil(max(size, outliers) / 16) * 16)

    def blocks(self, part: Part) -> int:
        """Blocks of one unit of one segment."""
        return part.per_unit // self.many(part)

    def part_panels(self, part: Part) -> int:
        """Panels of padded rows of one unit, up rows after gate rows."""
        return self.blocks(part) * self.pair * BLOCK // PANEL

    def split(self, part: Part) -> tuple[int, ...]:
        """Register tiles that the panels of one segment are split into."""
        panels = self.part_panels(part) // self.pair
        count = math.ceil(panels / self.np)
        return tuple(panels * (i + 1) // count - panels * i // count for i in range(count))

    @property
    def token_stride(self) -> int:
        return self.digits * self.chunk_cols

    @property
    def token_bytes(self) -> int:
        """Digits, then scale, starting value and sum of every chunk, then what norms add."""
        return self.chunks * (self.token_stride + 12) + 4

    @property
    def code_bytes(self) -> int:
        """Scratch bytes of one decoded chunk of one unit."""
        return max(self.part_panels(p) for p in self.parts) * PANEL * self.chunk_cols

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
