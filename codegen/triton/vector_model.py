"""What a schedule of a kernel for a vector format is expected to cost.

Besides memory and products there are the gathers: a vector is one load instruction per 16 bytes (fewer when its length
is not a power of two), and a multiprocessor's first-level cache serves about one scattered address a clock, the second
level a quarter of that for codebooks that do not fit. Tiles of many tokens gather the matrix once for every tile.
"""

from __future__ import annotations

import math

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
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
    uses_wgmma,
)
from lowbit.codegen.triton.vector_tiles import VectorTiles, vector_tiles_of
from lowbit.compiler.ir.target import Target

__all__ = ["gather_loads", "predict", "registers", "shared_bytes"]

_L1_BYTES = 96 << 10  # of codebooks that stay in the first-level cache beside everything else
_L1_GATHERS, _L2_GATHERS = 1.0, 0.25  # scattered loads per clock and multiprocessor
_GATHER_LATENCY = 0.4e-6  # seconds an index waits for its centroid
_WIDEST = 16  # bytes of a load instruction


def _stored(t: VectorTiles) -> int:
    return 2 if t.spec.scale_dtype == "f16" else 4


def gather_loads(t: VectorTiles) -> int:
    """Load instructions that fetch one centroid."""
    width = _stored(t)
    return math.ceil(t.fmt.dim * width / min((t.fmt.dim & -t.fmt.dim) * width, _WIDEST))


def _index_bytes(t: VectorTiles) -> int:
    """Bytes of the indices of one vector."""
    sizes = [t.fmt.centroids, *([t.fmt.residual] if t.fmt.residual else [])]
    return sum(1 if size <= 256 else 2 for size in sizes)


def shared_bytes(spec: KernelSpec, schedule: Schedule, target: Target) -> int:
    """Shared memory one program needs, in bytes: prefetched stages, the operands, and where Hopper's products read
    weights from shared memory centroids on their way, because Triton then prefetches gathers too."""
    if schedule.get("gemv", 0):
        return schedule.tile_n * schedule.tile_m * 32
    t, ahead = vector_tiles_of(spec, schedule), max(schedule.stages - 1, 1)
    width, count = X_BYTES[spec.x_dtype], len(t.accumulators)
    weights = schedule.tile_n * schedule.tile_k * count
    x_tile = schedule.tile_m * schedule.tile_k * width
    indices = t.vectors * t.positions * _index_bytes(t) * count
    books = 2 if t.fmt.residual else 1
    from_shared = uses_wgmma(schedule, target) and (schedule.tile_m >= 64 or not schedule.get("swap", 0))
    gathers = weights * _stored(t) * books * max(ahead, 2) if from_shared else 0
    operands = (weights * width + (x_tile if spec.x_dtype == "f32" else 0)) * (2 if spec.x_dtype == "f32" else 1)
    outliers = schedule.tile_n * t.outlier_step * (width + _stored(t)) if t.outliers else 0
    out = schedule.tile_m * schedule.tile_n * X_BYTES[spec.out_dtype]  # turned once, to be stored by rows
    return max(ahead * (x_tile + indices) + gathers + operands + outliers, out)


def registers(spec: KernelSpec, schedule: Schedule) -> int:
    """Rough 32-bit registers a thread needs: accumulators, the gathered tile, addresses."""
    t, threads = vector_tiles_of(spec, schedule), schedule.warps * 32
    tile = schedule.tile_n * schedule.tile_k
    pieces = 48 if t.lanes != t.fmt.dim else 0  # a masked vector is loaded in pieces, each with an address
    pieces += 16 if t.fmt.residual else 0
    gathered = tile * (3 if t.fmt.residual else 2) // 2
    if t.gemv:
        sums = schedule.tile_m * len(t.accumulators)
        outliers = schedule.tile_n * t.outlier_step * (sums + 4) if t.outliers else 0
        return max(tile * sums + gathered, outliers) // threads + 40 + pieces
    accumulators = schedule.tile_m * (schedule.tile_n * len(t.accumulators) + schedule.tile_k // 2)
    parts = 3 if spec.x_dtype == "f32" else 1  # each float32 operand becomes three tf32
    return (accumulators + tile * (parts - 1) + (gathered if t.fmt.residual else tile)) // threads + 48 + pieces


def predict(spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
    """Seconds of one call with `m` tokens whose weights are not in any cache."""
    gpu, t = gpu_of(target), vector_tiles_of(spec, schedule)
    m_tiles = math.ceil(m / schedule.tile_m)
    programs = m_tiles * t.n_tiles * schedule.split_k
    held = shared_bytes(spec, schedule, target), registers(spec, schedule)
    resident = gpu.multiprocessors * resident_programs(schedule, target, *held)
    waves = math.ceil(programs / resident)
    busy = programs / (waves * resident) if programs > resident else min(programs / gpu.multiprocessors, 1.0)
    memory = _memory_seconds(t, gpu, m, min(programs, resident))
    work = [_gather_seconds(t, gpu, m_tiles), _lane_seconds(t, gpu, m_tiles), _product_seconds(t, target, m_tiles)]
    compute = max(work) / busy
    finish = 0.0
    if schedule.split_k > 1:
        finish = FINISH + 8 * schedule.split_k * m * t.n_acc * len(t.accumulators) / gpu.bandwidth
    prepare = LAUNCH + 2 * m * spec.k * X_BYTES[spec.x_dtype] / gpu.bandwidth if t.prepared else 0.0
    return LAUNCH + max(memory, compute) + 0.15 * min(memory, compute) + finish + prepare


def _memory_seconds(t: VectorTiles, gpu: Gpu, m: int, running: int) -> float:
    spec, schedule = t.spec, t.schedule
    books = sum(t.book_size(name) for name in spec.operands if name.endswith("book"))
    traffic: float = spec.rows * t.fmt.positions(t.columns) * _index_bytes(t) + books * t.fmt.groups * len(
        spec.segments
    ) * _stored(t)
    if t.fmt.outliers:
        traffic += t.first_vectors(t.fmt.outliers.dim)[-1] * t.outliers * 2
    traffic += m * (spec.k * X_BYTES[spec.x_dtype] + spec.n_out * X_BYTES[spec.out_dtype])
    ahead, latency = max(schedule.stages - 1, 1), LATENCY
    if t.gemv:  # nothing is prefetched: an index waits for its centroid before the next is asked for
        ahead, latency = 1, LATENCY + _GATHER_LATENCY
    in_flight = running * ahead * t.vectors * t.positions * _index_bytes(t)
    return traffic / min(gpu.bandwidth, in_flight / latency)


def _gather_seconds(t: VectorTiles, gpu: Gpu, m_tiles: int) -> float:
    """Tiles of vectors, and outlier columns element by element, each with its index."""
    vectors = t.n_tiles * len(t.accumulators) * t.vectors * t.fmt.positions(t.columns)
    books = sum(t.book_size(name) for name in ("book", "residual_book")) * _stored(t)
    loads = vectors * gather_loads(t) * (2 if t.fmt.residual else 1)
    elements = 2 * t.n_tiles * len(t.accumulators) * t.schedule.tile_n * t.outliers
    rate = _L1_GATHERS if books <= _L1_BYTES else _L2_GATHERS
    return m_tiles * (loads / rate + elements / _L1_GATHERS) / (gpu.multiprocessors * gpu.clock)


def _weights(t: VectorTiles, m_tiles: int) -> float:
    """Weights decoded, padded lanes included."""
    return m_tiles * t.n_tiles * len(t.accumulators) * t.schedule.tile_n * t.spec.k


def _lane_seconds(t: VectorTiles, gpu: Gpu, m_tiles: int) -> float:
    """Conversions and additions; without matrix instructions the products too."""
    per_weight = decode_instructions(t.fmt) + (t.schedule.tile_m if t.gemv else 0.0)
    return _weights(t, m_tiles) * per_weight / (gpu.multiprocessors * gpu.lanes * gpu.clock)


def _product_seconds(t: VectorTiles, target: Target, m_tiles: int) -> float:
    if t.gemv:
        return 0.0
    return 2 * _weights(t, m_tiles) * t.schedule.tile_m / matrix_rate(t.spec, t.schedule, target)
