"""What a schedule is expected to cost: bytes, matrix instructions, decode instructions, and how many are in flight.

A call takes a fixed time plus the largest of three: reading weights and activations, multiplying, decoding. Reading is
also bounded by Little's law: with too few programs, or too little requested ahead, the memory is never busy. Figures
are vendors' peak rates times what large library kernels reach of them.
"""

from __future__ import annotations

import math

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton import vector_model
from lowbit.codegen.triton.gpus import (
    FINISH,
    LATENCY,
    LAUNCH,
    X_BYTES,
    Gpu,
    decode_instructions,
    gpu_of,
    matrix_rate,
    resident_programs,
)
from lowbit.codegen.triton.tiles import Tiles, tiles_of
from lowbit.compiler.ir.target import Target

__all__ = ["predict", "registers", "shared_bytes"]


def shared_bytes(spec: KernelSpec, schedule: Schedule, target: Target) -> int:
    """Shared memory one program needs, in bytes: prefetched stages and the decoded tile."""
    if spec.vector:
        return vector_model.shared_bytes(spec, schedule, target)
    if schedule.get("gemv", 0):
        return schedule.tile_n * schedule.tile_m * 32
    tiles = tiles_of(spec, schedule)
    width = 1 if tiles.integer else X_BYTES[spec.x_dtype]
    x_tile = schedule.tile_m * tiles.step_columns * width
    words = schedule.tile_n * tiles.step_columns * spec.fmt.bits // 8 * len(tiles.accumulators)
    decoded = schedule.tile_n * tiles.step_columns * width
    # float32 operands are split into two parts each (tf32x3).
    operands = (decoded + x_tile) * (2 if spec.x_dtype == "f32" and not tiles.integer else 1)
    return max(schedule.stages - 1, 1) * (x_tile + words) + operands


def registers(spec: KernelSpec, schedule: Schedule) -> int:
    """Rough 32-bit registers a thread needs: accumulators, the tile being decoded, addresses."""
    if spec.vector:
        return vector_model.registers(spec, schedule)
    tiles, threads = tiles_of(spec, schedule), schedule.warps * 32
    if schedule.get("gemv", 0):
        sums = schedule.tile_n * tiles.step_blocks * schedule.tile_m * len(tiles.accumulators)
        words = schedule.tile_n * tiles.step_blocks * spec.fmt.bits
        return (sums * (2 if tiles.scale_after else 1) + words) // threads + 40
    accumulators = schedule.tile_m * schedule.tile_n * len(tiles.accumulators)
    sums = schedule.tile_m * schedule.tile_n if tiles.scale_after or tiles.integer else 0
    if tiles.integer and schedule.get("swap", 0):
        sums *= 2  # measured: the tile of scale products stays live beside the sums
    width = 1 if tiles.integer else X_BYTES[spec.x_dtype]
    decoded = schedule.tile_n * tiles.step_columns * width // 4
    return (accumulators + sums + decoded) // threads + 48


def predict(spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
    """Seconds of one call with `m` tokens whose weights are not in any cache."""
    if spec.vector:
        return vector_model.predict(spec, schedule, target, m)
    gpu, tiles = gpu_of(target), tiles_of(spec, schedule)
    m_tiles, n_tiles = math.ceil(m / schedule.tile_m), math.ceil(tiles.n_acc / schedule.tile_n)
    programs = m_tiles * n_tiles * schedule.split_k
    held = shared_bytes(spec, schedule, target), registers(spec, schedule)
    resident = gpu.multiprocessors * resident_programs(schedule, target, *held)
    waves = math.ceil(programs / resident)
    busy = programs / (waves * resident) if programs > resident else min(programs / gpu.multiprocessors, 1.0)
    memory = _memory_seconds(tiles, gpu, m, min(programs, resident))
    compute = max(_multiply_seconds(tiles, gpu, target, m_tiles), _decode_seconds(tiles, gpu, m_tiles)) / busy
    finish = 0.0
    if schedule.split_k > 1:
        traffic = 8 * schedule.split_k * m * tiles.n_acc * len(tiles.accumulators)
        finish = FINISH + traffic / gpu.bandwidth
    extra = LAUNCH + 6 * m * spec.k / gpu.bandwidth if tiles.integer else 0.0
    return LAUNCH + max(memory, compute) + 0.15 * min(memory, compute) + finish + extra


def _memory_seconds(tiles: Tiles, gpu: Gpu, m: int, running: int) -> float:
    spec, schedule = tiles.spec, tiles.schedule
    stored = 2 if spec.scale_dtype == "f16" else 4
    side = spec.groups * spec.rows * (stored * (2 if spec.fmt.offset else 1) + (1 if spec.fmt.zero else 0))
    weight = spec.blocks * 32 * spec.rows * spec.fmt.bits / 8 + side
    traffic = weight + m * (spec.k * X_BYTES[spec.x_dtype] + spec.n_out * X_BYTES[spec.out_dtype])
    ahead = 1 if schedule.get("gemv", 0) else max(schedule.stages - 1, 1)
    in_flight = running * ahead * schedule.tile_n * tiles.step_columns * spec.fmt.bits / 8
    return traffic / min(gpu.bandwidth, in_flight / LATENCY)


def _multiply_seconds(tiles: Tiles, gpu: Gpu, target: Target, m_tiles: int) -> float:
    schedule, spec = tiles.schedule, tiles.spec
    products = m_tiles * schedule.tile_m * spec.rows * spec.blocks * 32
    if schedule.get("gemv", 0):
        return products * 1.3 / (gpu.multiprocessors * gpu.lanes * gpu.clock)
    return 2 * products / matrix_rate(spec, schedule, target)


def _decode_seconds(tiles: Tiles, gpu: Gpu, m_tiles: int) -> float:
    spec, schedule = tiles.spec, tiles.schedule
    lane_rate = gpu.multiprocessors * gpu.lanes * gpu.clock
    weights = m_tiles * spec.rows * spec.blocks * 32
    per_weight = decode_instructions(spec.fmt) - (1.0 if tiles.scale_after else 0.0)
    if tiles.integer or tiles.scale_after:  # sums are scaled once a step: an operation for each
        per_weight += (2.0 if tiles.integer else 1.0) * schedule.tile_m / tiles.step_columns
    return weights * per_weight / lane_rate
