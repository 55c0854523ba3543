"""Which tiles to try for a number of tokens, and how long a call should take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lowbit.codegen.cpp.lut_plan import lut_problem, lut_steps
from lowbit.codegen.cpp.plan import PANEL, Plan, half_factor, short_steps
from lowbit.codegen.schedule import Schedule, m_class
from lowbit.codegen.spec import KernelSpec

__all__ = ["LUT_ARCHES", "MACHINES", "SHORT_ARCHES", "TILES", "Machine", "predict", "schedules"]


@dataclass(frozen=True)
class Machine:
    """Assumed speed of one core.

    ghz: clock under vector load. bandwidth: GB/s from memory with four or more streams. ops, loads: vector operations
    and loads a cycle, in 64-byte units. dot: operations one dot product takes. sums: running sums that fit in
    registers beside what decoding needs. full: byte dot products take one instruction, with unsigned bytes of any size.
    """

    ghz: float
    bandwidth: float
    ops: float
    loads: float
    dot: float
    sums: int
    full: bool = False


MACHINES = {
    # Measured on Cascade Lake cores with one 512-bit multiplier; others have two.
    "avx512vbmi": Machine(3.1, 13.0, 2.0, 2.0, 1.8, 16, True),
    "avx512vnni": Machine(3.1, 13.0, 2.0, 2.0, 1.8, 16, True),
    "avx512": Machine(3.1, 13.0, 2.0, 2.0, 5.0, 16),
    "avx2vnni": Machine(3.0, 12.0, 1.5, 1.0, 1.0, 4, True),
    "avx2": Machine(3.0, 12.0, 1.5, 1.0, 3.0, 4),
    # Two or four 16-byte pipes; not measured.
    "neondot": Machine(2.8, 12.0, 0.75, 0.5, 1.0, 4),
    "neon": Machine(2.8, 12.0, 0.75, 0.5, 6.0, 4),
    "generic": Machine(3.0, 12.0, 0.5, 0.5, 24.0, 2),
}
SHORT_ARCHES = ("avx512", "avx2")
"""Instruction sets whose byte dot products are sums of two steps, the first of 16-bit numbers."""
LUT_ARCHES = ("avx2vnni", "avx2")
"""Instruction sets with the lookups of `text/lut_avx2.h`."""
_FILL = 10.0  # cycles that filling one table of sums takes
_NEAR = 2**20  # bytes of tables that caches of a core hold
_SIDE_BYTES = {"f32": 4, "f16": 2, "e8m0": 1, "e4m3": 1}
TILES = {16: ((6, 4), (4, 4), (8, 2)), 4: ((2, 2), (4, 1), (1, 2)), 2: ((2, 1), (1, 2))}
"""Tokens x panels of buffered register tiles by the sums that fit: with one operation a sum and no decoding in the
loop, AVX-512 holds 24 sums beside 4 weights."""
_PART_TILES = {16: ((4, 3), (6, 2)), 4: ((2, 1), (1, 2)), 2: ((1, 1), (1, 2))}
"""The same where every sum has a float beside it, because blocks have several scales."""


def schedules(spec: KernelSpec, arch: str, m: int) -> Iterator[Schedule]:
    """Legal schedules for `m` tokens: direct kernels for up to 8, buffered ones from 4 on. Sums are looked up where dot
    products take several instructions.

    The generic instruction set has no direct kernels: unrolled vectors that the machine lacks take minutes to compile.
    """
    pair = 2 if "silu_mul" in spec.epilogue else 1
    tokens = m_class(m)
    if tokens <= 8 and arch != "generic":
        yield from _direct(spec, arch, tokens, pair)
        if arch in LUT_ARCHES and not MACHINES[arch].full and lut_problem(spec) is None:
            yield from _lut(spec, tokens, pair)
    if tokens > 2 or arch == "generic":
        yield from _buffered(spec, arch, tokens, pair)


def _direct(spec: KernelSpec, arch: str, tokens: int, pair: int) -> Iterator[Schedule]:
    words = _words(spec, arch, tokens)
    room, digits, most = MACHINES[arch].sums, _sums(spec, words), 4
    if not spec.limbs and half_factor(spec) is not None:
        # Two sums a row, and conversions that leave few registers.
        digits, most = 2, 2
    height = max(1, min(tokens, room // digits // pair))
    panels = [p for p in (4, 2, 1) if p <= most and p % pair == 0 and (p == pair or p * height * digits <= room)]
    shorts = arch in SHORT_ARCHES and short_steps(spec) > 0
    # Few panels are better split evenly over threads than streamed side by side.
    panels = [p for p in panels if p == pair or spec.rows // PANEL >= 8 * p]
    for p in panels[:2]:
        accs = max(1, min(2, room // (p * height * digits) // 2))
        residues = 1 if words else _residues(spec, arch, room // (p * height * digits))
        accs = 1 if residues > 1 else accs
        for prefetch in (1024, 0):
            found = Schedule(height, p * PANEL, spec.chunk_blocks * 32).with_extra(accs=accs, prefetch=prefetch)
            found = found.with_extra(shorts=1) if shorts and not words else found
            yield found.with_extra(words=1) if words else found.with_extra(residues=residues) if residues > 1 else found


def _lut(spec: KernelSpec, tokens: int, pair: int) -> Iterator[Schedule]:
    """Two sums at a time, as the best measured ones have: of two panels, or of one panel and two tokens."""
    for height, panels in ((1, 2), (1, 1)) if tokens == 1 else ((2, 1), (1, 2)):
        if panels % pair == 0:
            yield Schedule(height, panels * PANEL, spec.chunk_blocks * 32).with_extra(lut=1, prefetch=1024)


def _residues(spec: KernelSpec, arch: str, room: int) -> int:
    """Accumulators of a sum for codes that are multiplied where they stand: only byte dot products of full range, which
    machines without VNNI take three instructions for, multiply them so."""
    plain = spec.integer_levels is not None and spec.integer_levels.plain and spec.fmt.bits < 8
    return min(4, room) if spec.limbs and plain and spec.parts == 1 and MACHINES[arch].full else 1


def _words(spec: KernelSpec, arch: str, tokens: int) -> bool:
    """Whether 16-bit products are the better ones for two digits an activation: half as many instructions as products
    of digits when weights have two as well, and half as many sums to bring together at the end of short groups. For
    single tokens decoding counts more; without AVX-512, whose shuffles look up words, always."""
    short = spec.parts > 1 or (spec.group_blocks == 1 and tokens > 16)
    several = short or (spec.integer_levels is not None and len(spec.integer_levels.digits) > 1)
    return spec.limbs == 2 and several and tokens > 1 and arch.startswith("avx512")


def _sums(spec: KernelSpec, words: bool) -> int:
    """Instructions that one exact product takes, and sums it is made of: words are half as many at once, and decoding
    them takes as many registers as another sum."""
    if words:
        return 2
    weights = len(spec.integer_levels.digits) if spec.limbs and spec.integer_levels else 1
    return max(1, spec.limbs) * weights


def _buffered(spec: KernelSpec, arch: str, tokens: int, pair: int) -> Iterator[Schedule]:
    words = _words(spec, arch, tokens)
    for height, panels in (_PART_TILES if spec.limbs and spec.parts > 1 else TILES)[MACHINES[arch].sums]:
        if panels % pair == 0 or panels < pair:
            shape = (min(height, tokens), max(pair, panels) * PANEL)
            found = Schedule(*shape, spec.chunk_blocks * 32).with_extra(buffered=1, tokens=192)
            yield found.with_extra(words=1) if words else found


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
    # Decoding into a buffer waits for memory; registers are filled while it works.
    overlap = 1.0 if plan.buffered else 0.56
    activations = m * spec.k * 1e-10 + (_tables(plan, cpu, m) if plan.lut else 0.0)
    return max(memory, compute) + overlap * min(memory, compute) + activations + 2e-6


def _cycles(plan: Plan, cpu: Machine, m: int, weights: int) -> float:
    """Cycles of decoding and multiplying `weights` padded weights with `m` tokens."""
    digits, tiles = _sums(plan.spec, plan.words), math.ceil(m / plan.tile_m)
    vectors, parts = weights / (64 if plan.integer else 16), plan.spec.parts
    sums = plan.np * plan.tile_m * digits * plan.accs
    if plan.buffered:
        # A fused multiply-add keeps the only wide multiplier busy, as a dot product does.
        operations = vectors * (
            math.ceil(m / plan.tokens) * _decode(plan) + m * digits * (cpu.dot if plan.integer else 2)
        )
        loads, end = vectors * tiles * digits * (1 + plan.tile_m / plan.np), 4.4
    elif plan.lut:
        # One port sorts, looks up and spreads bytes, which the others wait for.
        operations = vectors * plan.spec.fmt.bits * (tiles + 1.5 * m * digits)
        loads, end = vectors * plan.spec.fmt.bits * (tiles / 8 + m * digits / 2), 8.5 + 6 * digits * len(plan.planes)
    else:
        # Sums that do not fit in registers are stored and loaded for every block.
        spill = 1.0 if sums <= 1.5 * cpu.sums else 1.4
        # Adding up 16-bit numbers takes one operation less, which waits for nothing, and two now and then.
        dot = cpu.dot - 0.6 + 2 / plan.shorts if plan.shorts else cpu.dot
        operations = vectors * (tiles * _decode(plan) + m * digits * (dot if plan.integer else 1)) * spill
        loads = vectors * tiles * (plan.spec.fmt.bits / 8 + plan.tile_m * digits)
        end = 8.5 + 2 * (plan.residues - 1) * digits
    ends = plan.spec.rows / PANEL * plan.spec.chunks * m * (end if parts == 1 else 2 + 0.8 * end * parts)
    return max((operations + ends) / cpu.ops, loads / cpu.loads)


def _tables(plan: Plan, cpu: Machine, m: int) -> float:
    """Seconds of filling the tables of `m` tokens, four a step, and of reading them again for every unit where no cache
    close by holds them all."""
    steps = plan.spec.blocks * len(lut_steps(plan.spec.layout_, plan.spec.fmt.bits))
    size = m * plan.chunk_rows * plan.digits * plan.lut_bytes
    again = plan.units * size / (2e9 * cpu.bandwidth) if size > _NEAR else 0.0
    return 4 * _FILL * m * plan.digits * steps / (cpu.ghz * 1e9) + again


def _decode(plan: Plan) -> float:
    """Operations that turn words into one vector of weights."""
    if not plan.integer:
        return 2.0 * len(plan.planes) + 0.3
    looked_up = 0.0 if plan.levels.plain else 0.6 * len(plan.levels.digits)
    return (1.7 - 0.5 * (plan.residues > 1)) * len(plan.planes) + looked_up
