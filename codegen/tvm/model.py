"""Schedules, and how long a call should take: operations of vectors, counted off the decode programs, and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tvm.plan import plan_of
from lowbit.codegen.tvm.printing import LANES
from lowbit.compiler.ir.program import Program

__all__ = ["illegal", "predict", "schedules", "space"]

_REGISTERS = {"avx512": 30, "avx2": 14, "neon": 28, "generic": 12}
"""Registers of a vector's width for sums, by the beginning of the instruction set's name; vectors take `_HALVES`."""
_HALVES = {"avx512": 1, "avx2": 2, "neon": 4, "generic": 4}

_MOST_SUMS = 15
"""Vectors of sums in one array: TVM leaves less than a kilobyte on the stack."""
_CHUNK = 256
"""Columns decoded at once: 16 KB, half of a first-level cache."""
_FEW = 16
"""Tokens up to which registers are worth a try."""

_CLOCK, _RATE = 3.1e9, 2.6
"""Cycles a second, and operations on registers a cycle; what is below was measured on Zen 3 cores."""
_PRODUCT = 1.4
"""Operations of one multiply-add, its share of loads included."""
_SPILL = 2.2
"""How much longer they take where sums do not fit in registers."""
_LOOKUPS = 40.0
"""Operations of reading 16 entries of a table one by one."""
_BANDWIDTH = 12e9
_CALL = 3e-5
"""Seconds of Python around a call."""


def _of_arch(table: dict[str, int], arch: str) -> int:
    return next(value for name, value in table.items() if arch.startswith(name))


def space(spec: KernelSpec, arch: str, m: int) -> Iterator[Schedule]:
    """Schedules worth considering for `m` tokens, legal or not."""
    for height in [h for h in (1, 2, 3, 4, 6, 8, 12) if h < 2 * m] or [1]:
        for side_by_side in (1, 2, 4):
            if m <= _FEW:
                yield Schedule(height, LANES * side_by_side, _CHUNK)
        if m > 1:
            yield Schedule(height, LANES, _CHUNK).with_extra(buffered=1)


def illegal(spec: KernelSpec, schedule: Schedule) -> str | None:
    """Why a schedule is no kernel, or None."""
    plan = plan_of(spec, schedule)
    if schedule.tile_m < 1 or schedule.tile_n < LANES or schedule.tile_n % LANES or schedule.tile_k % 32:
        return f"tiles are of whole panels of {LANES} rows and blocks of 32 columns"
    if plan.buffered and schedule.tile_n != LANES:
        return "decoded weights are those of one panel"
    cells = schedule.tile_m * (1 if plan.buffered else plan.panels)
    if cells > _MOST_SUMS:
        return f"{cells} vectors of sums are more than {_MOST_SUMS}"
    return None


def schedules(spec: KernelSpec, arch: str, m: int) -> list[Schedule]:
    """The best of `space` for `m` tokens, by predicted time."""
    found = [s for s in dict.fromkeys(space(spec, arch, m)) if illegal(spec, s) is None]
    return sorted(found, key=lambda s: (predict(spec, s, arch, m), str(s)))


def predict(spec: KernelSpec, schedule: Schedule, arch: str, m: int) -> float:
    """Seconds of one call on one core with cold weights."""
    plan, halves = plan_of(spec, schedule), _of_arch(_HALVES, arch)
    vectors, tiles = spec.rows * plan.columns / LANES, math.ceil(m / schedule.tile_m)
    counted, lookups = _operations(plan.program(0))
    decode = halves * (counted - plan.late) + lookups * _LOOKUPS
    sums = halves * schedule.tile_m * (1 if plan.buffered else plan.panels)
    product = halves * _PRODUCT * (1.0 if sums <= _of_arch(_REGISTERS, arch) else _SPILL)
    multiply = tiles * schedule.tile_m * product
    operations = decode + halves * (2 + tiles) + multiply if plan.buffered else tiles * decode + multiply
    compute = vectors * operations / (_RATE * _CLOCK)
    memory = vectors * LANES * spec.fmt.bits / 8 / _BANDWIDTH * (1 if plan.buffered else tiles)
    return max(compute, memory) + 0.5 * min(compute, memory) + _CALL


@cache
def _operations(program: Program) -> tuple[int, int]:
    """(operations of a vector, lookups in tables) of a program; names and constants are none."""
    names = [op.name.removeprefix("lbk.") for op in program.region.block.ops]
    free = ("const", "int", "arg", "yield", "lut")
    return sum(_COSTS.get(name, 1) for name in names if name not in free), names.count("lut")


_COSTS = {"half": 3}
