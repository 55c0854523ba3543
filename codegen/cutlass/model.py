"""What a plan is expected to cost: bytes, instructions, matrix instructions, waves of thread blocks.

The figures of GPUs, and what is left of a Hopper's matrix rate without wgmma, are those of the CUDA backend's model, so
that predictions can be compared. No kernel of this backend has been measured on a GPU yet: where both come out close,
the CUDA backend's is to be used (`_DOUBT`).
"""

from __future__ import annotations

import math

from lowbit.codegen.cuda.fragments import BLOCK
from lowbit.codegen.cutlass.plan import Plan
from lowbit.codegen.triton.gpus import LATENCY, LAUNCH, MMA_SYNC_SHARE, Gpu, gpu_of, is_hopper
from lowbit.compiler.ir.target import Target

__all__ = ["instructions", "predict"]

_SLOTS = 3.2  # instructions a multiprocessor issues per clock, of four
_L2_SHARE = 1.4  # of the memory's bandwidth: what the second-level cache gives beside it
_PACK = 2e-6  # seconds that moving columns before the kernel takes at least
_DOUBT = 1.15  # what predictions that were never compared with a measurement are multiplied with
_ENDS = 2  # steps' worth of time in which a thread block fills its ring; storing comes on top


def instructions(plan: Plan) -> float:
    """Instructions a warp issues for one step, all of them."""
    weights, tokens = plan.parts * 16 * BLOCK / 32, plan.schedule.tile_m / 8
    fmt, recipe = plan.spec.fmt, plan.recipe
    exact = 0.5 if fmt.zero or recipe.factor != 1.0 or recipe.sums_activations else 0.0
    scaling = (2.5 if fmt.offset else 0.5 if plan.dtype == "f16" else 1.0) if plan.scaled else 0.0
    count = weights * (recipe.cost + exact + scaling) + plan.parts * fmt.bits + 40
    count += plan.parts * BLOCK / plan.span * (6 * (1 + fmt.zero + fmt.offset) + 4) * plan.scaled
    count += 8 * plan.schedule.tile_m * 8 / plan.threads  # copies of activations, with their addresses
    if plan.warpgroup:
        return count + 4 * plan.parts
    return count + tokens * (2 + 4 * plan.parts)


def predict(plan: Plan, target: Target, m: int) -> float:
    """Seconds of one call with `m` tokens whose weights are not in any cache."""
    gpu, s = gpu_of(target), plan.schedule
    blocks = plan.tile_sets * plan.token_blocks(m)
    waves = math.ceil(blocks / (gpu.multiprocessors * plan.resident))
    busy = min(plan.resident, math.ceil(blocks / gpu.multiprocessors))  # on the fullest multiprocessor
    step = max(
        2.0 * s.tile_n * s.tile_m * BLOCK * gpu.multiprocessors / _rate(plan, gpu, target),
        s.warps * instructions(plan) / (min(_SLOTS, 0.4 * s.warps * busy) * gpu.clock),
        (plan.stage_bytes + _weight_bytes(plan)) * gpu.multiprocessors / (gpu.bandwidth * _L2_SHARE),
    )
    steps = plan.k_blocks + _ENDS
    compute = waves * busy * (steps * step + _store(plan, gpu)) + LATENCY
    memory = _outside(plan, m) / gpu.bandwidth
    total = LAUNCH + max(compute, memory) + 0.15 * min(compute, memory)
    return _DOUBT * (total + (0.0 if plan.dense else _PACK + 6.0 * m * plan.x_columns / gpu.bandwidth))


def _rate(plan: Plan, gpu: Gpu, target: Target) -> float:
    return gpu.matrix16 * (MMA_SYNC_SHARE if is_hopper(target) and not plan.warpgroup else 1.0)


def _weight_bytes(plan: Plan) -> float:
    """Bytes of a step's weights and side values."""
    side = plan.side_bytes * (1 + plan.spec.fmt.offset) + plan.spec.fmt.zero
    each = BLOCK * plan.spec.fmt.bits / 8 + plan.scaled * side * BLOCK / plan.span
    return plan.schedule.tile_n * each


def _store(plan: Plan, gpu: Gpu) -> float:
    """Seconds in which a thread block stores its tile: about eight instructions an output."""
    return 8.0 * plan.schedule.tile_m * plan.out_rows / 32 / (_SLOTS * gpu.clock)


def _outside(plan: Plan, m: int) -> float:
    """Bytes that come from memory or go there."""
    spec = plan.spec
    out = 4 if spec.out_dtype == "f32" else 2
    return plan.tile_sets * plan.k_blocks * _weight_bytes(plan) + m * (2.0 * spec.k + out * spec.n_out)
