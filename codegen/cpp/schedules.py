"""Which tiles to try for a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator

from lowbit.codegen.cpp.bf16 import bf16_problem
from lowbit.codegen.cpp.lut_plan import lut_problem
from lowbit.codegen.cpp.machines import (
    BF16_ARCHES,
    LUT_ARCHES,
    MACHINES,
    SHORT_ARCHES,
    SIGN_ARCHES,
    VBMI_ARCHES,
    WORD_ARCHES,
)
from lowbit.codegen.cpp.plan import MADE, PANEL, half_factor, level_magnitudes, magnitudes, plain_codes, short_steps
from lowbit.codegen.schedule import Schedule, m_class
from lowbit.codegen.spec import KernelSpec

__all__ = ["FARTHEST", "TILES", "multiplies_bf16", "schedules"]

FARTHEST = 4096
"""Bytes ahead of which fetching makes sense: what lies further away is evicted before it is read."""
_FEW = 4  # tokens
_SIGNED = 2  # tokens that are given the signs of weights
_SHARED = 264  # tokens that share decoded bfloat16 numbers
_TALL = 8  # tokens that words are multiplied with at a time
TILES = {16: ((6, 4), (4, 4), (8, 2)), 4: ((4, 1), (2, 2), (1, 2)), 2: ((2, 1), (1, 2))}
"""Tokens x panels of buffered register tiles by the sums that fit: with one operation a sum and no decoding in the
loop, AVX-512 holds 24 sums beside 4 weights."""
_PART_TILES = {16: ((4, 3), (6, 2)), 4: ((2, 1), (1, 2)), 2: ((1, 1), (1, 2))}
"""The same where every sum has a float beside it, because blocks have several scales."""


def schedules(spec: KernelSpec, arch: str, m: int) -> Iterator[Schedule]:
    """Legal schedules for `m` tokens: direct kernels for up to 8 or 32, buffered ones from 4 on. Sums are looked up
    where dot products take several instructions.

    The generic instruction set has no direct kernels: unrolled vectors that the machine lacks take minutes to compile.
    """
    pair = 2 if "silu_mul" in spec.epilogue else 1
    tokens = m_class(m)
    if tokens <= _most_direct(arch) and arch != "generic":
        yield from _direct(spec, arch, tokens, pair)
        if arch in LUT_ARCHES and not MACHINES[arch].full and lut_problem(spec) is None:
            yield from _lut(spec, tokens, pair)
    if tokens > 2 or arch == "generic":
        yield from _buffered(spec, arch, tokens, pair)


def _most_direct(arch: str) -> int:
    """Tokens up to which weights may be decoded again for each tile of tokens: as fast as decoding them into a buffer
    once where eight tokens are a tile."""
    return 32 if MACHINES[arch].sums > 8 else 8


def _direct(spec: KernelSpec, arch: str, tokens: int, pair: int) -> Iterator[Schedule]:
    signs, cpu = _signs(spec, arch, tokens), MACHINES[arch]
    room = cpu.sums
    for words in _words(spec, arch, tokens):
        bf16 = multiplies_bf16(spec, arch) and (words > 0 or not spec.limbs)
        digits, most = 1 if bf16 else _sums(spec, arch, words), 4
        if not (spec.limbs or bf16) and half_factor(spec) is not None:
            # Two sums a row, and conversions that leave few registers.
            digits, most = 2, 2
        if signs or words == MADE:
            most = pair  # magnitudes and signs take most registers
        height = max(1, min(tokens, room // digits // pair, _TALL if words or bf16 else tokens))
        if spec.parts > 1 and not cpu.halves:
            # Groups within blocks need sums of their own for the panel at hand, beside the results of all.
            height = min(height, _TALL // pair)
            most = min(most, room * 5 // 4 // (height * digits) - 1)
        panels = [p for p in (4, 2, 1) if p % pair == 0 and (p == pair or p <= min(most, room // (height * digits)))]
        shorts = arch in SHORT_ARCHES and short_steps(spec, magnitudes(spec) if signs else None) and not words
        # Few panels are better split evenly over threads than streamed side by side.
        panels = [p for p in panels if p == pair or spec.rows // PANEL >= 8 * p]
        # Sixteen registers hold one panel best, and several read memory faster; predictions weigh the two.
        for p in panels if cpu.halves else panels[:2]:
            accs = max(1, min(2, room // (p * height * digits) // 2))
            residues = 1 if words or signs or bf16 else _residues(spec, arch, room // (p * height * digits))
            accs = 1 if residues > 1 or cpu.halves else accs
            ahead = _far(spec, p) if cpu.far else max(1024, cpu.ahead // p)
            for prefetch in (ahead,) if cpu.halves else (ahead, 0):
                found = Schedule(height, p * PANEL, spec.chunk_blocks * 32).with_extra(accs=accs, prefetch=prefetch)
                found = found.with_extra(shorts=1) if shorts else found
                if bf16 or signs:
                    yield found.with_extra(bf16=1) if bf16 else found.with_extra(signs=1)
                else:
                    yield found.with_extra(words=words) if words else _with_residues(found, residues)


def multiplies_bf16(spec: KernelSpec, arch: str) -> bool:
    """Whether products should be of bfloat16 numbers where they can: they are as fast as those of words or of two
    digits, and no scale of activations meets them. One digit is faster."""
    return arch in BF16_ARCHES and spec.limbs != 1 and bf16_problem(spec) is None


def _far(spec: KernelSpec, panels: int) -> int:
    """Bytes ahead of which a Zen 4 core has weights fetched, the best of what was tried. Four panels: four blocks, or
    of narrow codes, whose blocks are short, 2048 bytes in each plane (int2: half as much takes a tenth longer); fewer
    panels as much together. Whole bytes: two blocks of four panels (twice as much takes up to a quarter longer), and
    as much as there can be of fewer (eight tokens, two panels: half as much takes 1.1 to 1.2 times as long)."""
    planes = spec.layout_.widths(spec.fmt.bits)
    block = 64 * sum(planes)
    if planes == (8,):
        return 2 * block if panels > 2 else FARTHEST
    found = 4 * block if block >= 256 else 2048 * len(planes)
    return min(FARTHEST, found * 4 // panels)


def _lut(spec: KernelSpec, tokens: int, pair: int) -> Iterator[Schedule]:
    """Two sums at a time, as the best measured ones have: of two panels, or of one panel and two tokens."""
    for height, panels in ((1, 2), (1, 1)) if tokens == 1 else ((2, 1), (1, 2)):
        if panels % pair == 0:
            yield Schedule(height, panels * PANEL, spec.chunk_blocks * 32).with_extra(lut=1, prefetch=1024)


def _residues(spec: KernelSpec, arch: str, room: int) -> int:
    """Accumulators of a sum for codes that are multiplied where they stand: only byte dot products of full range, which
    machines without VNNI take three instructions for, multiply them so."""
    return min(4, room) if spec.limbs and plain_codes(spec) and spec.parts == 1 and MACHINES[arch].full else 1


def _with_residues(found: Schedule, residues: int) -> Schedule:
    return found.with_extra(residues=residues) if residues > 1 else found


def _signs(spec: KernelSpec, arch: str, tokens: int) -> bool:
    """Whether activations are given the weights' signs: magnitudes take half the lookups, which a few tokens pay for
    with an instruction each, and digits of bytes that two signs made too large for sums of pairs fit."""
    found = magnitudes(spec) if arch in SIGN_ARCHES and tokens <= _SIGNED else None
    return found is not None and len(found.digits) > 1


def _words(spec: KernelSpec, arch: str, tokens: int) -> tuple[int, ...]:
    """Kinds of 16-bit products that may be the best ones (see `Plan`), 0 for those of bytes; last, that of most tokens.

    AVX-512: for two digits an activation. They are half as many instructions as products of digits when weights have
    two as well, and half as many sums to bring together at the end of short groups. For single tokens decoding counts
    more, except where one permute looks up words of six bits (Zen 4), and there half as many sums leave a few tokens
    room for more panels or tokens. AVX2: where products of all digits take more
    operations, or as many and decoding is shared by some tokens; shuffles that look up bytes make words of digits.
    """
    levels = spec.integer_levels
    if not spec.limbs or levels is None:
        return (0,)
    if arch.startswith("avx512"):
        short = (spec.parts > 1 and tokens > 1) or (spec.group_blocks == 1 and tokens > 16)
        wide = len(levels.digits) > 1 and (tokens > 1 or arch in VBMI_ARCHES)
        few = _FEW <= tokens <= _most_direct(arch) and arch in VBMI_ARCHES
        return (int(spec.limbs == 2 and (short or wide or few)),)
    if arch not in WORD_ARCHES or _signs(spec, arch, tokens):
        return (0,)
    cpu, top, found = MACHINES[arch], max(map(max, levels.digits)), level_magnitudes(levels)
    each = 1 if cpu.full else 2 if short_steps(spec) else 3 if top < 128 else 6
    operations, least = spec.limbs * len(levels.digits) * each, 2 if cpu.full else 4
    kind = MADE if found and len(found.digits) > 1 else 2
    if operations > least:
        return (kind,)
    shared = tokens >= _FEW and spec.group_blocks > 1  # sums of one block are unrolled, whose digits cost as little
    return (0, kind) if operations == least and not cpu.full and shared else (0,)


def _sums(spec: KernelSpec, arch: str, words: int) -> int:
    """Sums that an exact product is made of, as far as they need registers: decoding words of AVX-512, which are looked
    up, takes as many as another sum, but for VBMI's permutes."""
    if words:
        return MACHINES[arch].held
    weights = len(spec.integer_levels.digits) if spec.limbs and spec.integer_levels else 1
    return max(1, spec.limbs) * weights


def _buffered(spec: KernelSpec, arch: str, tokens: int, pair: int) -> Iterator[Schedule]:
    *_, words = _words(spec, arch, max(tokens, _FEW + 1))  # decoding is shared by all
    shorts, bf16 = arch in SHORT_ARCHES and short_steps(spec) and not words, multiplies_bf16(spec, arch)
    for height, panels in (_PART_TILES if spec.limbs and spec.parts > 1 and not bf16 else TILES)[MACHINES[arch].sums]:
        if panels % pair == 0 or panels < pair:
            shape = (min(height, tokens), max(pair, panels) * PANEL)
            found = Schedule(*shape, spec.chunk_blocks * 32).with_extra(buffered=1, tokens=192)
            found = found.with_extra(prefetch=ahead) if (ahead := MACHINES[arch].decode_ahead) else found
            if bf16:
                yield found.with_extra(bf16=1, tokens=_SHARED)
                continue
            found = found.with_extra(shorts=1) if shorts else found
            yield found.with_extra(words=words) if words else found
