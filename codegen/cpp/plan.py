"""The fixed numbers of one kernel: everything that follows from spec and schedule before any text is written."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

from lowbit.codegen.cpp.bf16 import BF16_CHUNKS, bf16_problem, folds
from lowbit.codegen.cpp.expr import build, half_bits, name
from lowbit.codegen.cpp.lut_plan import TABLE_BYTES, lut_problem, lut_steps
from lowbit.codegen.cpp.rounding import extra_columns
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.parts import Part
from lowbit.quantizers.formats import IntegerLevels
from lowbit.quantizers.formats.scaled import DIGIT_BITS

__all__ = [
    "MADE",
    "PANEL",
    "PANELS",
    "KernelPlan",
    "Plan",
    "align",
    "half_factor",
    "level_magnitudes",
    "magnitudes",
    "plain_codes",
    "short_steps",
]

PANEL = 16
"""Rows of a panel: the int32 lanes of one 64-byte vector."""
PANELS = {name: LAYOUTS[name] for name in ("panel16", "whole16", "signs16")}
"""Layouts of such panels, all of which kernels of scalar formats read."""
MADE = 3
"""`words` made of magnitudes and signs (see `Plan`)."""
_WORDS = 32  # 16-bit numbers of a vector


@dataclass(frozen=True)
class KernelPlan(ABC):
    """What kernels of scalar and of vector formats have in common. Schedule fields it reads:

    tile_m: tokens of one register tile. tile_n: rows of one register tile, a multiple of 16. extra `buffered`: 0 to
    decode into registers (few tokens), 1 to decode a chunk into a buffer once and reuse it for many tokens. extra
    `tokens`: tokens that share one decoded chunk (buffered kernels).
    """

    spec: KernelSpec
    schedule: Schedule

    @property
    def tile_m(self) -> int:
        """Tokens of one register tile."""
        return self.schedule.tile_m

    @property
    def np(self) -> int:
        """Panels of one register tile."""
        return self.schedule.tile_n // PANEL

    @property
    def silu(self) -> bool:
        """True when gate and up rows are processed in pairs."""
        return "silu_mul" in self.spec.epilogue

    @property
    def buffered(self) -> bool:
        """True for the many-token kernel."""
        return bool(self.schedule.get("buffered", 0))

    @property
    def tokens(self) -> int:
        """Tokens that share one decoded chunk, a multiple of `tile_m`."""
        return max(1, self.schedule.get("tokens", 96) // self.tile_m) * self.tile_m

    @cached_property
    def heights(self) -> tuple[int, ...]:
        """Tokens per register tile that occur, largest first. Direct kernels decode again for every tile, so tiles
        between half and full size exist and anything smaller is left to single tokens; buffered tiles are small."""
        low = 1 if self.buffered else self.tile_m // 2 + 1
        return tuple(dict.fromkeys([*range(self.tile_m, low - 1, -1), 1]))

    @property
    def shared_bytes(self) -> int:
        """Scratch bytes of a call, whatever the tokens and threads."""
        return 0

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """Scratch bytes per token, shared by all threads: activations and what belongs to them."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Scratch bytes of one gathered row of activations."""

    @property
    @abstractmethod
    def thread_bytes(self) -> int:
        """Scratch bytes per thread: one gathered row, then what the kernel needs."""

    @property
    @abstractmethod
    def token_stride(self) -> int:
        """Elements of one token in one chunk of the prepared activations."""


@dataclass(frozen=True)
class Plan(KernelPlan):
    """Sizes of one kernel of a scalar format. Schedule fields it reads, besides those of every kernel:

    extra `accs`: independent accumulators per sum (direct kernels). extra `prefetch`: bytes fetched ahead (0 =
    none). extra `words`: above 0 to multiply integers as 16-bit numbers, half as many at once, instead of
    as 8-bit digits: better where several pairs of digits make one product, where short sums end often, or where bytes
    of full range have no dot products; integers of several digits are looked up as words (1) or put together, of digits
    (2) or of magnitudes' digits and signs (3). extra `residues`: accumulators per sum for codes that are multiplied
    where they stand (direct kernels, see `InPlaceProducts`); then `accs` is 1. extra `lut`: 1 to look sums of
    activations up by the codes (direct kernels, see `lut_plan`); then there is one accumulator, and no words. extra
    `shorts`: 1 to add pairs of products up as 16-bit numbers first, as far as they fit (see `ShortProducts`). extra
    `signs`: 1 to give the signs of weights to activations (direct kernels, see `SignProducts`). extra `bf16`: 1 to
    multiply bfloat16 numbers (see `codegen.cpp.bf16`), whatever the products of the spec are; then there are no others.
    """

    def __post_init__(self) -> None:
        if self.tile_m < 1 or self.schedule.tile_n % PANEL or self.np < 1 or (self.silu and self.np % 2):
            raise KernelError("LB0412", f"no C++ kernel has tiles of {self.tile_m} x {self.schedule.tile_n}")
        if self.lut and (why := lut_problem(self.spec)):
            raise KernelError("LB0412", f"no C++ kernel looks these sums up: {why}")
        if self.bf16 and (why := bf16_problem(self.spec)):
            raise KernelError("LB0412", f"no C++ kernel has these products of bfloat16 numbers: {why}")

    @property
    def lut(self) -> bool:
        """True when sums of products are looked up instead of computed."""
        return bool(self.schedule.get("lut", 0)) and not self.buffered

    @property
    def lut_bytes(self) -> int:
        """Bytes of the tables of one chunk of one token and digit; 0 for kernels that have none."""
        steps = len(lut_steps(self.spec.layout_, self.spec.fmt.bits)) if self.lut else 0
        return steps * TABLE_BYTES * self.spec.chunk_blocks

    @property
    def accs(self) -> int:
        """Accumulators each sum is split over."""
        return 1 if self.buffered or self.lut or self.residues > 1 else self.schedule.get("accs", 1)

    @property
    def residues(self) -> int:
        """The most accumulators each sum has for codes left where they stand; 1 for codes moved to their value."""
        plain = self.integer and plain_codes(self.spec) and self.spec.parts == 1
        plain = plain and not (self.buffered or self.words or self.lut)
        return self.schedule.get("residues", 1) if plain else 1

    @property
    def shorts(self) -> tuple[int, ...]:
        """Steps of a dot product whose pairs are added up as 16-bit numbers, of each digit of weights; none where every
        step adds 32-bit ones."""
        plain = self.integer and not (self.words or self.lut or self.residues > 1)
        return short_steps(self.spec, self.magnitudes) if plain and self.schedule.get("shorts", 0) else ()

    @cached_property
    def magnitudes(self) -> Magnitudes | None:
        """The tables of kernels that look magnitudes and signs up apart, for activations or words; None for others."""
        if self.words:
            return level_magnitudes(self.levels) if self.schedule.get("words", 0) == MADE else None
        wanted = self.integer and self.schedule.get("signs", 0) and not (self.buffered or self.lut)
        return magnitudes(self.spec) if wanted else None

    @property
    def prefetch(self) -> int:
        """Bytes ahead of the current position that are fetched."""
        return self.schedule.get("prefetch", 0)

    @property
    def integer(self) -> bool:
        """True when products are formed on codes as integers."""
        return self.limbs > 0

    @property
    def limbs(self) -> int:
        """int8 digits per activation; 0 for products of floats."""
        return 0 if self.bf16 else self.spec.limbs

    @property
    def bf16(self) -> bool:
        """True when products are of bfloat16 numbers."""
        return bool(self.schedule.get("bf16", 0))

    @cached_property
    def folded(self) -> bool:
        """True when decoded bfloat16 numbers have their scales, all but the tensor's."""
        return self.bf16 and self.buffered and self.spec.groups > 1 and folds(self.spec)

    @property
    def scaled_last(self) -> bool:
        """True when sums of bfloat16 products meet the scales that are left behind all columns."""
        return self.bf16 and self.buffered and (self.folded or self.spec.groups == 1)

    @cached_property
    def scaled_once(self) -> bool:
        """True when all activations of a token, as integers, have one scale, which then meets the token's results."""
        spec = self.spec
        alike = spec.rounding is not None and not spec.lead_blocks and spec.span_chunks >= self.input_chunks
        return self.integer and alike and not spec.double_chunks

    @cached_property
    def carried(self) -> bool:
        """True when accumulators of direct kernels keep their sums from chunk to chunk of a group, which fit them."""
        unsorted = self.words and self.magnitudes is not None  # sums of two numbers a row, see `UnsortedWordProducts`
        chunks = self.group_chunks if self.scaled_once and not (self.buffered or self.lut or unsorted) else 1
        return chunks > 1 and max(255, self.levels.largest) * 128 * chunks * self.chunk_cols < 2**31

    @property
    def together(self) -> int:
        """Chunks that are decoded and multiplied before sums are added to the results (buffered kernels)."""
        return BF16_CHUNKS if self.scaled_last and self.spec.chunk_blocks == 1 else 1

    @property
    def words(self) -> bool:
        """True when products of integers are of 16-bit numbers instead of 8-bit digits."""
        return self.integer and bool(self.schedule.get("words", 0)) and not self.lut

    @cached_property
    def word_table(self) -> WordTable | None:
        """The integers by code, for products of words where bytes do not hold them; None where digits make them."""
        looked_up = self.words and self.schedule.get("words", 0) == 1 and len(self.levels.digits) > 1
        return word_table(self.levels.integers) if looked_up else None

    @property
    def bias(self) -> int:
        """What decoded integers exceed the weight's by."""
        return 0 if self.word_table or self.magnitudes else self.levels.bias

    @property
    def digits(self) -> int:
        """Numbers that an activation is cut into; 0 for products of floats."""
        return 1 if self.words else self.limbs

    @property
    def item(self) -> str:
        """C++ type of prepared activations."""
        return ("int16_t" if self.words else "int8_t") if self.integer else "uint16_t" if self.bf16 else "float"

    @property
    def item_bytes(self) -> int:
        """Its size."""
        return {"int8_t": 1, "int16_t": 2, "uint16_t": 2, "float": 4}[self.item]

    @property
    def weight_bytes(self) -> int:
        """Bytes of a decoded weight."""
        return 2 if self.words or self.bf16 else len(self.levels.digits) if self.integer else 4

    @property
    def levels(self) -> IntegerLevels:
        """The integers behind the codes of a kernel that multiplies integers."""
        assert self.spec.integer_levels is not None
        return self.spec.integer_levels

    @cached_property
    def terms(self) -> tuple[tuple[int, int, int], ...]:
        """(left shift, activation digit, weight digit) of every sum that an exact one is made of, largest shift first.

        Digits are counted from the high one; each shift but the last, 0, exceeds the next.
        """
        limbs = 1 if self.words else self.limbs
        weights = tuple(enumerate(self.weight_shifts))
        return tuple(sorted(((8 * (limbs - 1 - d) + s, d, e) for d in range(limbs) for e, s in weights), reverse=True))

    @cached_property
    def weight_shifts(self) -> tuple[int, ...]:
        """By what power of two each digit of weights is worth more than the last one."""
        if self.words:
            return (0,)
        tables = self.magnitudes
        digits, base = (len(tables.digits), tables.shift) if tables else (len(self.levels.digits), DIGIT_BITS)
        return tuple(base * e for e in reversed(range(digits)))

    @cached_property
    def half_factor(self) -> float | None:
        """What float16 weights are multiplied with, for kernels of floats that read them so (`HalfProducts`)."""
        return None if self.integer or self.bf16 else half_factor(self.spec)

    @property
    def shifts(self) -> bool:
        """True when sums of activations are needed as floats, to multiply the offsets with."""
        return self.integer and self.spec.fmt.offset

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane."""
        return self.spec.layout_.widths(self.spec.fmt.bits)

    @property
    def parts(self) -> tuple[tuple[Part, ...], ...]:
        """Where the codes of each 4 columns of a block are: containers are bytes of so many vectors."""
        return self.spec.layout_.parts(self.spec.fmt.bits)

    @property
    def containers(self) -> float:
        """Vectors that a vector of codes is taken out of, on average."""
        return sum(len({part[:2] for part in parts}) for parts in self.parts) / len(self.parts)

    @property
    def chunk_cols(self) -> int:
        """Packed columns that share an activation scale."""
        return self.spec.chunk_blocks * 32

    @property
    def last_blocks(self) -> int:
        """32-column blocks of the matrix's last chunk."""
        return self.spec.blocks - (self.spec.chunks - 1) * self.spec.chunk_blocks

    @property
    def group_chunks(self) -> int:
        """Chunks of one full scale group, or 1 where a chunk, which is then a block, has several groups."""
        return self.spec.group_blocks // self.spec.chunk_blocks

    @property
    def part_cols(self) -> int:
        """Columns of a block that share a scale."""
        return 32 // self.spec.parts

    @property
    def token_stride(self) -> int:
        return max(1, self.digits) * self.chunk_cols

    @property
    def panels(self) -> int:
        """Packed panels, all segments together."""
        return self.spec.rows // PANEL

    @property
    def slots(self) -> int:
        """Panels that units count: half of them when gate and up go together."""
        return self.panels // 2 if self.silu else self.panels

    @property
    def unit(self) -> int:
        """Slots of one unit of work."""
        return self.np // 2 if self.silu else self.np

    @property
    def units(self) -> int:
        """Units of work the panels split into; the last may be smaller."""
        return math.ceil(self.slots / self.unit)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Panels per register tile that occur: the full tile, and single slots when the tile does not divide."""
        single = 2 if self.silu else 1
        found = [self.np] if self.slots >= self.unit else []
        return tuple(dict.fromkeys([*found, *([single] if self.slots % self.unit else [])]))

    @property
    def token_bytes(self) -> int:
        """Scratch bytes per token, shared by all threads: tables, activations, scales, starting values, sums."""
        tables = self.digits * (self.lut_bytes + 4) if self.lut else 0
        return self.chunk_rows * (tables + self.token_stride * self.item_bytes + 4 + 8 * self.spec.parts)

    @property
    def ahead(self) -> int:
        """Blocks ahead of the current one that are fetched, 0 for none."""
        return max(1, self.prefetch // (64 * sum(self.planes))) if self.prefetch else 0

    @property
    def chunk_rows(self) -> int:
        """Chunks of prepared activations: those of the matrix, then the high digits of chunks that have two rounds."""
        return self.input_chunks + self.spec.double_chunks

    @property
    def input_chunks(self) -> int:
        """Chunks of activations: those of the matrix, once for all terms of its weights."""
        return self.spec.chunks // self.spec.terms

    @property
    def input_row(self) -> str:
        """Row of the prepared activations that chunk `c` of the matrix meets."""
        if self.spec.double_chunks:
            return "row"
        if self.spec.terms == 1:
            return "c"
        return f"(c / {self.spec.terms * self.group_chunks} * {self.group_chunks} + c % {self.group_chunks})"

    @property
    def code_bytes(self) -> int:
        """Scratch bytes of one decoded chunk for one unit of work."""
        return self.np * PANEL * self.chunk_cols * self.together * self.weight_bytes

    @property
    def row_bytes(self) -> int:
        return align((self.spec.blocks * 32 + extra_columns(self.spec)) * 4)

    @property
    def thread_bytes(self) -> int:
        """Scratch bytes per thread: one gathered row, then for buffered kernels a decoded chunk and partial sums."""
        return self.row_bytes + (self.code_bytes + self.tokens * self.np * 64 if self.buffered else 0)


@dataclass(frozen=True)
class WordTable:
    """32 signed integers, looked up by a code's lowest five bits; bit `top` of the code, unless -1, negates them."""

    integers: tuple[int, ...]
    top: int


def word_table(integers: tuple[int, ...]) -> WordTable | None:
    """The table for a code's integers, or None for more than 32 that do not mirror each other."""
    size = len(integers)
    if size <= _WORDS:
        return WordTable(integers * (_WORDS // size), -1)
    low, high = integers[:_WORDS], integers[_WORDS:]
    return WordTable(low, 5) if size == 2 * _WORDS and all(a == -b for a, b in zip(low, high, strict=True)) else None


@dataclass(frozen=True)
class Magnitudes:
    """Magnitudes of codes of a sign above five bits: where the fifth is 0, and where it is 1 without its factor of
    2**shift, by the lowest four bits."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    shift: int

    @property
    def digits(self) -> tuple[tuple[int, ...], ...]:
        """What is looked up for one weight vector each: high, then low ones; or both, where they make one byte."""
        return (self.high, self.low) if self.shift else (self.low + self.high,)


def plain_codes(spec: KernelSpec) -> bool:
    """Whether codes of less than a byte are multiplied as they are."""
    levels, fmt = spec.integer_levels, spec.fmt
    return levels is not None and levels.plain and fmt.element.state_bits < 8


def magnitudes(spec: KernelSpec) -> Magnitudes | None:
    """The tables of a spec whose activations are given signs; None for others: digits of -128 have no opposite."""
    levels, rounding = spec.integer_levels, spec.rounding
    if levels is None or spec.limbs != 1 or spec.parts > 1 or spec.double_chunks:
        return None
    return None if rounding is not None and rounding.saturates else level_magnitudes(levels)


def level_magnitudes(levels: IntegerLevels) -> Magnitudes | None:
    """The tables of integers behind codes of six bits; None for other codes and larger magnitudes."""
    if len(levels.integers) != 64:
        return None
    half = levels.integers[:32]
    if any(a < 0 or a != -b for a, b in zip(half, levels.integers[32:], strict=True)):
        return None
    low, high = half[:16], half[16:]
    shift = 0 if max(half) < 128 else math.gcd(*high).bit_length() - 1
    if math.gcd(*high) % 2**shift or max(high) >> shift > 127 or max(low) > 127:
        return None
    return Magnitudes(low, tuple(i >> shift for i in high), shift)


def short_steps(spec: KernelSpec, found: Magnitudes | None = None) -> tuple[int, ...]:
    """How many pairs of products of each digit of weights with int8 digits have a sum below 2**15, as a power of two;
    none where two of some digit have not."""
    levels = spec.integer_levels
    if levels is None or not spec.limbs or spec.parts > 1:
        return ()
    fit = [(2**15 - 1) // (2 * 128 * max(digit)) for digit in (found.digits if found else levels.digits)]
    return tuple(1 << (most.bit_length() - 1) for most in fit) if min(fit) > 1 else ()


def half_factor(spec: KernelSpec) -> float | None:
    """What turns weights from float16 to their values, or None where codes are not float16 after a shift."""
    if spec.fmt.zero or spec.fmt.offset:
        return None
    found = half_bits(build(spec.fmt.element.decode(), {"code": name("code")}))
    return found[1] if found else None


def align(size: int) -> int:
    """`size` bytes, rounded up to whole cache lines."""
    return (size + 63) // 64 * 64
