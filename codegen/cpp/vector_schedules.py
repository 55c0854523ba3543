"""Tiles to try for kernels of vector formats, and how long a call should take."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lowbit.codegen.cpp.bytes_plan import BytesPlan
from lowbit.codegen.cpp.plan import PANEL
from lowbit.codegen.cpp.schedules import MACHINES, TILES, Machine
from lowbit.codegen.cpp.vector_plan import TILE, Book, VectorPlan
from lowbit.codegen.schedule import Schedule, m_class
from lowbit.codegen.spec import KernelSpec

__all__ = ["vector_predict", "vector_schedules"]


def vector_schedules(spec: KernelSpec, arch: str, m: int) -> Iterator[Schedule]:
    """Legal schedules for `m` tokens: direct kernels for up to 8, buffered ones from 4 on (`generic`: always)."""
    tokens, cpu = m_class(m), MACHINES[arch]
    assert spec.vector is not None
    if spec.limbs:
        yield from _bytes_schedules(spec, arch, tokens)
        return
    if tokens <= 8 and arch != "generic":
        registers = 24 if cpu.sums > 8 else 10 if spec.vector.dim <= 8 else 5
        for height in dict.fromkeys((tokens, max(1, tokens // 2))):
            vectors = next((v for v in (8, 4, 2) if v * height <= registers), 1)
            yield Schedule(height, PANEL).with_extra(vectors=vectors)
    if tokens > 2 or arch == "generic":
        for height, panels in dict.fromkeys((*TILES[cpu.sums], *([(8, 3)] if cpu.sums > 8 else []))):
            shape = (min(height, tokens), panels * PANEL)
            yield Schedule(*shape).with_extra(buffered=1, tokens=192)


def _bytes_schedules(spec: KernelSpec, arch: str, tokens: int) -> Iterator[Schedule]:
    """Of products of bytes: looking up and sorting a step costs as much as six tokens' products."""
    cpu = MACHINES[arch]
    height = max(1, min(tokens, cpu.sums // (4 * spec.limbs)))
    if tokens <= 4 and arch != "generic":
        yield Schedule(height, PANEL).with_extra(vectors=8)
    if tokens > 2 or arch == "generic":
        for rows, panels in dict.fromkeys(TILES[cpu.sums]):
            yield Schedule(min(rows, tokens), panels * PANEL).with_extra(buffered=1, tokens=192)


def _bytes_predict(plan: BytesPlan, cpu: Machine, m: int) -> float:
    """Cycles of products of bytes. Lookups are one a cycle where the codebook leaves room in the first-level cache."""
    cycles = 0.0
    for part in plan.parts:
        vectors = sum(part.tiles) * TILE * part.columns
        reuse = math.ceil(m / (plan.tokens if plan.buffered else plan.tile_m))
        for book in part.books:
            nbytes = book.size * book.lanes
            looked = 1.12 if nbytes <= 1 << 14 else 1.29 if nbytes <= 1 << 15 else 1.8 if nbytes <= 1 << 19 else 3.0
            # Panels are stored, and with activations and sums take the codebook's place in the cache.
            looked += plan.buffered * (0.35 if nbytes <= 1 << 14 else 0.8)
            slow = 1.0 if cpu.sums > 8 else 2.0
            cycles += vectors * (reuse * looked * slow + m * plan.digits * part.lanes / 64 * cpu.dot / cpu.ops)
    return cycles


def vector_predict(plan: VectorPlan, arch: str, m: int) -> float:
    """Seconds of one call on one core: lookups, which do not wait for memory, and products."""
    cpu = MACHINES[arch]
    if isinstance(plan, BytesPlan):
        return _bytes_predict(plan, cpu, m) / (cpu.ghz * 1e9) + m * plan.spec.k * 1e-10 + 2e-6
    cycles = 0.0
    for part in plan.parts:
        vectors = sum(part.tiles) * TILE * part.columns
        if plan.buffered:
            looked, reuse = 0.76, math.ceil(m / plan.tokens)  # stores do not wait for sums
            products = vectors * part.dim / 16 * m * _tile_cycles(plan, cpu)
        else:
            looked, reuse = 1.0, math.ceil(m / plan.tile_m)
            products = vectors * max(0.0, m - reuse) * max(0.5, part.lanes / 16 / cpu.ops)
        cycles += products + vectors * reuse * sum(looked * _lookup(b) for b in part.books)
    widened = sum(b.wide_bytes for b in plan.books) / 32
    return (cycles + widened) / (cpu.ghz * 1e9) + m * plan.spec.k * 1e-10 + 2e-6


def _lookup(book: Book) -> float:
    """Cycles of one lookup by where the codebook lies: first or second level cache, or beyond."""
    nbytes = book.size * (book.lanes * 4 if book.wide else book.dim * 2)
    return 1.5 if nbytes <= 1 << 14 else 2.0 if nbytes <= 1 << 18 else 2.4


def _tile_cycles(plan: VectorPlan, cpu: Machine) -> float:
    """Cycles of 16 products in a buffered kernel: multiplications, or loads of weights and activations."""
    width = plan.panels / len(plan.widths)
    # One wide multiplier, as in `schedules.predict`.
    return 2 * max(1 / cpu.ops, (1 / plan.tile_m + 1 / width) / cpu.loads)
