"""What a plan is expected to cost: bytes, instructions, matrix instructions, and whether enough is requested ahead."""

from __future__ import annotations

import math

from lowbit.codegen.cuda.fragments import TILE
from lowbit.codegen.cuda.plan import Plan
from lowbit.codegen.triton.gpus import FINISH, LATENCY, LAUNCH, Gpu, gpu_of, is_hopper
from lowbit.compiler.ir.target import Target

__all__ = ["instructions", "predict", "registers"]

_SLOTS = 4  # instructions a multiprocessor issues per clock
_PER_WARP = 0.4  # of them that one warp alone keeps up, waiting for its own results
_L2_SHARE = 1.4  # of the memory's bandwidth: what the second-level cache gives beside it
_PREPARE = 2e-6  # seconds that a kernel before takes at least
_TENSOR_SHARE = 0.5  # of a Hopper's matrix rate that instructions issued by one warp reach


def registers(plan: Plan) -> int:
    """Rough 32-bit registers of a thread: sums, activations, words, operands, addresses."""
    parts, tokens = plan.parts, plan.token_tiles
    sums = parts * tokens * 4
    live = sums if plan.direct else 2 * sums
    words = parts * plan.spec.fmt.bits
    sides = 2 * parts * (1 + plan.spec.fmt.zero + plan.spec.fmt.offset) if plan.in_loop else 0
    operands = 32 if plan.warpgroup else 4 * tokens + 4 * parts  # of the weights twice, or of both sides
    live += 4 * plan.parts * plan.nibbles
    return live + (4 * tokens if plan.sums_x else 0) + operands + words + sides + 44


def instructions(plan: Plan) -> float:
    """Instructions a warp issues for one unit, all of them."""
    s, tokens, recipe = plan.schedule, plan.token_tiles, plan.recipe
    weights = plan.parts * 16 * s.tile_k / 32  # of a lane
    products = weights / 128 * tokens * plan.operand_bits
    steps = s.tile_k // plan.step
    count = weights * (recipe.cost + (0.5 if plan.exact and (recipe.sums_activations or plan.spec.fmt.zero) else 0))
    count += (
        (steps if plan.warpgroup else products)
        + steps * tokens * (1 if plan.sums_x else 0)
        + (0 if plan.warpgroup else steps / 2 * tokens)
        + plan.nibbles * steps * plan.parts
        + (6 * steps * tokens if plan.reads_rows and plan.operand_bits == 16 else 0)  # bytes become halves
    )
    if not plan.direct:
        each = 1 + (plan.sums_x and not plan.exact) + plan.spec.fmt.offset + (plan.spec.compute == "int8")
        each += bool(plan.x_group) + plan.nibbles
        flushes = plan.flushes / (plan.units_per_flush if plan.warpgroup else 1)
        count += flushes * plan.parts * (4 * tokens * each + 6 * plan.in_loop + 4 * plan.spec.fmt.zero)
    count += weights * plan.spec.fmt.bits / 128
    copied = sum(plan.stage_bytes.values()) if not s.get("bulk", 0) else plan.stage_bytes["x"]
    copied = 0 if plan.warpgroup else copied
    return count + 3 * copied / (512 * plan.row_warps) + 60


def predict(plan: Plan, target: Target, m: int) -> float:
    """Seconds of one call with `m` tokens whose weights are not in any cache."""
    gpu, s = gpu_of(target), plan.schedule
    resident = s.get("resident", 2)
    per_matrix, copies = plan.grid(gpu.multiprocessors, m)
    blocks, token_blocks = per_matrix * copies, plan.token_blocks(m)
    busy = min(1.0, blocks / gpu.multiprocessors)
    waves = _balance(blocks, resident * gpu.multiprocessors)
    memory = _memory(plan, gpu, m, token_blocks, blocks)
    warps = plan.units * token_blocks * plan.row_warps
    slots = min(_SLOTS / 1.25, _PER_WARP * s.warps * min(resident, math.ceil(blocks / gpu.multiprocessors)))
    issue = warps * instructions(plan) / (gpu.multiprocessors * slots * gpu.clock)
    rate = {16: gpu.matrix16, 8: gpu.matrix8, 4: 2 * gpu.matrix8}[plan.operand_bits]
    rate *= _TENSOR_SHARE if is_hopper(target) and not plan.warpgroup else 1.0
    columns = plan.k_blocks * 64 + plan.lead_units * s.tile_k
    products = 2.0 * token_blocks * plan.token_tiles * 8 * plan.tile_sets * s.tile_n * columns
    multiply = products / rate
    compute = max(issue, multiply) * waves / busy
    # Ends of shares within a set of tiles meet through memory; the last round of a block's warps may be partly filled.
    whole = s.split_k == 1 if plan.fixed else per_matrix == plan.tile_sets
    shared_sets = 0.0 if whole else FINISH
    rounds = plan.units * token_blocks / blocks / plan.warp_groups
    longest = plan.line(blocks, m).longest if plan.warpgroup else math.ceil(rounds)
    uneven = longest / rounds
    total = LAUNCH + max(memory, compute) * uneven + 0.15 * min(memory, compute) + shared_sets
    prepared = m * plan.x_columns * (2 + plan.operand_bits / 8)
    return total + (_PREPARE + prepared / gpu.bandwidth if plan.prepared else 0.0)


def _balance(programs: int, resident: int) -> float:
    """How much longer the fullest place works than the average one."""
    return math.ceil(programs / resident) * resident / programs if programs > resident else 1.0


def _memory(plan: Plan, gpu: Gpu, m: int, token_blocks: int, blocks: int) -> float:
    spec, s = plan.spec, plan.schedule
    side = spec.groups * spec.rows * (plan.side_bytes * (1 + spec.fmt.offset) + spec.fmt.zero)
    weight = plan.tiles * TILE * plan.k_blocks * 64 * spec.fmt.bits / 8 + side
    outside = weight + m * (spec.k * 2 + spec.n_out * (4 if spec.out_dtype == "f32" else 2))
    inside = plan.units * token_blocks * (plan.stage_bytes["x"] * min(m / s.tile_m, 1.0)) + weight * token_blocks
    if plan.fixed and s.split_k > 1:  # sums go to memory and back
        inside += 8.0 * m * plan.tile_sets * s.tile_n * s.split_k
    resident = min(blocks, s.get("resident", 2) * gpu.multiprocessors)
    # A stage is asked for when the one before it has been used up: on average half of one is missing. Twice what
    # Little's law asks for, because requests of thread blocks come in bursts.
    ahead = resident * plan.warp_groups * (plan.ahead - 0.5) * (sum(plan.stage_bytes.values()) - plan.stage_bytes["x"])
    return max(outside / min(gpu.bandwidth, ahead / (2 * LATENCY)), inside / (gpu.bandwidth * _L2_SHARE))
