"""What a schedule is expected to cost: bytes, matrix instructions, decode instructions, and how many are in flight.

A call takes a fixed time plus the largest of three: reading weights and activations, multiplying, decoding. Reading is
also bounded by Little's law: with too few programs, or too little requested ahead, the memory is never busy. Figures
are vendors' peak rates times what large library kernels reach of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from lowbit.codegen.decode import decode_program
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.tiles import Tiles, tiles_of
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import Format

__all__ = ["Gpu", "decode_instructions", "gpu_of", "predict", "registers", "shared_bytes", "uses_wgmma"]

_X_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


@dataclass(frozen=True)
class Gpu:
    """Rates of one architecture. bandwidth: bytes/s read; matrix16, matrix8: dense operations/s (a multiplication and
    an addition count two) of 16-bit floats and int8; lanes: 32-bit integer or float operations per clock and
    multiprocessor; shared, shared_sm: bytes a program, a multiprocessor may use."""

    multiprocessors: int
    clock: float
    bandwidth: float
    matrix16: float
    matrix8: float
    lanes: int
    shared: int
    shared_sm: int


# Vendors' data sheets: A100 80 GB, RTX 3090, RTX 4090, H200 (4.8 TB/s, 989 TFLOP/s). Reading reaches about 90% of the
# nominal bandwidth, matrix units about 80% of the peak.
_GPUS = {
    80: Gpu(108, 1.41e9, 0.9 * 2.04e12, 0.8 * 312e12, 0.8 * 624e12, 64, 163 << 10, 164 << 10),
    86: Gpu(82, 1.70e9, 0.9 * 0.94e12, 0.8 * 71e12, 0.8 * 284e12, 128, 99 << 10, 100 << 10),
    89: Gpu(128, 2.52e9, 0.9 * 1.01e12, 0.8 * 165e12, 0.8 * 661e12, 128, 99 << 10, 100 << 10),
    90: Gpu(132, 1.75e9, 0.9 * 4.8e12, 0.8 * 989e12, 0.8 * 1979e12, 96, 227 << 10, 228 << 10),
}
_LAUNCH = 3.5e-6  # seconds a small kernel takes from launch to last store, replayed from a graph
_LATENCY = 0.9e-6  # seconds from a request to memory until its data arrives under load
_MMA_SYNC_SHARE = 0.5  # of a Hopper matrix unit's rate that instructions issued by one warp reach
_FINISH = 1.5e-6  # seconds the last arriver of a split adds: its atomic and its reads


@cache
def gpu_of(target: Target) -> Gpu:
    """Rates of the target's architecture, or of the newest known one that is not newer."""
    number = int(target.arch.removeprefix("sm_").rstrip("a"))
    return _GPUS[max((n for n in _GPUS if n <= number), default=80)]


@cache
def decode_instructions(fmt: Format) -> float:
    """Lane operations that decode one weight to a 16-bit float, counted over the format's decode program."""
    costs = {"and": 1.0, "or": 1.0, "shr": 0.25, "shl": 0.25, "int_to_float": 1.0, "bitcast": 0.0}
    costs |= dict.fromkeys(("add", "sub", "mul", "fma"), 1.0)
    table: dict[str, Callable[..., float]] = {name: _adds(cost) for name, cost in costs.items()}
    table |= {"const": lambda _: 0.0, "int": lambda _: 0.0, "lut": lambda x, entries: x + 2.0 * len(entries)}
    program = decode_program(fmt)
    return program.run(table, dict.fromkeys(program.args, 0.0)) + 1.0  # and half a conversion, half a store


def _adds(cost: float) -> Callable[..., float]:
    return lambda *operands: cost + sum(operands)


def uses_wgmma(schedule: Schedule, target: Target) -> bool:
    """Whether Triton multiplies with warpgroup instructions: Hopper, and 64 rows or more in the left operand."""
    left = schedule.tile_n if schedule.get("swap", 0) else schedule.tile_m
    return gpu_of(target) is _GPUS[90] and left >= 64 and schedule.warps >= 4 and not schedule.get("gemv", 0)


def shared_bytes(spec: KernelSpec, schedule: Schedule, target: Target) -> int:
    """Shared memory one program needs, in bytes: prefetched stages and the decoded tile."""
    if schedule.get("gemv", 0):
        return schedule.tile_n * schedule.tile_m * 32
    tiles = tiles_of(spec, schedule)
    width = 1 if tiles.integer else _X_BYTES[spec.x_dtype]
    x_tile = schedule.tile_m * tiles.step_columns * width
    words = schedule.tile_n * tiles.step_columns * spec.fmt.bits // 8 * len(tiles.accumulators)
    decoded = schedule.tile_n * tiles.step_columns * width
    # float32 operands are split into two parts each (tf32x3).
    operands = (decoded + x_tile) * (2 if spec.x_dtype == "f32" and not tiles.integer else 1)
    return max(schedule.stages - 1, 1) * (x_tile + words) + operands


def registers(spec: KernelSpec, schedule: Schedule) -> int:
    """Rough 32-bit registers a thread needs: accumulators, the tile being decoded, addresses."""
    tiles, threads = tiles_of(spec, schedule), schedule.warps * 32
    if schedule.get("gemv", 0):
        sums = schedule.tile_n * tiles.step_blocks * schedule.tile_m * len(tiles.accumulators)
        words = schedule.tile_n * tiles.step_blocks * spec.fmt.bits
        return (sums * (2 if tiles.scale_after else 1) + words) // threads + 40
    accumulators = schedule.tile_m * schedule.tile_n * len(tiles.accumulators)
    sums = schedule.tile_m * schedule.tile_n if tiles.scale_after or tiles.integer else 0
    if tiles.integer and schedule.get("swap", 0):
        sums *= 2  # measured: the tile of scale products stays live beside the sums
    width = 1 if tiles.integer else _X_BYTES[spec.x_dtype]
    decoded = schedule.tile_n * tiles.step_columns * width // 4
    return (accumulators + sums + decoded) // threads + 48


def predict(spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
    """Seconds of one call with `m` tokens whose weights are not in any cache."""
    gpu, tiles = gpu_of(target), tiles_of(spec, schedule)
    m_tiles, n_tiles = math.ceil(m / schedule.tile_m), math.ceil(tiles.n_acc / schedule.tile_n)
    programs = m_tiles * n_tiles * schedule.split_k
    resident = gpu.multiprocessors * _occupancy(spec, schedule, target)
    waves = math.ceil(programs / resident)
    busy = programs / (waves * resident) if programs > resident else min(programs / gpu.multiprocessors, 1.0)
    memory = _memory_seconds(tiles, gpu, m, min(programs, resident))
    compute = max(_multiply_seconds(tiles, gpu, target, m_tiles), _decode_seconds(tiles, gpu, m_tiles)) / busy
    finish = 0.0
    if schedule.split_k > 1:
        traffic = 8 * schedule.split_k * m * tiles.n_acc * len(tiles.accumulators)
        finish = _FINISH + traffic / gpu.bandwidth
    extra = _LAUNCH + 6 * m * spec.k / gpu.bandwidth if tiles.integer else 0.0
    return _LAUNCH + max(memory, compute) + 0.15 * min(memory, compute) + finish + extra


def _occupancy(spec: KernelSpec, schedule: Schedule, target: Target) -> int:
    by_shared = gpu_of(target).shared_sm // max(shared_bytes(spec, schedule, target) + 1024, 1)
    by_registers = 65536 // (min(registers(spec, schedule), 255) * schedule.warps * 32)
    return max(1, min(by_shared, by_registers, 64 // schedule.warps, 16))


def _memory_seconds(tiles: Tiles, gpu: Gpu, m: int, running: int) -> float:
    spec, schedule = tiles.spec, tiles.schedule
    side = spec.groups * spec.rows * ((2 if spec.scale_dtype == "f16" else 4) + (1 if spec.fmt.zero else 0))
    weight = spec.blocks * 32 * spec.rows * spec.fmt.bits / 8 + side
    traffic = weight + m * (spec.k * _X_BYTES[spec.x_dtype] + spec.n_out * _X_BYTES[spec.out_dtype])
    ahead = 1 if schedule.get("gemv", 0) else max(schedule.stages - 1, 1)
    in_flight = running * ahead * schedule.tile_n * tiles.step_columns * spec.fmt.bits / 8
    return traffic / min(gpu.bandwidth, in_flight / _LATENCY)


def _multiply_seconds(tiles: Tiles, gpu: Gpu, target: Target, m_tiles: int) -> float:
    schedule, spec = tiles.schedule, tiles.spec
    products = m_tiles * schedule.tile_m * spec.rows * spec.blocks * 32
    if schedule.get("gemv", 0):
        return products * 1.3 / (gpu.multiprocessors * gpu.lanes * gpu.clock)
    rate = gpu.matrix8 if tiles.integer else gpu.matrix16 / (6 if spec.x_dtype == "f32" else 1)
    if gpu is _GPUS[90] and not uses_wgmma(schedule, target):
        rate *= _MMA_SYNC_SHARE
    return 2 * products / rate


def _decode_seconds(tiles: Tiles, gpu: Gpu, m_tiles: int) -> float:
    spec, schedule = tiles.spec, tiles.schedule
    lane_rate = gpu.multiprocessors * gpu.lanes * gpu.clock
    weights = m_tiles * spec.rows * spec.blocks * 32
    per_weight = decode_instructions(spec.fmt) - (1.0 if tiles.scale_after else 0.0)
    if tiles.integer or tiles.scale_after:  # sums are scaled once a step: an operation for each
        per_weight += (2.0 if tiles.integer else 1.0) * schedule.tile_m / tiles.step_columns
    return weights * per_weight / lane_rate
