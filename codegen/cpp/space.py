"""Schedules worth measuring on a CPU, and why a schedule cannot run there.

`schedules` and `vector_schedules` name the few tiles that predictions are trusted to tell apart. What the predictions
do not see (caches, prefetchers, how many threads there are) is what the rest of the space varies.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from lowbit.codegen.cpp.bytes_plan import PERMUTED, BytesPlan, vector_plan
from lowbit.codegen.cpp.input_plan import ROWS, SUMLESS, InputPlan, SumsPlan, looks_sums_up
from lowbit.codegen.cpp.lut_plan import lut_problem
from lowbit.codegen.cpp.machines import (
    BF16_ARCHES,
    LUT_ARCHES,
    MACHINES,
    SHORT_ARCHES,
    SIGN_ARCHES,
    WORD_ARCHES,
)
from lowbit.codegen.cpp.plan import MADE, PANEL, Plan, magnitudes, plain_codes, short_steps
from lowbit.codegen.cpp.schedules import FARTHEST, multiplies_bf16, schedules
from lowbit.codegen.cpp.vector_plan import VectorPlan
from lowbit.codegen.cpp.vector_schedules import byte_words, far_ahead, permute_of, vector_schedules
from lowbit.codegen.schedule import Schedule, m_class
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError

__all__ = ["illegal", "space"]

_REGISTERS = {arch: 32 if arch.startswith("avx512") else 16 for arch in MACHINES} | {"generic": 8}
_MOST_DIRECT, _LEAST_BUFFERED = 16, 3  # tokens for which the one and the other shape are worth a look
_FETCHING = 64  # tokens up to which buffered kernels wait for weights
_TILE_SUMS = 8  # vectors of sums of 64 rows, as words and as wider numbers


def space(spec: KernelSpec, arch: str, m: int) -> Iterator[Schedule]:
    """Schedules worth considering for `m` tokens, legal or not; the trusted ones first."""
    tokens = m_class(m)
    if spec.vector and spec.vector.axis == "in":
        yield from vector_schedules(spec, arch, m)
        yield from _input_space(spec, arch, tokens)
        return
    if spec.vector:
        yield from vector_schedules(spec, arch, m)
        found = list(_vector_space(tokens, (8,) if spec.limbs else (1, 2, 4, 8)))
        found += [s.with_extra(words=1) for s in found] if spec.limbs and byte_words(arch) else []
        if permute := permute_of(spec, arch):
            dim = max(part.dim for part in BytesPlan(spec, Schedule()).parts)
            found += _permuted(list(found), permute, dim)
        yield from (far_ahead(s, arch) if spec.limbs else s for s in found)
        return
    yield from schedules(spec, arch, m)
    if tokens <= _MOST_DIRECT and arch in LUT_ARCHES and lut_problem(spec) is None:
        yield from _lut(spec, tokens)
    for word in _word_kinds(spec, arch):
        if tokens <= _MOST_DIRECT:
            yield from _direct(spec, arch, tokens, word)
        if tokens >= _LEAST_BUFFERED or arch == "generic":
            yield from _buffered(spec, arch, tokens, word)
    if multiplies_bf16(spec, arch):
        found = list(_direct(spec, arch, tokens, 0)) if tokens <= _MOST_DIRECT else []
        found += _buffered(spec, arch, tokens, 0) if tokens >= _LEAST_BUFFERED else []
        yield from (s.with_extra(bf16=1) for s in found if s.get("residues", 1) == 1)


def _direct(spec: KernelSpec, arch: str, tokens: int, words: int) -> Iterator[Schedule]:
    heights = [h for h in (1, 2, 4, 8) if h <= tokens]
    plain = not words and plain_codes(spec)
    residues = ((2, 1), (1, 2), (1, 3), (1, 4)) if plain else ((2, 1),)
    splits = ((1, 1), *residues)
    for height, panels, split, prefetch in product(heights, (1, 2, 4), splits, (0, 512, 1024, 2048, 4096)):
        found = Schedule(height, panels * PANEL, spec.chunk_blocks * 32)
        found = found.with_extra(accs=split[0], prefetch=prefetch)
        found = found.with_extra(residues=split[1]) if split[1] > 1 else found
        if arch in SHORT_ARCHES and split == (1, 1) and not words and short_steps(spec):
            yield found.with_extra(shorts=1)
        if arch in SIGN_ARCHES and split == (1, 1) and not words and (tables := magnitudes(spec)):
            yield found.with_extra(signs=1)
            if arch in SHORT_ARCHES and short_steps(spec, tables):
                yield found.with_extra(signs=1, shorts=1)
        yield found.with_extra(words=words) if words else found


def _lut(spec: KernelSpec, tokens: int) -> Iterator[Schedule]:
    for height, panels, prefetch in product([h for h in (1, 2, 4) if h <= tokens], (1, 2, 4), (0, 512, 1024, 2048)):
        yield Schedule(height, panels * PANEL, spec.chunk_blocks * 32).with_extra(lut=1, prefetch=prefetch)


def _word_kinds(spec: KernelSpec, arch: str) -> tuple[int, ...]:
    """Values of `words` that may be legal."""
    if not spec.limbs or arch not in WORD_ARCHES or (spec.limbs == 1 and MACHINES[arch].full):
        return (0,)
    return (0, 1) if arch.startswith("avx512") else (0, 2, MADE)


def _buffered(spec: KernelSpec, arch: str, tokens: int, words: int) -> Iterator[Schedule]:
    ahead = (0, 2048) if tokens <= _FETCHING else (0,)
    for height, panels, block, prefetch in product((2, 4, 6, 8, 12), (1, 2, 3, 4, 6), (48, 96, 192, 384), ahead):
        if height <= tokens and (block <= 2 * tokens or block == 48):
            found = Schedule(height, panels * PANEL, spec.chunk_blocks * 32).with_extra(buffered=1, tokens=block)
            found = found.with_extra(prefetch=prefetch) if prefetch else found
            if arch in SHORT_ARCHES and not words and short_steps(spec):
                yield found.with_extra(shorts=1)
            yield found.with_extra(words=words) if words else found


def _vector_space(tokens: int, passes: tuple[int, ...]) -> Iterator[Schedule]:
    if tokens <= _MOST_DIRECT:
        for height, vectors in product([h for h in (1, 2, 4, 8) if h <= tokens], passes):
            yield Schedule(height, PANEL).with_extra(vectors=vectors)
    if tokens >= _LEAST_BUFFERED:
        for height, panels, block in product((2, 4, 6, 8), (1, 2, 3, 4), (96, 192, 264, 528)):
            if height <= tokens:
                yield Schedule(height, panels * PANEL).with_extra(buffered=1, tokens=block)


def _input_space(spec: KernelSpec, arch: str, tokens: int) -> Iterator[Schedule]:
    if tokens <= _MOST_DIRECT and looks_sums_up(spec) and arch not in SUMLESS:
        for height, tiles in product([h for h in (1, 2, 4, 8) if h <= tokens], (1, 2)):
            yield far_ahead(Schedule(height, tiles * ROWS).with_extra(sums=1), arch)
    yield from _vector_space(tokens, (2, 4, 8))


def _permuted(loaded: list[Schedule], permute: int, dim: int) -> Iterator[Schedule]:
    """The same with permutes; direct kernels with some of at most `dim` coordinates at a time, or all."""
    for schedule in loaded:
        if schedule.get("buffered", 0):
            yield schedule.with_extra(permute=permute)
        else:
            for coordinates in (2, *(c for c in (4, 8, 16) if c < 2 * dim)):
                yield Schedule(schedule.tile_m, coordinates * PANEL).with_extra(permute=permute)


def illegal(spec: KernelSpec, schedule: Schedule, arch: str) -> str | None:
    """Why `schedule` cannot run `spec` on an instruction set, or None."""
    if "silu_mul" in spec.epilogue and not spec.vector and schedule.tile_n % (2 * PANEL):
        return f"gate and up rows go in pairs of panels, and {schedule.tile_n} rows are no whole pairs"
    try:
        plan: Plan | VectorPlan = vector_plan(spec, schedule) if spec.vector else Plan(spec, schedule)
    except KernelError as e:
        return e.message
    if isinstance(plan, InputPlan) and (why := _no_input(plan, arch)):
        return why
    if schedule.tile_n % PANEL:
        return f"{schedule.tile_n} rows are not whole panels of {PANEL}"
    if not plan.buffered and arch == "generic" and not isinstance(plan, SumsPlan):
        return "kernels that decode into registers need vector units: unrolled without, they take minutes to compile"
    sums, room = _sums(plan), _REGISTERS[arch] - 4
    if sums > max(room, _least_sums(plan)):
        return f"{sums} running sums and what they are made of need more than {_REGISTERS[arch]} registers"
    if isinstance(plan, Plan):
        return _no_plan(plan, arch)
    return _no_bytes(plan, arch) if isinstance(plan, BytesPlan) else None


def _sums(plan: Plan | VectorPlan) -> int:
    """Running sums of one register tile."""
    if isinstance(plan, SumsPlan):
        return _TILE_SUMS * plan.pass_tiles
    if isinstance(plan, BytesPlan):
        most = max((len(sweep) for part in plan.parts for sweep in plan.sweeps(part)), default=1)
        return plan.tile_m * (plan.np if plan.buffered else most * plan.digits)
    if isinstance(plan, VectorPlan):
        wide = max((part.lanes for part in plan.parts), default=16) / 16
        return int(plan.tile_m * (plan.np if plan.buffered else max(1, plan.vectors * wide)))
    if plan.lut:
        return plan.tile_m * plan.np * plan.digits * len(plan.planes)
    each = 2 if plan.half_factor is not None and not plan.buffered else max(1, plan.digits)
    scaled = 2 if plan.buffered and plan.integer and plan.spec.parts > 1 else 1  # a float beside every sum
    return plan.tile_m * plan.np * max(plan.accs, plan.residues) * (1 if plan.buffered else each) * scaled


def _least_sums(plan: Plan | VectorPlan) -> int:
    """Sums of the smallest tile there is, which runs anyway: what does not fit lies in memory."""
    if isinstance(plan, VectorPlan):
        return _TILE_SUMS if isinstance(plan, SumsPlan) else 0
    return (2 if plan.silu else 1) * max(2, plan.digits)


def _no_input(plan: InputPlan, arch: str) -> str | None:
    if isinstance(plan, SumsPlan):
        if not looks_sums_up(plan.spec):
            return f"no tables of sums of {plan.spec.compute} products with {plan.spec.format} weights"
        if arch in SUMLESS:
            return f"sums are looked up by permutes of words, which {arch} has not"
        return None if plan.schedule.tile_n % ROWS == 0 else f"{plan.schedule.tile_n} rows are not tiles of {ROWS}"
    return None


def _no_bytes(plan: BytesPlan, arch: str) -> str | None:
    if plan.words and not byte_words(arch):
        return f"codebooks of bytes are multiplied as words where there is no other way, and {arch} has another"
    if not plan.permute:
        return None
    if plan.permute > (most := PERMUTED.get(arch, 0)):
        return f"permutes of {arch} look up {most} centroids, not {plan.permute}"
    return None if plan.permutes else f"no part of {plan.spec.format} has at most {plan.permute} centroids"


def _no_lut(plan: Plan, arch: str) -> str | None:
    if arch not in LUT_ARCHES:
        return f"sums are looked up by instructions of {' and '.join(LUT_ARCHES)}"
    most = {"words": 0, "shorts": 0, "accs": 1, "residues": 1}
    if not plan.lut or any(plan.schedule.get(name, 0) > value for name, value in most.items()):
        return "sums that are looked up are neither of words or decoded chunks nor split"
    return None


def _no_plan(plan: Plan, arch: str) -> str | None:
    if plan.schedule.get("lut", 0) and (why := _no_lut(plan, arch)):
        return why
    if plan.prefetch > FARTHEST or plan.prefetch % 64:
        return f"{plan.prefetch} bytes ahead are not whole cache lines within {FARTHEST}"
    if plan.accs not in (1, 2):
        return f"sums are split in one or two, not in {plan.accs}"
    if plan.schedule.get("residues", 1) > 1 and (plan.residues == 1 or not MACHINES[arch].full):
        return "codes are multiplied where they stand as unsigned bytes of full range, by one instruction"
    if plan.schedule.get("shorts", 0) and (not plan.shorts or arch not in SHORT_ARCHES):
        return "pairs of products are added up as 16-bit numbers where dot products of bytes are made of such pairs"
    signed = plan.magnitudes is not None and not plan.words and plan.residues == 1 and arch in SIGN_ARCHES
    if plan.schedule.get("signs", 0) and not signed:
        return "signs are given to activations of one digit where magnitudes of five bits are bytes, and by AVX2"
    if plan.unit > plan.slots:
        return f"a unit of {plan.unit} panels is larger than the matrix, which has {plan.slots}"
    if plan.bf16 and (why := _no_bf16(plan, arch)):
        return why
    return _no_words(plan, arch) if plan.words else None


def _no_bf16(plan: Plan, arch: str) -> str | None:
    if arch not in BF16_ARCHES:
        return f"dot products of bfloat16 numbers are instructions of {' and '.join(BF16_ARCHES)}"
    if any(plan.schedule.get(name, 0) for name in ("words", "lut", "residues", "shorts", "signs")):
        return "products are of bfloat16 numbers or of integers"
    return None


def _no_words(plan: Plan, arch: str) -> str | None:
    if arch not in WORD_ARCHES:
        return f"products of words are for instructions of {' and '.join(WORD_ARCHES)}"
    if plan.spec.limbs != 2 and MACHINES[arch].full:
        return "bytes of full range have dot products, which digits of one byte take"
    kind = plan.schedule.get("words", 0)
    if kind == MADE:
        known = arch in SIGN_ARCHES and plan.magnitudes and len(plan.magnitudes.digits) > 1
        return None if known else "words are made of magnitudes of two digits, by AVX2"
    if len(plan.levels.digits) == 1 or kind == 2:
        return None
    if not arch.startswith("avx512"):
        return f"{arch} looks up bytes, not words"
    if plan.word_table is None:
        return f"no table of 16-bit words holds the integers of {plan.spec.format}"
    return None
