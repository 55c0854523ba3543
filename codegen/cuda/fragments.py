"""What plans of kernels share that read weights laid out as matrix instructions take them (the layout `fragments`)."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import plane_bits
from lowbit.quantizers.formats import K_ALIGN

__all__ = ["BLOCK", "TILE", "FragmentPlan"]

TILE = 64
"""Rows of a tile: four parts of 16, one for each warp of a warpgroup."""
BLOCK = 64
"""Columns of a block."""
_SIDE_BYTES = {"f16": 2, "f32": 4, "e8m0": 1, "e4m3": 1}


@dataclass(frozen=True)
class FragmentPlan:
    """The packed matrix of `spec` in tiles and blocks; what a schedule makes of it is the backends'."""

    spec: KernelSpec
    schedule: Schedule

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane."""
        return plane_bits(self.spec.fmt.bits)

    @property
    def k_blocks(self) -> int:
        """Blocks of a row tile."""
        return self.spec.blocks * K_ALIGN // BLOCK

    @property
    def tiles(self) -> int:
        """Row tiles of the packed matrix."""
        return self.spec.rows // TILE

    @property
    def gated(self) -> bool:
        """Whether two segments end in one output."""
        return "silu_mul" in self.spec.epilogue

    @property
    def padded_group(self) -> int:
        """Packed columns of a group; those of the whole matrix where there is one group."""
        s = self.spec
        if s.groups == 1:
            return self.k_blocks * BLOCK
        return K_ALIGN // s.parts if s.parts > 1 else s.group_blocks * K_ALIGN

    @property
    def side_bytes(self) -> int:
        """Bytes of a scale."""
        return _SIDE_BYTES[self.spec.scale_dtype]
