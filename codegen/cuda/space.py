"""Schedules worth considering, and why a schedule cannot run: hardware bounds that the headers count on as well."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

from lowbit.codegen.cuda.model import predict, registers
from lowbit.codegen.cuda.plan import BLOCK, TILE, Plan
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.gpus import gpu_of, is_hopper
from lowbit.compiler.ir.target import Target

__all__ = ["candidates", "illegal"]

_MOST_BLOCKS = 4096  # thread blocks along the matrix that 32-bit arithmetic is sure to hold


def illegal(plan: Plan, target: Target) -> str | None:
    """Why a plan cannot run on `target`, or None."""
    s, gpu = plan.schedule, gpu_of(target)
    if s.tile_m not in (1, 2, 4, 8, 16, 32, 64, 128) or s.tile_n % TILE or s.tile_k not in (64, 128):
        return f"no tiles of {s.tile_m} tokens, {s.tile_n} rows, {s.tile_k} columns"
    if s.warps % plan.row_warps or not 1 <= s.warps <= 16 or plan.row_tiles * 4 % plan.row_warps:
        return f"{s.warps} warps, {plan.row_warps} to a unit, cannot share {s.tile_n} rows"
    if plan.parts > 4 and plan.parts % 4:
        return f"a warp takes parts of one tile or whole tiles, not {plan.parts} parts"
    if plan.gated and s.tile_n != 2 * TILE:
        return "gate and up are two tiles of 64 rows"
    if plan.ahead < 1:
        return "a ring has at least two stages, one more with wgmma"
    if plan.warpgroup and (why := _no_warpgroup(plan, target)):
        return why
    if s.get("bulk", 0) and not is_hopper(target):
        return f"{target} has no bulk copies"
    if plan.units * _MOST_BLOCKS >= 2**32:
        return "the matrix has too many units for 32-bit arithmetic"
    if (need := plan.shared_bytes) > gpu.shared or (need + 1024) * s.get("resident", 2) > gpu.shared_sm:
        return f"{s.get('resident', 2)} blocks of {need} bytes do not fit into {target}'s shared memory"
    if (count := registers(plan)) > min(65536 // (s.warps * 32 * s.get("resident", 2)), 255):
        return f"needs about {count} registers a thread"
    return None


def _no_warpgroup(plan: Plan, target: Target) -> str | None:
    s = plan.schedule
    if not is_hopper(target):
        return f"{target} has no wgmma"
    if plan.parts != 1 or plan.warp_groups != 1 or s.tile_k != BLOCK or s.tile_m < 8:
        return "with wgmma every warp holds 16 rows of all rows, 64 columns and at least 8 tokens"
    if plan.flushes != 1 or plan.sums_x:
        return "with wgmma groups are of 64 columns at least, and nothing asks for sums of activations"
    return None


@lru_cache(maxsize=1024)
def candidates(spec: KernelSpec, target: Target, m: int) -> tuple[Schedule, ...]:
    """Legal schedules for `m` tokens, the predicted best first."""
    found = {}
    for s in _space(spec, target, m):
        plan = Plan(spec, s)
        if illegal(plan, target) is None:
            found[s] = predict(plan, target, m)
    return tuple(sorted(found, key=lambda s: (found[s], str(s))))


def _space(spec: KernelSpec, target: Target, m: int) -> Iterator[Schedule]:
    bulk = {"bulk": 1} if is_hopper(target) else {}
    gated = "silu_mul" in spec.epilogue
    heights = (1, 2, 4, 8, 16)
    fits = next((h for h in heights if h >= m), 16)
    if m <= 64:  # every warp for itself: they share the columns
        rows = (128,) if gated else (64, 128)
        for n, k, warps, stages, resident in product(rows, (64, 128), (2, 4, 8), (2, 3, 4, 6), (1, 2)):
            yield Schedule(fits, n, k, warps, stages).with_extra(resident=resident, **bulk)
    if m > 8:  # warps share activations, and every weight meets many tokens
        rows = (128,) if gated else (128, 256)
        for height, n, k, stages, resident in product((16, 32, 64), rows, (64, 128), (2, 3, 4), (1, 2)):
            for row_warps, warps in ((4, 4), (8, 8), (4, 8)):
                base = Schedule(height, n, k, warps, stages).with_extra(row_warps=row_warps, resident=resident, **bulk)
                yield from (base, base.with_extra(exact=1))
    if m > 32 and bulk:  # whole warpgroups multiply
        for height, warps, stages in product((64, 128), (8, 16), (4, 6, 8)):
            base = Schedule(height, 128 if gated else warps * 16, 64, 8 if gated else warps, stages)
            yield base.with_extra(row_warps=base.warps, exact=1, wgmma=1, resident=1, **bulk)
