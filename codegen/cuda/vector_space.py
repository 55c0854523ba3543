"""Schedules of kernels for vector formats: what can run, what it is expected to cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product

from lowbit.codegen.cuda.vector_plan import VectorPlan
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.gpus import FINISH, LAUNCH, Gpu, gpu_of, is_hopper
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import VectorFormat

__all__ = ["illegal_vectors", "predict_vectors", "unserved_vectors", "vector_candidates", "vector_space"]

_PREPARE = 2e-6  # seconds of the kernel before
_WAVEFRONTS = 10.4  # of a gather of 32 rows of 16 bytes from random places in shared memory (simulated)
_L2_SHARE = 1.3  # of the memory's bandwidth that scattered sectors of 32 bytes reach in the second-level cache
_TENSOR_SHARE = 0.5  # of a Hopper's matrix rate that instructions issued by one warp reach
_STEP_INSTRUCTIONS = 6.0  # of a block of 16 rows: an index, an address, a gather, and what surrounds them
_FAR_DIMS = (2, 4, 8, 16)  # lengths whose centroids can be copied in one piece


def unserved_vectors(fmt: VectorFormat) -> str | None:
    """Why there is no kernel for a vector format at all, or None."""
    if fmt.dim < 2:
        return "vectors of one element are no vectors here"
    if fmt.axis == "in":
        return "vectors run along the outputs, not along the inputs"
    if fmt.table != "f16":
        return "codebooks are float16, not " + ("bytes with a scale" if fmt.scaled else fmt.table)
    return None


def illegal_vectors(plan: VectorPlan, target: Target) -> str | None:
    """Why a plan cannot run on `target`, or None."""
    s, gpu = plan.schedule, gpu_of(target)
    resident = s.get("resident", 1)
    if s.tile_m not in (8, 16, 32) or not 1 <= s.warps <= 16:
        return f"no tiles of {s.tile_m} tokens for {s.warps} warps"
    if plan.far and plan.fmt.dim not in _FAR_DIMS:
        return f"centroids of {plan.fmt.dim} elements are not copied in one piece"
    if (need := plan.shared_bytes) > gpu.shared or (need + 1024) * resident > gpu.shared_sm:
        return f"codebooks and sums of {need} bytes do not fit into {target}'s shared memory"
    if (count := registers(plan)) > min(65536 // (plan.threads * resident), 255):
        return f"needs about {count} registers a thread"
    return "the matrix has too many units for 32-bit arithmetic" if plan.units * 4096 >= 2**32 else None


def registers(plan: VectorPlan) -> int:
    """Rough 32-bit registers of a thread: sums, indices of three units, an operand, addresses."""
    sums = plan.row_tiles * plan.tile_rows // 16 * plan.schedule.tile_m // 8 * 4
    indices = 3 * plan.unit_steps * 2 * (plan.index_bytes + plan.residual_bytes)
    return sums + indices + plan.schedule.tile_m // 4 + 40


def vector_space(spec: KernelSpec, target: Target, m: int) -> Iterator[Schedule]:
    """Schedules worth considering for `m` tokens, legal or not."""
    heights = [h for h in (8, 16, 32) if h == 8 or h < 2 * m]
    for height, warps, resident, far in product(heights, (4, 8, 16), (1, 2), (0, 1)):
        extra = {"resident": resident, **({"far": 1} if far else {})}
        yield Schedule(height, 64, 64, warps, 2).with_extra(**extra)


@lru_cache(maxsize=1024)
def vector_candidates(spec: KernelSpec, target: Target, m: int) -> tuple[Schedule, ...]:
    """Legal schedules for `m` tokens, the predicted best first."""
    plans = [VectorPlan(spec, s) for s in vector_space(spec, target, m)]
    found = {p.schedule: predict_vectors(p, target, m) for p in plans if illegal_vectors(p, target) is None}
    return tuple(sorted(found, key=lambda s: (found[s], str(s))))


def predict_vectors(plan: VectorPlan, target: Target, m: int) -> float:
    """Seconds of one call with `m` tokens: the slowest of memory, gathers, instructions and products. Every tile of
    tokens gathers the matrix once more."""
    gpu, s = gpu_of(target), plan.schedule
    blocks, token_blocks = plan.grid(gpu.multiprocessors, m)
    share = max(blocks * token_blocks / gpu.multiprocessors, 1.0) / (blocks * token_blocks)  # of a multiprocessor
    gathers = plan.tiles * plan.tile_units * plan.unit_steps * (plan.tile_rows // 16) * token_blocks  # of 32 rows
    books = 1 + bool(plan.fmt.residual)
    near = gathers * (books - plan.far) * _WAVEFRONTS * share / gpu.clock
    far = gathers * 32 * 32 / (gpu.bandwidth * _L2_SHARE) if plan.far else 0.0
    slots = min(3.2, 0.4 * s.warps * s.get("resident", 1))
    issue = gathers * books * (_STEP_INSTRUCTIONS + s.tile_m / 8) * share / (slots * gpu.clock)
    rate = gpu.matrix16 * (_TENSOR_SHARE if is_hopper(target) else 1.0)
    multiply = 2.0 * gathers * books * 256 * s.tile_m / rate
    rounds = plan.units / blocks / s.warps
    uneven = math.ceil(rounds) / rounds
    total = max(_memory(plan, gpu, m), near + far, issue, multiply) * uneven
    return LAUNCH + _PREPARE + _load(plan, gpu, blocks * token_blocks) + total + FINISH


def _memory(plan: VectorPlan, gpu: Gpu, m: int) -> float:
    vectors = plan.tiles * 8 * plan.fmt.groups * plan.group_columns
    weight = vectors * (plan.index_bytes + plan.residual_bytes)
    return (weight + m * (plan.spec.k + plan.spec.n_out) * 2) / gpu.bandwidth


def _load(plan: VectorPlan, gpu: Gpu, blocks: int) -> float:
    """Seconds until codebooks are in shared memory: all thread blocks read them from the second-level cache."""
    return blocks * (plan.book_bytes + plan.residual_book_bytes) / (gpu.bandwidth * _L2_SHARE)
