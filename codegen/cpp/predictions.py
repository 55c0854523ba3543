"""How long a call of a kernel of a scalar format should take."""

from __future__ import annotations

import math

from lowbit.codegen.cpp.bf16 import bf16_lookup
from lowbit.codegen.cpp.lut_plan import lut_steps
from lowbit.codegen.cpp.machines import MACHINES, Machine
from lowbit.codegen.cpp.plan import PANEL, Plan

__all__ = ["predict"]

_FILL = 10.0  # cycles that filling one table of sums takes
_BF16_END = 2.0  # operations that bring a vector of sums of bfloat16 products to the results
_STATES = {1: 19.0, 2: 29.0}  # operations that make 64 values of states, by planes; 5 more as bytes
_NEAR = 2**20  # bytes of tables that caches of a core hold
_SIDE_BYTES = {"f32": 4, "f16": 2, "e8m0": 1, "e4m3": 1}


def predict(plan: Plan, arch: str, m: int) -> float:
    """Seconds of one call on one core with cold weights, from the bytes read and the operations issued.

    The constants were fitted to `bench/results/cpu*.json`; a test compares every row of these files.
    """
    cpu, spec = MACHINES[arch], plan.spec
    weights, fmt = spec.rows * spec.blocks * 32, spec.fmt
    sides = _SIDE_BYTES[spec.scale_dtype] * (1 + fmt.offset) + fmt.zero
    read = weights * fmt.bits / 8 + spec.rows * spec.groups * sides
    # One stream leaves the memory system a fifth idle; fetching ahead bridges page boundaries.
    streams, ahead = plan.np * len(plan.planes), plan.buffered or plan.prefetch
    memory = read / (cpu.bandwidth * 1e9 * (1 - 0.2 / streams) * (1.0 if ahead else 0.93))
    compute = _cycles(plan, cpu, m, weights) / (cpu.ghz * 1e9)
    activations = m * spec.k * 1e-10 + (_tables(plan, cpu, m) if plan.lut else 0.0)
    return _together(plan, cpu, memory, compute) + activations + 2e-6


def _together(plan: Plan, cpu: Machine, memory: float, compute: float) -> float:
    """Seconds of waiting for memory and of computing, of which the one hides most of the other."""
    if cpu.halves and not plan.buffered and not plan.lut:
        return float((memory**3 + compute**3) ** (1 / 3))  # what is fetched far ahead hides more
    # Decoding into a buffer waits for memory, less where it is fetched ahead; registers are filled while it works.
    decoding = 0.3 if plan.prefetch else 0.6 if cpu.halves else 1.0
    overlap = decoding if plan.buffered else cpu.overlap
    return max(memory, compute) + overlap * min(memory, compute)


def _cycles(plan: Plan, cpu: Machine, m: int, weights: int) -> float:
    """Cycles of decoding and multiplying `weights` padded weights with `m` tokens."""
    digits, tiles = _digits(plan), math.ceil(m / plan.tile_m)
    vectors, parts = weights / (64 if plan.integer else 32 if plan.bf16 else 16), plan.spec.parts
    sums = plan.np * plan.tile_m * plan.accs * _held(plan, cpu)
    if plan.buffered:
        # A fused multiply-add keeps the only wide multiplier busy, as a dot product does.
        product = digits * _dot(plan, cpu) if plan.integer else 1.05 * cpu.bf16 if plan.bf16 else cpu.fma
        # A broadcast to 32 bytes serves both registers of a vector.
        spread = plan.tile_m * (0.5 if cpu.halves else 1.0)
        loads, end = vectors * tiles * digits * (1 + spread / plan.np), cpu.end
        # Beside the weights of two panels, four sums of two registers each leave too few; there is no room for more.
        tile, spill = plan.np * plan.tile_m, 1.0
        if cpu.halves and plan.np > 1 and tile > 2:
            spill = 1.04 if tile <= cpu.sums else 1.3
        operations = vectors * (math.ceil(m / plan.tokens) * _decode(plan, cpu) + m * product) * spill
        operations += 0.25 * loads if cpu.halves else 0.0  # they take turns in being issued
    elif plan.lut:
        # One port sorts, looks up and spreads bytes, which the others wait for.
        # Sums of several tokens do not fit in registers, their tables not in the nearest cache.
        spill = 1.75 if plan.tile_m > 1 else 1.25 if m > 1 else 1.0
        operations = vectors * plan.spec.fmt.bits * (tiles + 1.75 * m * digits) * spill
        loads, end = vectors * plan.spec.fmt.bits * (tiles / 8 + m * digits / 2), 8.5 + 6 * digits * len(plan.planes)
    else:
        # Sums that do not fit in registers are stored and loaded for every block.
        spill = 1.0 if sums <= 1.5 * cpu.sums else 1.4
        product = digits * _dot(plan, cpu) + bool(plan.magnitudes) if plan.integer else cpu.bf16 if plan.bf16 else 1
        operations = vectors * (tiles * _decode(plan, cpu) + m * product) * spill
        shared = min(2, plan.np) if plan.bf16 else 1  # panels that read a broadcast
        loads = vectors * tiles * (plan.spec.fmt.bits / 8 + plan.tile_m * digits / shared)
        end = (4.5 if plan.scaled_once else 8.5) + 2 * (plan.residues - 1) * digits
    ends = plan.spec.rows / PANEL * plan.spec.chunks * m * (end if parts == 1 else 2 + 0.8 * end * parts)
    if plan.bf16:  # sums are floats, and no scale of activations meets them
        each = 1 / plan.together if plan.buffered else parts
        ends = plan.spec.rows / PANEL * plan.spec.chunks * m * each * _BF16_END
    # Sixteen registers hold one panel's codes and sums best.
    wide = 0.15 * math.log2(plan.np) if cpu.halves and not plan.buffered and not plan.lut else 0.0
    return max((operations * (1 + wide) + ends * (1 + 2 * wide)) / cpu.ops, loads / cpu.loads)


def _digits(plan: Plan) -> int:
    """Products of 64-byte vectors that one of weights with a token takes; words are half as many at once."""
    if plan.words:
        return 2
    weights = len(plan.magnitudes.digits if plan.magnitudes else plan.levels.digits) if plan.integer else 1
    return max(1, plan.digits) * weights


def _held(plan: Plan, cpu: Machine) -> int:
    """What one running sum takes in registers, with its share of what decoding needs: as much again for words that
    are looked up without VBMI, and where there are 16 registers for codes of two planes."""
    if not plan.integer or not cpu.halves:
        return cpu.held if plan.words else _digits(plan)
    crowded = plan.containers > 1 and not plan.magnitudes
    return (1 if plan.words else _digits(plan)) * (1 + crowded)


def _dot(plan: Plan, cpu: Machine) -> float:
    """Operations of one such product."""
    if plan.words:
        return cpu.word
    if plan.shorts:
        # Adding up 16-bit numbers takes one operation less, which waits for nothing, and two now and then.
        # Sums that end within a block begin without an addition.
        return cpu.dot - 0.6 + sum((1 if steps < 8 else 2) / steps for steps in plan.shorts) / len(plan.shorts)
    digits = plan.magnitudes.digits if plan.magnitudes else plan.levels.digits
    return cpu.dot * (2 if cpu.halves and not cpu.full and max(map(max, digits)) > 127 else 1)


def _tables(plan: Plan, cpu: Machine, m: int) -> float:
    """Seconds of filling the tables of `m` tokens, four a step, and of reading them again for every unit where no cache
    close by holds them all."""
    steps = plan.spec.blocks // plan.spec.terms * len(lut_steps(plan.spec.layout_, plan.spec.fmt.bits))
    size = m * plan.chunk_rows * plan.digits * plan.lut_bytes
    again = plan.units * size / (2e9 * cpu.bandwidth) if size > _NEAR else 0.0
    return 4 * _FILL * m * plan.digits * steps / (cpu.ghz * 1e9) + again


def _decode(plan: Plan, cpu: Machine) -> float:
    """Operations that turn words into one vector of weights."""
    planes, wide = plan.containers, not cpu.halves
    if plan.spec.fmt.element.window > 1:
        made = _STATES[len(plan.planes)]
        return made if plan.words else made + 5 if plan.integer else made / 4
    if plan.bf16:
        found = bf16_lookup(plan.spec.fmt.element)
        return (
            (3.5 if found and found.bytewise else 1.0)
            + planes * cpu.unpack / 2
            + 5.0 * plan.folded
            + 2.0 * plan.buffered
        )
    if not plan.integer:
        return (2.0 * planes + 0.3) * (1.0 if wide or plan.buffered else 2.2)
    unpacked = (cpu.unpack - 0.5 * (plan.residues > 1)) * planes
    if plan.magnitudes:
        index = 2.0 if plan.spec.layout_.whole else 3.0  # most whole codes are their own
        return unpacked + index + 2.0 * len(plan.magnitudes.digits) + 6.0 * plan.words
    # Halves of larger tables are looked up and picked from; words are put together from digits.
    bits = plan.spec.fmt.bits
    each = 0.6 if wide or bits < 5 else 2.0 if bits == 5 else 4.0
    digits = len(plan.levels.digits)
    words = 0.0 if wide or not plan.words else 1.0 if digits == 1 else 9.0
    return unpacked + (0.0 if plan.levels.plain else each * digits) + words
