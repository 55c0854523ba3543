"""The arithmetic of one (spec, schedule): tiles, operands, side values, shared memory.

A thread block makes a tile of the output: `tile_n` rows of weights by `tile_m` tokens, over all columns. A warp holds
`parts` times 16 rows: part m of warp w is the (m * warps + w)-th, so that with wgmma four warps hold a whole tile of
64. Of gate and up, a warp's first part is the one and its second the other: what meets in the output is in one thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from lowbit.codegen.cuda.bits import Type16
from lowbit.codegen.cuda.fragments import BLOCK, TILE, FragmentPlan
from lowbit.codegen.cuda.recipe import Recipe, find_recipe
from lowbit.codegen.cutlass.operands import unscaled
from lowbit.compiler.errors import KernelError

__all__ = ["CHUNK", "Plan"]

CHUNK = 32
"""Tokens whose outputs wait together in shared memory to be stored."""


@dataclass(frozen=True)
class Plan(FragmentPlan):
    """See the module's docstring. Schedule: tile_m tokens, tile_n rows, tile_k 64 columns of a step, warps, stages of
    activations. Extra: `wgmma`, four warps multiply together; `resident` thread blocks of a multiprocessor."""

    @cached_property
    def dtype(self) -> Type16:
        """Type of operands: that of activations."""
        if self.spec.x_dtype not in ("f16", "bf16"):
            raise KernelError("LB0490", f"activations are f16 or bf16, not {self.spec.x_dtype}", where=self.spec.format)
        return "f16" if self.spec.x_dtype == "f16" else "bf16"

    @cached_property
    def recipe(self) -> Recipe:
        """How codes become operands; raises KernelError (LB0490) where no way is exact."""
        found = find_recipe(self.spec.fmt.element, self.dtype)
        if found is None or not unscaled(self.spec.fmt.element, self.dtype):
            raise KernelError("LB0490", f"{self.spec.fmt.element.name} has no exact {self.dtype} operands")
        return found

    @property
    def warpgroup(self) -> bool:
        """Whether four warps multiply together (wgmma)."""
        return bool(self.schedule.get("wgmma", 0))

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.schedule.warps

    @property
    def resident(self) -> int:
        """Thread blocks that a multiprocessor is to hold."""
        return self.schedule.get("resident", 1)

    @property
    def parts(self) -> int:
        """Parts of 16 rows that a warp multiplies."""
        return self.schedule.tile_n // (16 * self.schedule.warps)

    @property
    def out_rows(self) -> int:
        """Columns of the output that a thread block makes."""
        return self.schedule.tile_n // (2 if self.gated else 1)

    @property
    def tile_sets(self) -> int:
        """Thread blocks along the rows."""
        return math.ceil(self.tiles // (2 if self.gated else 1) * TILE / self.out_rows)

    def token_blocks(self, tokens: int) -> int:
        """Thread blocks along the tokens."""
        return math.ceil(tokens / self.schedule.tile_m)

    @property
    def span(self) -> int:
        """Columns of a step that are sure to share side values."""
        if not self.scaled:
            return BLOCK
        found = next((n for n in (64, 32, 16) if self.padded_group % n == 0), None)
        if found is None:
            raise KernelError("LB0490", f"groups of {self.padded_group} columns are smaller than a step of 16")
        return found

    @property
    def scaled(self) -> bool:
        """Whether scales (and offsets) meet weights; else they meet the finished sums."""
        return self.spec.groups > 1 or self.spec.fmt.offset

    @property
    def dense(self) -> bool:
        """Whether packed columns stand where the matrix's do, in whole pieces of 16 bytes."""
        return (self.spec.groups == 1 or self.padded_group == self.spec.group) and self.spec.k % 8 == 0

    @property
    def x_columns(self) -> int:
        """Columns of the activations that the kernel reads."""
        return self.spec.k if self.dense else self.k_blocks * BLOCK

    @property
    def whole_scales(self) -> bool:
        """Whether segments have a scale that is not part of their groups' ones."""
        return self.spec.fmt.tensor and self.side_bytes == 1

    @property
    def stage_bytes(self) -> int:
        """Bytes of the activations of a step: 128 for every token."""
        return self.schedule.tile_m * 2 * BLOCK

    @property
    def stride(self) -> int:
        """Floats between two tokens' outputs in shared memory; 4 more than there are, so that lanes use other banks."""
        return self.out_rows + 4

    @property
    def table_at(self) -> int:
        """Where the table of 16-bit numbers begins in shared memory: behind the ring, whose place outputs take."""
        ring = self.schedule.stages * self.stage_bytes
        return -(-max(ring, min(CHUNK, self.schedule.tile_m) * self.stride * 4) // 16) * 16

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block."""
        return self.table_at + -(-2 * len(self.recipe.table) // 16) * 16

    @property
    def wide(self) -> int:
        """Outputs of a token that a thread stores at once."""
        return 4 if all(n % 4 == 0 for n in self.spec.segments) else 1
