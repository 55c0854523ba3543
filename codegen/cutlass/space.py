"""Schedules worth considering, and why a schedule cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from lowbit.codegen.cuda.fragments import BLOCK, TILE
from lowbit.codegen.cutlass.plan import Plan
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.gpus import gpu_of, is_hopper
from lowbit.compiler.ir.target import Target

__all__ = ["illegal", "registers", "space"]

_TOKENS = (32, 64, 128, 256)


def registers(plan: Plan) -> int:
    """Rough 32-bit registers of a thread: sums, operands, words, side values, addresses."""
    sums = plan.parts * plan.schedule.tile_m // 2
    held = plan.parts * (plan.spec.fmt.bits + plan.scaled * 2 * _sides(plan) * BLOCK // plan.span)
    return sums + held + (plan.parts * 32 + 38 if plan.warpgroup else plan.parts * 16 + 104)


def _sides(plan: Plan) -> int:
    return 1 + plan.spec.fmt.zero + plan.spec.fmt.offset


def illegal(plan: Plan, target: Target) -> str | None:
    """Why a plan cannot run on `target`, or None."""
    s, gpu = plan.schedule, gpu_of(target)
    if s.tile_m not in _TOKENS or s.tile_k != BLOCK or s.split_k != 1:
        return f"no tiles of {s.tile_m} tokens and {s.tile_k} columns in {s.split_k} shares"
    if s.warps not in (4, 8) or s.tile_n not in (16 * s.warps, 32 * s.warps):
        return f"{s.warps} warps, each with 16 or 32 rows, do not have {s.tile_n}"
    if s.tile_m * 8 % plan.threads:
        return f"{s.tile_m} tokens are too few for {plan.threads} threads to copy"
    if plan.gated and plan.parts != 2:
        return "gate and up are two parts of a warp"
    if plan.warpgroup and not is_hopper(target):
        return f"{target} has no wgmma"
    if s.stages < (3 if plan.warpgroup else 2):
        return "a ring has at least two stages, and three where products are asynchronous"
    resident = plan.resident
    if (need := plan.shared_bytes) > gpu.shared or (need + 1024) * resident > gpu.shared_sm:
        return f"{resident} blocks of {need} bytes do not fit into {target}'s shared memory"
    if (count := registers(plan)) > min(65536 // (plan.threads * resident), 255):
        return f"needs about {count} registers a thread"
    if plan.tiles * TILE >= 2**31:
        return "the matrix has too many rows for 32-bit arithmetic"
    return None


def space(spec: KernelSpec, target: Target, m: int) -> Iterator[Schedule]:
    """Schedules worth considering for `m` tokens, legal or not."""
    tall = [n for n in _TOKENS if n == _TOKENS[0] or n < 2 * m]
    for tokens, warps, parts, stages in product(tall, (4, 8), (1, 2), (3, 4, 6)):
        base = Schedule(tokens, 16 * warps * parts, BLOCK, warps, stages)
        for resident in (1, 2):
            yield base.with_extra(resident=resident)
            if is_hopper(target):
                yield base.with_extra(resident=resident, wgmma=1)
