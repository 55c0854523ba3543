"""Schedules worth considering, and why a schedule cannot run.

The bounds are those of the hardware, so that tuning never waits for a compiler to fail: shared memory and registers
of a program, the smallest operands of matrix instructions, Triton's powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.gpus import gpu_of
from lowbit.codegen.triton.model import predict, registers, shared_bytes
from lowbit.codegen.triton.tiles import Tiles, tiles_of
from lowbit.codegen.triton.vector_tiles import VectorTiles, vector_tiles_of
from lowbit.compiler.ir.target import Target

__all__ = ["candidates", "illegal", "space"]

_MAX_REGISTERS = 232  # of 255: addresses and loop state are only estimated
_MAX_UNROLLED = 8  # tokens a gemv kernel holds sums for


def illegal(spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
    """Why `schedule` cannot run `spec` on `target`, or None."""
    tiles, gpu = _tiles(spec, schedule), gpu_of(target)
    sizes = (schedule.tile_m, schedule.tile_n, schedule.tile_k, schedule.warps)
    if any(size < 1 or size & (size - 1) for size in sizes):
        return f"tiles and warps must be powers of two, not {sizes}"
    if schedule.tile_k < 32:
        return f"a step covers whole blocks of 32 columns, not {schedule.tile_k}"
    if isinstance(tiles, VectorTiles) and schedule.tile_n < tiles.lanes and not tiles.rowwise:
        return f"a tile of {schedule.tile_n} rows is shorter than a vector of {tiles.lanes}"
    if schedule.split_k < 1 or schedule.split_k > tiles.steps:
        return f"{tiles.steps} steps cannot be split {schedule.split_k} ways"
    if schedule.get("gemv", 0):
        if spec.compute == "int8":
            return "integer products need matrix instructions"
        if schedule.tile_m > _MAX_UNROLLED:
            return f"a kernel without matrix instructions holds sums for at most {_MAX_UNROLLED} tokens"
    elif schedule.tile_m < 16 or schedule.tile_n < 16:
        return f"matrix instructions need tiles of at least 16x16, not {schedule.tile_m}x{schedule.tile_n}"
    if (need := shared_bytes(spec, schedule, target)) > gpu.shared:
        return f"needs about {need} bytes of shared memory, {target} has {gpu.shared}"
    if (count := registers(spec, schedule)) > _MAX_REGISTERS:
        return f"needs about {count} registers a thread, there are 255"
    return None


def _tiles(spec: KernelSpec, schedule: Schedule) -> Tiles | VectorTiles:
    return vector_tiles_of(spec, schedule) if spec.vector else tiles_of(spec, schedule)


def candidates(spec: KernelSpec, target: Target, m: int) -> list[Schedule]:
    """Legal schedules for `m` tokens, the predicted best first."""
    found = {s: predict(spec, s, target, m) for s in space(spec, target, m) if illegal(spec, s, target) is None}
    return sorted(found, key=lambda s: (found[s], str(s)))


def space(spec: KernelSpec, target: Target, m: int) -> Iterator[Schedule]:
    """Schedules worth considering for `m` tokens, legal or not."""
    if spec.vector:
        yield from _vector_space(spec, target, m)
        return
    if m <= 4 and spec.compute == "float":
        yield from _gemv_space(spec, target, m)
    yield from _dot_space(spec, target, m)


def _splits(spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> Iterator[Schedule]:
    """The schedule, and its split versions while there are fewer programs than four a multiprocessor."""
    tiles = _tiles(spec, schedule)
    programs = math.ceil(m / schedule.tile_m) * tiles.n_tiles
    for split in (1, 2, 4, 8, 16):
        if split == 1 or (programs * split <= 4 * gpu_of(target).multiprocessors and split * 2 <= tiles.steps):
            yield replace(schedule, split_k=split)


def _gemv_space(spec: KernelSpec, target: Target, m: int) -> Iterator[Schedule]:
    tile_m = 1 << (m - 1).bit_length()
    for tile_n, tile_k, warps in product((16, 32, 64, 128), (128, 256, 512, 1024), (2, 4, 8)):
        if tile_k > max(spec.blocks * 32, 128) or tile_n * tile_k // 32 < warps * 32:
            continue
        base = Schedule(tile_m, tile_n, tile_k, warps, 2).with_extra(gemv=1, scale_after=1, evict_first=1)
        yield from _splits(spec, base, target, m)


def _dot_space(spec: KernelSpec, target: Target, m: int) -> Iterator[Schedule]:
    heights = _heights(m)
    depths = (32,) if spec.compute == "int8" else (64, 128, 256)
    for tile_m, tile_n, tile_k, stages in product(heights, (64, 128, 256), depths, (2, 3, 4)):
        for warps, swap, after in product((4, 8), (0, 1), (0, 1)):
            if after and (spec.compute == "int8" or spec.fmt.offset):
                continue
            if tile_m >= 128 and (tile_k > 128 or warps == 4):
                continue
            base = Schedule(tile_m, tile_n, tile_k, warps, stages).with_extra(swap=swap)
            if after:
                base = base.with_extra(scale_after=1)
                if not tiles_of(spec, base).one_group:
                    continue
            if m <= 64:
                base = base.with_extra(evict_first=1)
            yield from _splits(spec, base, target, m)


def _heights(m: int) -> list[int]:
    return [h for h in (16, 32, 64, 128, 256) if h < 2 * m and h >= min(m, 64) // 2] or [16]


def _vector_space(spec: KernelSpec, target: Target, m: int) -> Iterator[Schedule]:
    if m <= 4:
        tile_m = 1 << (m - 1).bit_length()
        for tile_n, tile_k, warps in product((16, 32, 64, 128), (32, 64, 128, 256), (2, 4, 8)):
            base = Schedule(tile_m, tile_n, tile_k, warps, 2).with_extra(gemv=1)
            if tile_n * tile_k // vector_tiles_of(spec, base).lanes >= warps * 32:
                yield from _splits(spec, base, target, m)
    fmt = spec.vector
    assert fmt is not None
    # Addresses of residuals and of vectors in pieces take the registers that the largest accumulators need.
    plain = not fmt.residual and fmt.dim & (fmt.dim - 1) == 0
    heights = [h for h in _heights(m) if h < 256 or plain] or [128]
    for tile_m, tile_n, tile_k, stages in product(heights, (64, 128, 256), (32, 64), (2, 3, 4)):
        for warps, swap in product((4, 8), (0, 1)):
            if tile_m < 128 or warps == 8:
                base = Schedule(tile_m, tile_n, tile_k, warps, stages).with_extra(swap=swap)
                yield from _splits(spec, base, target, m)
