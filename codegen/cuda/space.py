"""Schedules worth considering, and why a schedule cannot run: hardware bounds that the headers count on as well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product

from lowbit.codegen.cuda.fragments import BLOCK, TILE
from lowbit.codegen.cuda.model import predict, registers
from lowbit.codegen.cuda.plan import Plan
from lowbit.codegen.cuda.recipe import find_recipe
from lowbit.codegen.cuda.recipe_bytes import find_byte_recipe
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.gpus import gpu_of, is_hopper, multiplies_int4
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target

__all__ = ["candidates", "illegal", "space"]

_MOST_BLOCKS = 4096  # thread blocks along the matrix that 32-bit arithmetic is sure to hold


def illegal(plan: Plan, target: Target) -> str | None:
    """Why a plan cannot run on `target`, or None."""
    s, gpu = plan.schedule, gpu_of(target)
    if s.tile_m not in (1, 2, 4, 8, 16, 32, 64, 128, 256) or s.tile_n % TILE or s.tile_k not in (64, 128):
        return f"no tiles of {s.tile_m} tokens, {s.tile_n} rows, {s.tile_k} columns"
    if s.warps % plan.row_warps or not 1 <= s.warps <= 16 or plan.row_tiles * 4 % plan.row_warps:
        return f"{s.warps} warps, {plan.row_warps} to a unit, cannot share {s.tile_n} rows"
    if plan.parts > 4 and plan.parts % 4:
        return f"a warp takes parts of one tile or whole tiles, not {plan.parts} parts"
    if plan.gated and s.tile_n != 2 * TILE:
        return "gate and up are two tiles of 64 rows"
    if (out := plan.spec.out_rounding) and not out.static and plan.out_rows % out.group:
        return f"tiles of {plan.out_rows} outputs are no whole groups of {out.group}"
    if plan.ahead < 1:
        return "a ring has at least two stages"
    try:
        _ = plan.flush
    except KernelError as e:  # a step of bytes is longer than one of halves
        return e.message
    if s.split_k != 1 and not (plan.fixed and 1 < s.split_k <= plan.units_per_set):
        return f"{s.split_k} fixed shares are for batch-invariant wgmma, at most {plan.units_per_set}"
    if why := _no_warpgroup(plan, target) if plan.warpgroup else _no_warp(plan, target):
        return why
    if plan.direct and plan.operand == "s8" and plan.k_blocks * BLOCK * 128 * 128 >= 2**31:
        return f"sums of {plan.spec.k} products of bytes do not fit 32 bits"
    if s.get("bulk", 0) and not is_hopper(target):
        return f"{target} has no bulk copies"
    if plan.units * _MOST_BLOCKS >= 2**32:
        return "the matrix has too many units for 32-bit arithmetic"
    if (need := plan.shared_bytes) > gpu.shared or (need + 1024) * s.get("resident", 2) > gpu.shared_sm:
        return f"{s.get('resident', 2)} blocks of {need} bytes do not fit into {target}'s shared memory"
    most = plan.registers[1] if plan.warpgroup else min(65536 // (s.warps * 32 * s.get("resident", 2)), 255)
    if (count := registers(plan)) > most:
        return f"needs about {count} registers a thread"
    return None


def _no_warpgroup(plan: Plan, target: Target) -> str | None:
    s = plan.schedule
    if not is_hopper(target):
        return f"{target} has no wgmma"
    if plan.parts != 1 or plan.warp_groups != 1 or s.warps not in (4, 8, 12) or s.tile_m < 8 or not s.get("bulk", 0):
        return "with wgmma 4, 8 or 12 warps hold 16 rows each, of 8 tokens and more, and copies are bulk copies"
    if s.get("resident", 2) != 1:
        return "with wgmma one thread block fills a multiprocessor"
    if s.tile_k * plan.operand_bits != 16 * BLOCK or plan.flush < plan.step or plan.sums_x:
        return "with wgmma a unit has 128 bytes of columns, and nothing asks for sums of activations"
    if plan.operand == "e4m3":
        return _no_fp8(plan)
    if plan.operand == "s8" and plan.spec.fmt.zero and plan.spec.fmt.bits == 8:
        return "codes of 8 bits less a zero point are no bytes"
    return None


def _no_warp(plan: Plan, target: Target) -> str | None:
    if plan.operand == "e4m3":
        return "FP8 products are those of warpgroups"
    return _no_nibbles(plan, target) if plan.nibbles else None


def _no_nibbles(plan: Plan, target: Target) -> str | None:
    rounding, fmt = plan.spec.rounding, plan.spec.fmt
    if not multiplies_int4(target):
        return f"{target} does not multiply integers of four bits"
    if plan.spec.reads_rows:
        return "activations that another kernel has rounded are bytes"
    if rounding is None or rounding.element.bits > 4 or (rounding.wide and not plan.digits):
        return "integers of four bits are for activations of as many, of eight where they are wide"
    if find_byte_recipe(fmt.element, "s4") is None or plan.sums_x:
        return f"{fmt.element.name} is no integer of four bits without zero points and offsets"
    return None if plan.schedule.tile_k == 2 * BLOCK else "as nibbles a unit has 128 columns"


def _no_fp8(plan: Plan) -> str | None:
    rounding, element = plan.spec.rounding, plan.spec.fmt.element
    if rounding is None or rounding.element.name != "e4m3" or plan.spec.fmt.zero or plan.spec.fmt.offset:
        return "FP8 products have activations in e4m3 and weights without zero points and offsets"
    return None if find_byte_recipe(element, "e4m3") else f"{element.name} is not part of e4m3"


def _halving_pays(spec: KernelSpec) -> bool:
    """Whether float16 operands save instructions where activations are bfloat16."""
    if spec.x_dtype != "bf16" or spec.rounding is not None:
        return False
    half, wide = (find_recipe(spec.fmt.element, t) for t in ("f16", "bf16"))
    return half is not None and wide is not None and half.cost < wide.cost


@lru_cache(maxsize=1024)
def candidates(spec: KernelSpec, target: Target, m: int) -> tuple[Schedule, ...]:
    """Legal schedules for `m` tokens, the predicted best first."""
    found = {}
    for s in space(spec, target, m):
        plan = Plan(spec, s)
        if illegal(plan, target) is None:
            found[s] = predict(plan, target, m)
    return tuple(sorted(found, key=lambda s: (found[s], str(s))))


def space(spec: KernelSpec, target: Target, m: int) -> Iterator[Schedule]:
    """Schedules worth considering for `m` tokens, legal or not."""
    bulk = {"bulk": 1} if is_hopper(target) else {}
    gated, integer = "silu_mul" in spec.epilogue, spec.compute == "int8"
    heights = (1, 2, 4, 8, 16)
    fits = next((h for h in heights if h >= m), 16)
    if m <= 64:  # every warp for itself: they share the columns
        rows = (128,) if gated else (64, 128)
        for n, k, warps, stages, resident in product(rows, (64, 128), (2, 4, 8), (2, 3, 4, 6), (1, 2)):
            base = Schedule(fits, n, k, warps, stages).with_extra(resident=resident, **bulk)
            yield from (base, base.with_extra(half=1)) if _halving_pays(spec) else (base,)
    if m > 8:  # warps share activations, and every weight meets many tokens
        rows = (128,) if gated else (128, 256)
        for height, n, k, stages, resident in product((16, 32, 64), rows, (64, 128), (2, 3, 4), (1, 2)):
            for row_warps, warps in ((4, 4), (8, 8), (4, 8)):
                base = Schedule(height, n, k, warps, stages).with_extra(row_warps=row_warps, resident=resident, **bulk)
                yield base
                if not integer:
                    yield base.with_extra(exact=1)
                elif k == 128 and multiplies_int4(target):
                    yield base.with_extra(s4=1)
    if m > 32 and bulk:  # one warp fetches, whole warpgroups multiply
        tall = [h for h in (64, 128, 256) if h <= 64 or h <= 2 * m]
        for height, warps, stages, fp8 in product(tall, (8, 12), (3, 4, 6, 8), (0, 1)):
            if fp8 and (integer or spec.rounding is None):
                continue
            base = Schedule(height, 128 if gated else warps * 16, 128 if integer or fp8 else 64, warps, stages)
            if not gated or warps == 8:
                base = base.with_extra(row_warps=warps, wgmma=1, resident=1, **bulk, **({"fp8": 1} if fp8 else {}))
                for found in (base, base.with_extra(half=1)) if _halving_pays(spec) else (base,):
                    yield from (replace(found, split_k=n) for n in ((1, 2, 3, 4, 6, 8) if spec.invariant else (1,)))
