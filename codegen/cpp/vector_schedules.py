"""Tiles to try for kernels of vector formats, and how long a call should take."""

from __future__ import annotations

import math
from collections.abc import Iterator

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
    if tokens <= 8 and arch != "generic":
        registers = 24 if cpu.sums > 8 else 10 if spec.vector.dim <= 8 else 5
        for height in dict.fromkeys((tokens, max(1, tokens // 2))):
            vectors = next((v for v in (8, 4, 2) if v * height <= registers), 1)
            yield Schedule(height, PANEL).with_extra(vectors=vectors)
    if tokens > 2 or arch == "generic":
        for height, panels in dict.fromkeys((*TILES[cpu.sums], *([(8, 3)] if cpu.sums > 8 else []))):
            shape = (min(height, tokens), panels * PANEL)
            yield Schedule(*shape).with_extra(buffered=1, tokens=192)


def vector_predict(plan: VectorPlan, arch: str, m: int) -> float:
    """Seconds of one call on one core: lookups, which do not wait for memory, and products."""
    cpu = MACHINES[arch]
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
