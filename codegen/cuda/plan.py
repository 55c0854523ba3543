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

from lowbit.codegen.cuda.bits import NarrowType, Type16
from lowbit.codegen.cuda.fragments import BLOCK, TILE, FragmentPlan
from lowbit.codegen.cuda.recipe import Recipe, find_recipe
from lowbit.codegen.cuda.recipe_bytes import find_byte_recipe
from lowbit.codegen.rounded import ROUNDED
from lowbit.codegen.streamk import FixedLine, Line
from lowbit.compiler.errors import KernelError

__all__ = ["CHUNK", "PREPARE_THREADS", "Plan"]

CHUNK = 32
"""Tokens whose sums wait together to be stored, where warpgroups multiply."""
PREPARE_THREADS = 256
"""Threads of a block that prepares activations."""
_OPERAND_BITS = {"f16": 16, "bf16": 16, "s8": 8, "e4m3": 8, "s4": 4}


@dataclass(frozen=True)
class Plan(FragmentPlan):
    """See the module's docstring. Schedule: tile_m tokens a thread block multiplies with, tile_n rows and tile_k
    columns of a unit, warps that multiply, stages. Extra: `row_warps` warps share a unit, each taking some of its rows;
    `bulk`: copies by the copy engine of sm_90; `exact`: addends meet weights, not sums; `wgmma`: four warps multiply
    together while others fetch; `fp8`: operands are e4m3; `s4`: integers of four bits; `half`: they are float16 where
    activations are bfloat16; `resident` thread blocks a multiprocessor holds; split_k: shares of a
    tile's columns, where they must not depend on the number of tokens and `wgmma` multiplies;
    `early`: the kernel may start while the one before it ends."""

    @cached_property
    def dtype(self) -> Type16:
        """Type of activations of 16 bits: their own, or bfloat16 where float32 ones are rounded to something narrow."""
        if self.spec.x_dtype == "f32" and not self.spec.rounding:
            raise KernelError("LB0460", "activations are f16 or bf16, not f32", where=self.spec.format)
        return "f16" if self.spec.x_dtype in ("f16", ROUNDED) or self.halved else "bf16"

    @property
    def halved(self) -> bool:
        """Whether bfloat16 activations become float16 times a power of two for every token: most formats are decoded
        to float16 in fewer instructions."""
        return bool(self.schedule.get("half", 0)) and self.spec.x_dtype == "bf16" and not self.spec.rounding

    @cached_property
    def operand(self) -> Type16 | NarrowType:
        """Operand type of the matrix instructions."""
        if self.spec.compute == "int8":
            return "s4" if self.schedule.get("s4", 0) else "s8"
        return "e4m3" if self.schedule.get("fp8", 0) else self.dtype

    @property
    def operand_bits(self) -> int:
        """Bits of an operand."""
        return _OPERAND_BITS[self.operand]

    @property
    def nibbles(self) -> bool:
        """Whether operands are integers of four bits: signed weights, and unsigned activations, each a level less its
        group's least one. The least level times the sum of the group's weights is added to every sum of products."""
        return self.operand == "s4"

    @property
    def step(self) -> int:
        """Columns of a matrix instruction: 32 bytes."""
        return 256 // self.operand_bits

    @cached_property
    def recipe(self) -> Recipe:
        """How codes become operands; raises KernelError (LB0460) where no way is exact."""
        element, kind = self.spec.fmt.element, self.operand
        if kind == "s8" or kind == "e4m3" or kind == "s4":
            found = find_byte_recipe(element, kind, plain=kind == "s8" and self.exact and self.spec.fmt.zero)
        else:
            found = find_recipe(element, kind)
        if found is None:
            raise KernelError("LB0460", f"{self.spec.format} has no exact {kind} operands")
        return found

    @property
    def prepared(self) -> bool:
        """Whether a kernel of its own brings activations into packed columns, rounds them and finds their scales."""
        if self.reads_rows:
            return False
        return self.spec.rounding is not None or self.halved or (self.warpgroup and not self.plain_columns)

    @cached_property
    def reads_rows(self) -> bool:
        """Whether the main kernel itself reads the rows that another kernel has rounded: where no columns are missing
        between groups, and wgmma, which takes operands from memory as they are, multiplies bytes. Else a kernel before
        makes of them what it makes of numbers."""
        return self.spec.reads_rows and self.dense and (self.operand_bits == 8 or not self.warpgroup)

    @property
    def dense(self) -> bool:
        """Whether packed columns stand where the matrix's do."""
        return self.spec.groups == 1 or self.padded_group == self.spec.group

    @property
    def x_columns(self) -> int:
        """Columns of the activations that the main kernel reads: high digits of the leading ones first."""
        if self.reads_rows:
            return self.spec.x_rows.level_bytes
        packed = self.k_blocks * BLOCK
        return self.lead_units * self.schedule.tile_k + packed if self.prepared else self.spec.k

    @cached_property
    def x_group(self) -> int:
        """Packed columns that share an activation scale, or of the leading ones where the others share one too; 0 where
        all do, or none is rounded."""
        s, rounding = self.spec, self.spec.rounding
        if rounding is None or (rounding.groups(s.k) == 1 and not self.digits and not self.nibbles):
            return 0
        if rounding.groups(s.k) == 1:
            return self.k_blocks * BLOCK
        return self._packed(rounding.lead or rounding.group_size(s.k))

    def _packed(self, columns: int) -> int:
        """How many packed columns so many leading ones are."""
        s = self.spec
        if s.groups == 1 or self.padded_group == s.group:
            return columns
        if columns % s.group:
            raise KernelError("LB0460", f"groups of {columns} activations are not whole groups of {s.group} weights")
        return columns // s.group * self.padded_group

    @property
    def digits(self) -> bool:
        """Whether the leading columns are two digits: of 8 bits, high ones times 256, or of 4 as nibbles."""
        rounding = self.spec.rounding
        return rounding is not None and rounding.wide > 0 and rounding.wide_bits == (8 if self.nibbles else 16)

    @cached_property
    def lead_units(self) -> int:
        """Units whose weights meet high digits: they come first, and once more with everything else."""
        if not self.digits:
            return 0
        assert self.spec.rounding is not None
        wide = self.spec.rounding.wide_columns(self.spec.k)
        whole = self.k_blocks * BLOCK if wide == self.spec.k else self._packed(wide)
        return math.ceil(whole / self.schedule.tile_k)

    @property
    def out_rows(self) -> int:
        """Columns of the output that a set of row tiles is."""
        return TILE if self.gated else self.schedule.tile_n

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
        """Units along the columns; those of columns with two digits twice."""
        return self.lead_units + math.ceil(self.k_blocks / self.unit_blocks)

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
        return self.warpgroup or (bool(self.schedule.get("exact", 0)) and self.operand_bits == 16)

    @property
    def warpgroup(self) -> bool:
        """Whether four warps multiply together (wgmma)."""
        return bool(self.schedule.get("wgmma", 0))

    @property
    def threads(self) -> int:
        """Threads of a block: with wgmma four more warps than multiply."""
        return 32 * (self.schedule.warps + 4 * self.warpgroup)

    @property
    def registers(self) -> tuple[int, int]:
        """With wgmma, registers of a thread that fetches, of one that multiplies: the former give theirs up, and what a
        thread has at launch (65536 for all) is enough for both. 0: where one warpgroup multiplies there are enough."""
        if self.schedule.warps <= 4:
            return 0, 248
        few = 40 if self.schedule.warps <= 8 else 32
        return few, min(240, (65536 // 32 - 4 * few) // self.schedule.warps // 8 * 8)

    @property
    def ahead(self) -> int:
        """Units asked for beforehand."""
        return self.schedule.stages - 1

    @property
    def sums_x(self) -> bool:
        """Whether sums of activations are needed."""
        inexact = not self.exact and (self.recipe.sums_activations or self.spec.fmt.zero)
        return inexact or self.spec.fmt.offset

    @property
    def token_tiles(self) -> int:
        """Matrix instructions side by side along the tokens, 8 each."""
        return math.ceil(self.schedule.tile_m / 8)

    @cached_property
    def in_loop(self) -> bool:
        """Whether side values meet the sums of every group, not only the final ones."""
        return self.spec.groups > 1 or self.spec.fmt.zero or self.spec.fmt.offset

    @cached_property
    def flush(self) -> int:
        """Columns after which a sum is scaled: those of a unit, or fewer where groups are smaller."""
        groups = [self.padded_group] * self.in_loop + [self.x_group] * bool(self.x_group)
        groups += [self.k_blocks * BLOCK] * self.nibbles  # beyond the row levels are no zeros, but the least ones
        for size in (self.schedule.tile_k, 64, 32, 16):
            if self.step <= size <= self.schedule.tile_k and all(g % size == 0 for g in groups):
                return size
        raise KernelError("LB0460", f"groups of {groups} columns are smaller than a step of {self.step}")

    @property
    def units_per_flush(self) -> int:
        """Units whose products add up before they are scaled, where groups are longer than a unit. FP8 products are
        taken out of the matrix unit's sums after every unit, as in "DeepSeek-V3 Technical Report"."""
        groups = [self.padded_group] * self.in_loop + [self.x_group] * bool(self.x_group)
        if not groups or self.operand == "e4m3" or self.sums_x or self.lead_units:
            return 1
        return max(1, math.gcd(*groups) // self.schedule.tile_k) if math.gcd(*groups) % self.schedule.tile_k == 0 else 1

    @property
    def direct(self) -> bool:
        """Whether products add up over all columns, as they come out of matrix instructions. FP8 ones do not: they are
        added up in fewer bits than float32 has."""
        return not (self.in_loop or self.sums_x or self.x_group or self.operand == "e4m3")

    @property
    def flushes(self) -> int:
        """Times a unit's sums are scaled."""
        return self.schedule.tile_k // self.flush

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
        if self.x_group:
            parts["x_scale"] = self.flushes * self.scale_tokens * self.x_sides * 4
        if self.warpgroup:
            parts["gap"] = -sum(parts.values()) % self.align
        parts["x"] = s.tile_m * s.tile_k * (8 if self.reads_rows else self.operand_bits) // 8
        return parts

    @property
    def x_sides(self) -> int:
        """Numbers that come with a token's group: its scale; of nibbles its least level too."""
        return 1 + self.nibbles

    @property
    def scale_tokens(self) -> int:
        """Tokens whose scales lie together: those of a tile, at least 16 bytes of them."""
        return max(self.schedule.tile_m, 4)

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
        """Bytes in which the groups' sums of a set of tiles meet, or with wgmma those of some tokens."""
        tokens = min(self.schedule.tile_m, CHUNK) if self.warpgroup else self.warp_groups * self.schedule.tile_m
        return tokens * self.reduce_stride * 4

    @property
    def reduce_stride(self) -> int:
        """Floats between two tokens' sums; 4 more than the rows, so that lanes use different banks."""
        return self.row_tiles * TILE + 4

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block: rings, sums, a row of zeros, barriers, the table."""
        return self.ring_bytes + self.reduce_bytes + 128 + self.barrier_bytes + -(-self.table_bytes // 16) * 16

    @property
    def ring_bytes(self) -> int:
        """Bytes of all rings."""
        return self.warp_groups * self.schedule.stages * sum(self.stage_bytes.values())

    @property
    def barrier_bytes(self) -> int:
        """Bytes of the barriers of stages (with wgmma: full, empty), and of the flag of the last arriver."""
        rings = 2 if self.warpgroup else self.warp_groups
        return -(-(8 * rings * self.schedule.stages + 4) // 16) * 16

    @property
    def plain_columns(self) -> bool:
        """Whether packed columns are the matrix's, and rows of x are whole 16-byte pieces."""
        return self.dense and self.spec.k % 8 == 0

    def grid(self, multiprocessors: int, tokens: int) -> tuple[int, int]:
        """Thread blocks along the matrix and along the tokens: along the matrix as many as run at once, or one a unit.
        With wgmma one line of work goes over both."""
        per, token_blocks = self.schedule.get("resident", 2), self.token_blocks(tokens)
        lines = token_blocks if self.warpgroup else 1
        shares = self.tile_sets * self.schedule.split_k if self.fixed else self.units
        blocks = max(1, min(shares * lines, per * multiprocessors))
        return blocks, token_blocks // lines

    @property
    def fixed(self) -> bool:
        """Whether tiles are cut the same way whatever the number of tokens: with wgmma, where results must not depend
        on it. Other kernels cut the line of one tile of tokens, which has nothing to do with their number."""
        return self.warpgroup and self.spec.invariant

    def line(self, blocks: int, tokens: int) -> Line | FixedLine:
        """With wgmma, what each of `blocks` thread blocks does."""
        tiles = self.tile_sets * self.token_blocks(tokens)
        if self.fixed:
            return FixedLine(tiles, self.units_per_set, blocks, self.schedule.split_k)
        return Line(tiles, self.units_per_set, blocks)

    def part_floats(self, grid: tuple[int, int], tokens: int) -> int:
        """float32 of workspace for partial sums: two sets of tiles for every thread block, or with wgmma as many as are
        shared."""
        parts = self.line(grid[0], tokens).parts if self.warpgroup else grid[0] * grid[1] * 2
        return parts * self.schedule.tile_m * self.row_tiles * TILE

    def counts(self, grid: tuple[int, int], tokens: int) -> int:
        """Arrival counters: one for every tile that may be shared."""
        return self.line(grid[0], tokens).rest if self.warpgroup else self.tile_sets * self.token_blocks(tokens)

    def token_blocks(self, tokens: int) -> int:
        """Tiles along the tokens."""
        return math.ceil(tokens / self.schedule.tile_m)

    def x_bytes(self, tokens: int) -> tuple[int, int]:
        """Bytes of prepared activations, and of their scales: one for every token, or token tile and flush."""
        scales = tokens
        if self.x_group:
            scales = self.token_blocks(tokens) * self.units_per_set * self.flushes * self.scale_tokens * self.x_sides
        return tokens * self.x_columns * self.operand_bits // 8, scales * 4
