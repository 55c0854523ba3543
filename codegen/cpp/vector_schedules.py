"""Tiles to try for kernels of vector formats, and how long a call should take."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lowbit.codegen.cpp.bytes_plan import BLOCK, PERMUTED, BytesPlan, byte_entries
from lowbit.codegen.cpp.input_plan import ROWS, SUMLESS, InputPlan, SumsPlan, entries, looks_sums_up
from lowbit.codegen.cpp.machines import MACHINES, VBMI_ARCHES, Machine
from lowbit.codegen.cpp.plan import PANEL
from lowbit.codegen.cpp.schedules import TILES
from lowbit.codegen.cpp.vector_plan import TILE, Book, Part, VectorPlan
from lowbit.codegen.schedule import Schedule, m_class
from lowbit.codegen.spec import KernelSpec

__all__ = ["byte_words", "far_ahead", "permute_of", "vector_predict", "vector_schedules"]

_MOST_SUMS = 16  # tokens
_SHARING = 264  # tokens that share decoded bytes: whole tiles of any height, and half of 512
_FULL = {"avx512": 1.5, "avx2": 2.8}
"""What byte dot products take longer by where codebooks' bytes, which may be above 127, need two of 16-bit numbers."""


def vector_schedules(spec: KernelSpec, arch: str, m: int) -> Iterator[Schedule]:
    """Legal schedules for `m` tokens: direct kernels for up to 8, buffered ones from 4 on (`generic`: always)."""
    tokens, cpu = m_class(m), MACHINES[arch]
    assert spec.vector is not None
    if spec.vector.axis == "in":
        yield from _input_schedules(spec, arch, tokens)
        return
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
    """Of products of bytes: looking up and sorting a step costs as much as six tokens' products, by loads; by permutes
    as much as one or two, so that a few sweeps over the coordinates do no harm."""
    for found in _bytes_tiles(spec, arch, tokens):
        yield far_ahead(found.with_extra(words=1) if byte_words(arch) else found, arch)


def far_ahead(schedule: Schedule, arch: str) -> Schedule:
    """The schedule with indices fetched as far ahead as Zen 4 wants them. Called again and again, lookups take 0.85 of
    the time of 1024 bytes then, and sums of vectors along the input 0.6 to 0.8; twice as far is no better."""
    return schedule.with_extra(prefetch=2048) if MACHINES[arch].far else schedule


def byte_words(arch: str) -> bool:
    """Whether bytes above 127 are better multiplied as words, where they have no dot products."""
    return MACHINES[arch].halves and not MACHINES[arch].full


def _bytes_tiles(spec: KernelSpec, arch: str, tokens: int) -> Iterator[Schedule]:
    cpu, permute, digits = MACHINES[arch], permute_of(spec, arch), 1 if byte_words(arch) else spec.limbs
    height = max(1, min(tokens, cpu.sums // (4 * digits)))
    if tokens <= 4 and arch != "generic":
        # Lookups wait longer than sums that lie in memory.
        yield Schedule(min(tokens, 2) if byte_words(arch) else height, PANEL).with_extra(vectors=8)
        if permute:
            dims = [part.dim for part in BytesPlan(spec, Schedule()).parts]
            coordinates = min(max(dims), max(8 if byte_words(arch) else 4, cpu.sums // (height * digits)))
            yield Schedule(height, coordinates * PANEL).with_extra(permute=permute)
    if tokens > 2 or arch == "generic":
        # Predictions do not tell them apart. Where many of few tokens are left over by one of them, others come first.
        for rows, panels in sorted(dict.fromkeys(TILES[cpu.sums]), key=lambda tile: tokens % tile[0] > tokens // 8):
            found = Schedule(min(rows, tokens), panels * PANEL).with_extra(buffered=1, tokens=_SHARING)
            yield from (found, found.with_extra(permute=permute)) if permute else (found,)


def _input_schedules(spec: KernelSpec, arch: str, tokens: int) -> Iterator[Schedule]:
    """Of vectors along the input: sums of products looked up, which costs every token as much; or decoded panels."""
    cpu = MACHINES[arch]
    if looks_sums_up(spec) and arch not in SUMLESS and tokens <= _MOST_SUMS:
        tiles = 2 if cpu.sums > 8 and sum(spec.segments) > ROWS else 1
        yield far_ahead(Schedule(min(tokens, 4), tiles * ROWS).with_extra(sums=1), arch)
    if tokens <= 8 and arch != "generic":
        registers = 24 if cpu.sums > 8 else 10
        height = min(tokens, 2)
        vectors = next((v for v in (8, 4) if v * height <= registers), 2)
        yield Schedule(height, PANEL).with_extra(vectors=vectors)
    for height, panels in TILES[cpu.sums]:
        if (tokens > 2 or arch == "generic") and panels * PANEL <= ROWS:
            yield Schedule(min(height, tokens), panels * PANEL).with_extra(buffered=1, tokens=192)


def permute_of(spec: KernelSpec, arch: str) -> int:
    """The most centroids that permutes look up on an instruction set; 0 where no part of a format has so few."""
    most = PERMUTED.get(arch, 0)
    return most if spec.limbs and BytesPlan(spec, Schedule().with_extra(permute=most)).permutes else 0


def _bytes_predict(plan: BytesPlan, arch: str, m: int) -> float:
    """Cycles of products of bytes. Loads are one a cycle where the codebook leaves room in the first-level cache."""
    cpu, cycles = MACHINES[arch], 0.0
    for part in plan.parts:
        vectors = sum(part.tiles) * TILE * part.columns
        reuse = math.ceil(m / (plan.tokens if plan.buffered else plan.tile_m))
        if plan.permuted(part):
            cycles += vectors / BLOCK * _permute_cycles(plan, part, arch, m)
            cycles += sum(_table_cycles(book, arch) for book in part.books)
            continue
        slow = cpu.lookup if cpu.sums > 8 or plan.words else 1.2 if arch.startswith("avx2") else 2.0
        slow *= 1.5 if plan.words and part.lanes == 4 else 1.0  # sixteen of them fill a vector
        nbytes = sum(book.size * book.lanes for book in part.books)
        looked = 1.12 if nbytes <= 1 << 14 else 1.29 if nbytes <= 1 << 15 else 1.8 if nbytes <= 1 << 19 else 3.0
        # Panels are stored, and with activations and sums take the codebook's place in the cache.
        stored = plan.buffered * (0.35 if nbytes <= 1 << 14 else 0.8)
        found = len(part.books) * looked * slow + stored * max(1.0, slow)  # loads of half vectors make no store faster
        # Words of a pass's first token are multiplied while lookups wait.
        products = 0.2 * reuse + 0.6 * (m - reuse) if plan.words and not plan.buffered else m
        cycles += vectors * (reuse * found + products * part.lanes / BLOCK * _product_cycles(plan, arch))
    return cycles


def _product_cycles(plan: BytesPlan, arch: str) -> float:
    """Cycles of the products of 64 bytes with a token; a direct kernel makes words of them each time."""
    if plan.words:
        cpu = MACHINES[arch]
        return (2 * cpu.word + (0.0 if plan.buffered else 1.5 / plan.tile_m)) / cpu.ops
    return plan.digits * _dot_cycles(arch)


def _dot_cycles(arch: str) -> float:
    """Cycles of a byte dot product of 64 bytes."""
    return MACHINES[arch].dot / MACHINES[arch].ops * _FULL.get(arch, 1.0)


def _permute_cycles(plan: BytesPlan, part: Part, arch: str, m: int) -> float:
    """Cycles of one step of 64 indices of every book, for all tokens: sorting, lookups, products; or reading the
    indices.

    Fitted to 4096x4096 with 1 to 32 tokens (words: 1 to 16) on Cascade Lake, VBMI's on Zen 4.
    """
    cpu, looked, any_words = MACHINES[arch], 0.0, False
    tiles = math.ceil(m / (plan.tokens if plan.buffered else plan.tile_m))
    for book in part.books:
        words = book.size > byte_entries(arch)
        sort, each = _found_cycles(book, arch)
        coordinates = math.ceil(part.dim / 2) * 2 if words else part.dim
        if plan.buffered:
            looked += sort + (1.25 if words else 1.0) * each * coordinates
        else:
            looked += sort * len(plan.sweeps(part)) + each * coordinates
        any_words |= words
    looked += (2.0 * plan.buffered + len(part.books) - 1) * part.dim  # stores, and sums of two books
    # Permutes of words leave no unit free, which products could have for themselves.
    product = _product_cycles(plan, arch) + (0.65 * plan.digits if any_words and not plan.buffered else 0.0)
    compute, memory = tiles * looked + m * part.dim * product, len(part.books) * BLOCK / cpu.bandwidth * cpu.ghz
    return max(compute, memory) + 0.25 * min(compute, memory)


def _table_cycles(book: Book, arch: str) -> float:
    """Cycles of making codebooks into tables."""
    return (1.5 if book.size > byte_entries(arch) else 0.6) * book.count * book.size * book.dim


def _found_cycles(book: Book, arch: str) -> tuple[float, float]:
    """Cycles of sorting one step's indices, and of looking up one coordinate.

    A shuffle of bytes takes 16 entries, on VBMI a permute of two registers 128; on AVX2 it is two halves, for which
    indices are prepared. A permute of words takes 64 and is three instructions; four of them find half the bytes of two
    coordinates among 256.
    """
    if book.size > byte_entries(arch):
        return 6.3, 2.33 * math.ceil(book.size / 64)
    if arch in VBMI_ARCHES:
        return 3.5, max(1.0, book.size / 128)
    pieces = math.ceil(book.size / 16)
    if MACHINES[arch].sums > 8:
        return 3.0 + math.log2(pieces), float(pieces)
    return 2.0 + pieces, 2.5 * pieces - 1.6


def vector_predict(plan: VectorPlan, arch: str, m: int) -> float:
    """Seconds of one call on one core: lookups, which wait for memory where permutes make them, and products."""
    cpu = MACHINES[arch]
    if isinstance(plan, BytesPlan):
        return _bytes_predict(plan, arch, m) / (cpu.ghz * 1e9) + m * plan.spec.k * 1e-10 + 2e-6
    if isinstance(plan, InputPlan):
        return _input_predict(plan, arch, m)
    cycles = 0.0
    for part in plan.parts:
        vectors = sum(part.tiles) * TILE * part.columns
        if plan.buffered:
            looked, reuse = 0.76, math.ceil(m / plan.tokens)  # stores do not wait for sums
            products = vectors * part.dim / 16 * m * _tile_cycles(plan, cpu)
        else:
            looked, reuse = 1.0, math.ceil(m / plan.tile_m)
            least = 0.8 if cpu.halves else 0.5
            products = vectors * max(0.0, m - reuse) * max(least, part.lanes / 16 / cpu.ops)
        cycles += products + vectors * reuse * sum(looked * _lookup(b, cpu) for b in part.books)
    widened = sum(b.wide_bytes for b in plan.books) / 32
    return (cycles + widened) / (cpu.ghz * 1e9) + m * plan.spec.k * 1e-10 + 2e-6


def _input_predict(plan: InputPlan, arch: str, m: int) -> float:
    """Seconds of a kernel of vectors along the input: tables and lookups of every token; or decoding a row's vector,
    element by element, for as many tokens as share it, and products."""
    cpu, part = MACHINES[arch], plan.part
    vectors = sum(part.tiles) * ROWS * part.columns
    if isinstance(plan, SumsPlan):
        kept = 0.9 if arch in VBMI_ARCHES else 0.35
        made = len(plan.spec.segments) * part.columns * plan.step_entries * (part.dim / 16 / cpu.ops + kept)
        looked = vectors * sum(_sum_cycles(book, arch) for book in part.books)
        read = vectors * len(part.books) / cpu.bandwidth * cpu.ghz
        cycles = max(m * (made + looked), read) + 0.5 * min(m * (made + looked), read)
        return cycles / (cpu.ghz * 1e9) + m * plan.spec.k * 1e-10 + 3e-6
    if not plan.buffered:
        reuse = math.ceil(m / plan.tile_m)
        cycles = vectors * (
            reuse * sum(_row_lookup(b, cpu) for b in part.books) + m * max(0.5, part.lanes / 16 / cpu.ops)
        )
        return cycles / (cpu.ghz * 1e9) + m * plan.spec.k * 1e-10 + 2e-6
    tiles = math.ceil(m / plan.tokens)
    cycles = tiles * vectors * ((0.7 if cpu.halves else 1.2) * part.dim + sum(_row_lookup(b, cpu) for b in part.books))
    cycles += vectors * part.dim / 16 * m * _tile_cycles(plan, cpu)
    return cycles / (cpu.ghz * 1e9) + m * plan.spec.k * 1e-10 + 2e-6


def _row_lookup(book: Book, cpu: Machine) -> float:
    """Cycles of one lookup of a vector along the input; large codebooks share the second-level cache with indices."""
    return _lookup(book, cpu) + (1.8 if book.size * book.dim * 2 > 1 << 19 else 0.0)


def _sum_cycles(book: Book, arch: str) -> float:
    """Cycles of an entry that is looked up and added: permutes of words find 32 among 64, those of bytes halves of 64
    among 128; others are loads. Fitted to 4096x4096 with 1 to 16 tokens on Cascade Lake (64 and 128 entries: counted),
    256 entries of VBMI on Zen 4."""
    if arch in VBMI_ARCHES:
        return {32: 4.5, 64: 4.5, 128: 5.0, 256: 8.5}[entries(book)] / ROWS
    if not arch.startswith("avx512"):
        return 1.0
    return {32: 5.9, 64: 7.5, 128: 13.5, 256: 25.4}[entries(book)] / ROWS


def _lookup(book: Book, cpu: Machine) -> float:
    """Cycles of one lookup by where the codebook lies: first or second level cache, or beyond."""
    nbytes = book.size * (book.lanes * 4 if book.wide else book.dim * 2)
    near, middle, far = (0.86, 2.0, 3.6) if cpu.halves else (1.5, 2.0, 2.4)
    return near if nbytes <= 1 << 14 else middle if nbytes <= 1 << 18 else far


def _tile_cycles(plan: VectorPlan, cpu: Machine) -> float:
    """Cycles of 16 products in a buffered kernel: multiplications, or loads of weights and activations, of which those
    of 32-byte registers serve two."""
    width, loads = plan.panels / len(plan.widths), 0.4 if cpu.halves else 1.0
    # One wide multiplier, as in `predictions.predict`.
    return 2 * max(1 / cpu.ops, (1 / plan.tile_m + loads / width) / cpu.loads)
