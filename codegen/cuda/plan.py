"""The arithmetic of one (spec, schedule): units of work, stages of the ring, shared memory, a kernel's numbers.

A *unit* is what a warp takes from memory at once: `row_tiles` tiles of 64 rows by `blocks` blocks of 64 columns. The
units of the whole matrix, tile after tile, are one line that is cut into equal parts, one for each thread block; so all
blocks end together whatever the shape ("Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix
Multiplication on the GPU", Osama et al.). Warps of a block take turns, each with a ring of stages of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from lowbit.codegen.cuda.bits import Type16
from lowbit.codegen.cuda.recipe import Recipe, find_recipe
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import plane_bits
from lowbit.quantizers.formats import K_ALIGN

__all__ = ["BLOCK", "TILE", "Plan"]

TILE = 64
"""Rows of a tile."""
BLOCK = 64
"""Columns of a block."""
_SIDE_BYTES = {"f16": 2, "f32": 4, "e8m0": 1, "e4m3": 1}


@dataclass(frozen=True)
class Plan:
    """See the module's docstring. Schedule: tile_m tokens a thread block multiplies with, tile_n rows and tile_k
    columns of a unit, warps, stages. Extra: `row_warps` warps share a unit, each taking some of its rows; `bulk`:
    copies by the copy engine of sm_90; `exact`: addends meet weights, not sums; `wgmma`: four warps multiply
    together; `resident` thread blocks a multiprocessor holds; `early`: the kernel may start while the one before it
    ends."""

    spec: KernelSpec
    schedule: Schedule

    @cached_property
    def dtype(self) -> Type16:
        """Operand type of the matrix instructions: the activations'."""
        if self.spec.x_dtype not in ("f16", "bf16"):
            raise KernelError("LB0460", f"activations are f16 or bf16, not {self.spec.x_dtype}", where=self.spec.format)
        return "bf16" if self.spec.x_dtype == "bf16" else "f16"

    @cached_property
    def recipe(self) -> Recipe:
        """How codes become operands; raises KernelError (LB0460) where no way is exact."""
        found = find_recipe(self.spec.fmt.element, self.dtype)
        if found is None:
            raise KernelError("LB0460", f"{self.spec.format} has no exact {self.dtype} operands")
        return found

    @cached_property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane."""
        return plane_bits(self.spec.fmt.bits)

    @property
    def k_blocks(self) -> int:
        """Blocks of a row tile."""
        return self.spec.blocks * K_ALIGN // BLOCK

    @property
    def gated(self) -> bool:
        """Whether two segments end in one output."""
        return "silu_mul" in self.spec.epilogue

    @property
    def tiles(self) -> int:
        """Row tiles of the packed matrix."""
        return self.spec.rows // TILE

    @property
    def row_tiles(self) -> int:
        """Row tiles of a unit."""
        return self.schedule.tile_n // TILE

    @property
    def tile_sets(self) -> int:
        """Sets of `row_tiles` row tiles: the output's tiles along the rows."""
        return self.tiles // 2 if self.gated else math.ceil(self.tiles / self.row_tiles)

    @property
    def unit_blocks(self) -> int:
        """Blocks of a unit."""
        return self.schedule.tile_k // BLOCK

    @property
    def units_per_set(self) -> int:
        """Units along the columns."""
        return math.ceil(self.k_blocks / self.unit_blocks)

    @property
    def units(self) -> int:
        """Units of the whole matrix."""
        return self.tile_sets * self.units_per_set

    @property
    def row_warps(self) -> int:
        """Warps that share a unit."""
        return self.schedule.get("row_warps", 1)

    @property
    def warp_groups(self) -> int:
        """Groups of warps, each with a ring of stages, that take turns along the columns."""
        return self.schedule.warps // self.row_warps

    @property
    def parts(self) -> int:
        """Parts of 16 rows that a warp multiplies."""
        return self.row_tiles * 4 // self.row_warps

    @property
    def exact(self) -> bool:
        """Whether addends and zero points meet weights instead of sums."""
        return bool(self.schedule.get("exact", 0))

    @property
    def warpgroup(self) -> bool:
        """Whether four warps multiply together (wgmma)."""
        return bool(self.schedule.get("wgmma", 0))

    @property
    def ahead(self) -> int:
        """Units asked for beforehand. With wgmma one stage more is still read."""
        return self.schedule.stages - (2 if self.warpgroup else 1)

    @property
    def sums_x(self) -> bool:
        """Whether sums of activations are needed."""
        inexact = not self.exact and (self.recipe.sums_activations or self.spec.fmt.zero)
        return inexact or self.spec.fmt.offset

    @property
    def token_tiles(self) -> int:
        """Matrix instructions side by side along the tokens, 8 each."""
        return math.ceil(self.schedule.tile_m / 8)

    @property
    def padded_group(self) -> int:
        """Packed columns of a group; those of the whole matrix where there is one group."""
        s = self.spec
        if s.groups == 1:
            return self.k_blocks * BLOCK
        return K_ALIGN // s.parts if s.parts > 1 else s.group_blocks * K_ALIGN

    @cached_property
    def in_loop(self) -> bool:
        """Whether side values meet the sums of every group, not only the final ones."""
        return self.spec.groups > 1 or self.spec.fmt.zero or self.spec.fmt.offset

    @cached_property
    def flush(self) -> int:
        """Columns after which a sum is scaled: those of a unit, or fewer where groups are smaller."""
        unit = self.schedule.tile_k
        for size in (unit, 64, 32, 16):
            if not self.in_loop or (size <= unit and self.padded_group % size == 0):
                return size
        raise KernelError("LB0460", f"groups of {self.spec.group} columns are smaller than a step of 16")

    @property
    def flushes(self) -> int:
        """Times a unit's sums are scaled."""
        return self.schedule.tile_k // self.flush

    @property
    def side_bytes(self) -> int:
        """Bytes of a scale."""
        return _SIDE_BYTES[self.spec.scale_dtype]

    @cached_property
    def stage_bytes(self) -> dict[str, int]:
        """Bytes of every part of a stage, in order: planes, scale, zero, offset, a gap, activations."""
        s, parts = self.schedule, {}
        for p, bits in enumerate(self.planes):
            parts[f"plane{p}"] = self.row_tiles * self.unit_blocks * TILE * BLOCK * bits // 8
        if self.in_loop:
            each = self.row_tiles * self.flushes * TILE
            parts["scale"] = each * self.side_bytes
            parts |= {"zero": each} if self.spec.fmt.zero else {}
            parts |= {"offset": each * self.side_bytes} if self.spec.fmt.offset else {}
        if self.warpgroup:
            parts["gap"] = -sum(parts.values()) % self.align
        parts["x"] = s.tile_m * s.tile_k * 2
        return parts

    @property
    def align(self) -> int:
        """Bytes to which the activations of a stage are aligned."""
        return 1024 if self.warpgroup else 16

    @property
    def table_bytes(self) -> int:
        """Bytes of a table of 16-bit numbers by code."""
        return 2 * len(self.recipe.table)

    @property
    def reduce_bytes(self) -> int:
        """Bytes in which the groups' sums of a set of tiles meet."""
        return self.warp_groups * self.schedule.tile_m * self.reduce_stride * 4

    @property
    def reduce_stride(self) -> int:
        """Floats between two tokens' sums; 4 more than the rows, so that lanes use different banks."""
        return self.row_tiles * TILE + 4

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block: rings, sums, a row of zeros, barriers, the table."""
        ring = self.warp_groups * self.schedule.stages * sum(self.stage_bytes.values())
        return ring + self.reduce_bytes + 128 + self.barrier_bytes + -(-self.table_bytes // 16) * 16

    @property
    def barrier_bytes(self) -> int:
        """Bytes of the barriers of bulk copies, and of the flag of the last arriver."""
        return -(-(8 * self.warp_groups * self.schedule.stages + 4) // 16) * 16

    @property
    def plain_columns(self) -> bool:
        """Whether packed columns are the matrix's, and rows of x are whole 16-byte pieces."""
        return (self.spec.groups == 1 or self.padded_group == self.spec.group) and self.spec.k % 8 == 0

    def part_floats(self, blocks: int, token_blocks: int) -> int:
        """float32 of workspace for partial sums: two sets of tiles for every thread block."""
        return blocks * token_blocks * 2 * self.schedule.tile_m * self.row_tiles * TILE

    def blocks(self, multiprocessors: int) -> int:
        """Thread blocks along the matrix: as many as run at once, or one a unit."""
        per = self.schedule.get("resident", 2)
        return max(1, min(self.units, per * multiprocessors))
