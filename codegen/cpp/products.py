"""How one 32-column block of packed weights meets the activations: as integers or as floats.

All forms split a block into steps. A step gives one or more weight vectors (expressions printed from the format's own
decode program) and the place of the activations they are all multiplied with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import combinations

from lowbit.codegen.cpp.expr import (
    Bit,
    Node,
    Printer,
    at_once,
    build,
    by_table,
    half_bits,
    name,
    number,
    shifted,
    shifts_of,
    table_text,
)
from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.decode import extract_program, scalar_program
from lowbit.compiler.ir.parts import Part
from lowbit.quantizers.formats.scaled import DIGIT_BITS

__all__ = [
    "CentroidProducts",
    "FloatProducts",
    "HalfProducts",
    "InPlaceProducts",
    "IntProducts",
    "LevelProducts",
    "LevelWordProducts",
    "PairProducts",
    "Products",
    "ShortProducts",
    "SignProducts",
    "SignedWordProducts",
    "UnsortedWordProducts",
    "WordProducts",
    "products",
]


_UNSORTED = 2  # sums of 16 rows that fit in 16 registers twice, beside decoding


class Products(ABC):
    """`vector`, `load`, `store`: the C++ type of a weight vector and its primitives; `item` its activations' type.

    steps: of a block. vectors: weight vectors of a step, each with sums of its own. late: scales meet sums instead of
    weights. shifts: of a sum's accumulators, each the power of two that its weights exceed the others' by; 0 first.
    total: the C++ type of sums. sums: what the names of those that steps add to begin with; `a` of those that chunks
    end with. unsorted: the two vectors of a step have other rows, and sums of theirs two numbers for each row.
    """

    vector: str
    load: str
    store: str
    item: str
    steps: int
    vectors: int = 1
    late: bool = False
    unsorted: bool = False
    sums: str = "a"
    printer: Printer

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def total(self) -> str:
        return self.vector

    @property
    def tables(self) -> str:
        """C++ definitions of what is looked up, once all weights are printed."""
        return self.printer.tables

    @property
    def shifts(self) -> tuple[int, ...]:
        return (0,) * self.plan.accs

    def accumulator(self, step: int) -> int:
        """The one of the sum's accumulators that a step adds to."""
        return step % self.plan.accs

    def loads(self) -> Iterator[tuple[str, str]]:
        """Names and statements that load one block: `w<plane>_<vector>` from the pointers `w<plane>`."""
        for i, width in enumerate(self.plan.planes):
            for v in range(width):
                yield f"w{i}_{v}", f"const V w{i}_{v} = vload(w{i} + {64 * v});"

    def before(self, step: int) -> Iterator[str]:
        """Statements before the weights of a step."""
        return iter(())

    @abstractmethod
    def weight(self, step: int, which: int = 0) -> str:
        """Weight vector `which` of a step, over the names of `loads` (and `scale`, `zero` for floats)."""

    @abstractmethod
    def activation(self, pointer: str, offset: str) -> str:
        """The activations at `pointer[offset]`, in every lane."""

    @abstractmethod
    def multiply(self, acc: str, w: str, x: str) -> str:
        """acc + w * x."""

    @abstractmethod
    def offset(self, step: int) -> int:
        """Columns from the start of a block to the step's first activation."""

    def _args(self, quad: int, shift: int = 0) -> dict[str, Node]:
        """Arguments of the extract program for columns 4 * quad to 4 * quad + 3: words and constant shifts."""
        args = {}
        for i, part in enumerate(self.plan.parts[quad]):
            args[f"w{i}"], args[f"s{i}"] = name(_vector(part)), number(part.shift + shift)
        return args

    def _widths(self, quad: int) -> tuple[int, ...]:
        """Bits of the parts that the codes of these columns have."""
        return tuple(part.width for part in self.plan.parts[quad])

    def _codes(self, quad: int, shift: int = 0) -> Node:
        """The codes of these columns."""
        return build(extract_program(*self._widths(quad)), self._args(quad, shift))


class IntProducts(Products):
    """Byte dot products: a step is 4 columns, 16 rows x 4 codes against 4 activation digits.

    Codes are multiplied as they are, or as the bytes that a table gives for them (`IntegerLevels.digits`).
    """

    vector, load, store, item, steps = "V", "vload", "vstore", "int8_t", 8
    late = True

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.printer = Printer("bytes")
        self.vectors = len(plan.levels.digits)

    def weight(self, step: int, which: int = 0) -> str:
        levels = self.plan.levels
        if levels.plain:
            return self.printer.text(self._codes(step))
        found = by_table(levels.digits[which], self._low_bits(step), self._bits(step)[4:])
        return self.printer.text(at_once(levels.digits[which], self._codes(step), found))

    def _low_bits(self, quad: int) -> Node:
        """The codes' lowest four bits, or the codes where they have no more."""
        widths, left = [], 4
        for width in self._widths(quad):
            widths.append(min(width, left))
            left -= widths[-1]
        widths = [width for width in widths if width]
        args = self._args(quad)
        return build(extract_program(*widths), {f"{a}{i}": args[f"{a}{i}"] for i in range(len(widths)) for a in "ws"})

    def _bits(self, quad: int) -> list[Bit]:
        """Where each bit of the codes stands."""
        return [(_vector(part), part.shift + b) for part in self.plan.parts[quad] for b in range(part.width)]

    def activation(self, pointer: str, offset: str) -> str:
        return f"bcast4({pointer} + {offset})"

    def multiply(self, acc: str, w: str, x: str) -> str:
        return f"dot({acc}, {w}, {x})"

    def offset(self, step: int) -> int:
        return 4 * step


class ShortProducts(IntProducts):
    """The same with pairs of products added up as 16-bit numbers for as many steps as `Plan.shorts` says: two
    instructions a step instead of three, on machines without dot products of bytes."""

    sums = "h"

    def multiply(self, acc: str, w: str, x: str) -> str:
        return f"dot_pairs({acc}, {w}, {x})"


class MagnitudeProducts(IntProducts):
    """Looks magnitudes and signs up apart: a shuffle looks up 16 bytes and leaves 0 where bit 7 of an index is set, so
    two find all magnitudes of five bits, as one byte or as two digits of which one is 0."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        assert plan.magnitudes is not None
        self._found = plan.magnitudes

    def loads(self) -> Iterator[tuple[str, str]]:
        """Those of all products, and signs: `s_<vector>`, with every other bit set, so that no byte that is moved to
        have a sign on top is 0."""
        yield from super().loads()
        others: dict[str, int] = {}
        for quad in range(8):
            vector, at = self._bits(quad)[5]
            others[vector] = others.get(vector, 0xFF) & ~(1 << at)
        for vector, bits in others.items():
            yield f"s_{vector}", f"const V s_{vector} = vor({vector}, set1(0x{f'{bits:02x}' * 4}u));"

    def places(self, quad: int) -> Iterator[str]:
        """Statements for `at`, the index of low magnitudes, and `sign`, bytes with a code's sign that are not 0."""
        fifth, sign = self._bits(quad)[4:]
        first, low = self.plan.parts[quad][0], self.printer.text(self._low_bits(quad))
        index = f"and_or({_lifted(fifth)}, set1(0x80808080u), {low})"
        if (first.shift, first.width) == (0, 4) and fifth == (_vector(first), 7):
            index = _vector(first)  # bits between these five do not count
        yield f"const V at = {index};"
        yield f"const V sign = {_lifted((f's_{sign[0]}', sign[1]))};"

    @property
    def high_and_low(self) -> tuple[str, str]:
        """Vectors of high and of low magnitudes."""
        return self._look_up(self._found.high, name("other(at)")), self._look_up(self._found.low, name("at"))

    def _look_up(self, table: tuple[int, ...], index: Node) -> str:
        return self.printer.text(by_table(table, index, ()))


class SignProducts(MagnitudeProducts):
    """The same with magnitudes for weights, whose signs the activations are given."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.vectors, self.sums = len(self._found.digits), "h" if plan.shorts else "a"

    def before(self, step: int) -> Iterator[str]:
        return self.places(step)

    def weight(self, step: int, which: int = 0) -> str:
        high, low = self.high_and_low
        return (high, low)[which] if self.vectors == 2 else f"vor({low}, {high})"

    def activation(self, pointer: str, offset: str) -> str:
        return f"signed_as({super().activation(pointer, offset)}, sign)"

    def multiply(self, acc: str, w: str, x: str) -> str:
        return f"{'dot_pairs' if self.plan.shorts else 'dot'}({acc}, {w}, {x})"


def _vector(part: Part) -> str:
    """The vector of containers that a part of codes lies in: `w<plane>_<vector>`, as `Products.loads` calls it."""
    return f"w{part.plane}_{part.container}"


def _lifted(bit: Bit) -> str:
    """A vector with a bit of each byte in bit 7, and others below it."""
    vector, at = bit
    return f"shl<{7 - at}>({vector})" if at < 7 else vector


class InPlaceProducts(IntProducts):
    """The same with codes multiplied where they stand in their bytes, after a mask alone, as far as there are
    accumulators for their multiples by powers of two, which meet once a chunk.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        top, most = 8 - plan.spec.fmt.bits, plan.residues - 1
        sets = [(0, *rest) for n in range(most + 1) for rest in combinations(range(1, top + 1), n)]
        found = [self._places(among) for among in sets]
        self._places_of_steps = min(found, key=self._operations)

    def _code(self, step: int, left: int) -> Node:
        return shifted(self._codes(step), left)

    def _places(self, among: tuple[int, ...]) -> tuple[int, ...]:
        """How far to the left of its value each step's code is left, with as few shifts as possible."""
        done: set[Node] = set()
        places = []
        for step in range(self.steps):
            left = min(among, key=lambda by: (len(shifts_of(self._code(step, by)) - done), by))
            done |= shifts_of(self._code(step, left))
            places.append(left)
        return tuple(places)

    def _operations(self, places: tuple[int, ...]) -> int:
        """Of a chunk: shifts, and what brings the accumulators together."""
        each = frozenset[Node]().union(*(shifts_of(self._code(s, left)) for s, left in enumerate(places)))
        meet = 2 * (len(set(places)) - 1) * self.plan.tile_m * self.plan.digits
        return len(each) * self.plan.spec.chunk_blocks + meet

    @property
    def shifts(self) -> tuple[int, ...]:
        return tuple(sorted({0, *self._places_of_steps}))

    def accumulator(self, step: int) -> int:
        return self.shifts.index(self._places_of_steps[step])

    def weight(self, step: int, which: int = 0) -> str:
        return self.printer.text(self.code(step))

    def code(self, step: int) -> Node:
        """The weight vector of a step: its codes, each times 2**shift of its accumulator."""
        return self._code(step, self._places_of_steps[step])


class WordProducts(IntProducts):
    """Dot products of 16-bit numbers: a step is 2 columns, 16 rows x 2 weights against 2 activations.

    One product stands for all pairs of digits of a weight and an activation. Activations are stored in the order of
    columns 0, 2, 1, 3 (`LB_WORDS` 1), which leaves a vector of bytes as two of words after a mask and a shift.
    """

    item, steps = "int16_t", 16

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.vectors = 1

    def weight(self, step: int, which: int = 0) -> str:
        quad, odd = divmod(step, 2)
        table = self.plan.word_table
        if table is None:
            high, *low = (f"word<{odd}>({super(WordProducts, self).weight(quad, e)})" for e in range(self._digits))
            return f"vadd(shl<{DIGIT_BITS}>({high}), {low[0]})" if low else high
        code = self.printer.text(self._codes(quad))
        return f"{'word_of' if table.top < 0 else f'signed_word_of<{table.top}>'}(lane<{odd}>({code}), kWords)"

    @property
    def tables(self) -> str:
        """With `kWords`: see `Plan.word_table`. Behind words that a bit negates are the negated ones, for who looks up
        both."""
        if (table := self.plan.word_table) is None:
            return super().tables
        low = table.integers
        return super().tables + table_text("int16_t kWords", low if table.top < 0 else (*low, *(-x for x in low)))

    @property
    def _digits(self) -> int:
        return len(self.plan.levels.digits)

    def multiply(self, acc: str, w: str, x: str) -> str:
        return f"dot16({acc}, {w}, {x})"

    def offset(self, step: int) -> int:
        return 2 * step


class SignedWordProducts(MagnitudeProducts, WordProducts):
    """The same with words made of two digits of magnitudes, which are given the weights' signs as bytes.

    Activations are stored in the order of columns.
    """

    def before(self, step: int) -> Iterator[str]:
        return self.places(step // 2)

    def weight(self, step: int, which: int = 0) -> str:
        return self._made("words_of", step % 2)

    def _made(self, by: str, part: int) -> str:
        high, low = self.high_and_low
        return f"{by}<{1 << self._found.shift}, {part}>(signed_as({high}, sign), signed_as({low}, sign))"


class UnsortedWordProducts(SignedWordProducts):
    """The same with words left where unpacking puts them, four columns of half of the rows in a vector: two shuffles
    less for 32 weights, and twice as many sums."""

    steps, unsorted = 8, True

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.vectors = 2

    def before(self, step: int) -> Iterator[str]:
        return self.places(step)

    def weight(self, step: int, which: int = 0) -> str:
        return self._made("unsorted_words_of", which)

    def activation(self, pointer: str, offset: str) -> str:
        return f"bcast8({pointer} + {offset})"

    def offset(self, step: int) -> int:
        return 4 * step


class FloatProducts(Products):
    """Fused multiply-adds: a step is 1 column, 16 dequantized rows against one activation."""

    vector, load, store, item, steps = "F", "fload", "fstore", "float", 32

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.printer = Printer("words")

    def weight(self, step: int, which: int = 0) -> str:
        fmt = self.plan.spec.fmt
        args = self._args(step // 4, step % 4 * 8) | {side: name(side) for side in ("scale", "zero", "offset")}
        return self.printer.text(build(scalar_program(fmt, self._widths(step // 4)), args))

    def activation(self, pointer: str, offset: str) -> str:
        return f"fset1({pointer}[{offset}])"

    def multiply(self, acc: str, w: str, x: str) -> str:
        return f"fma_({w}, {x}, {acc})"

    def offset(self, step: int) -> int:
        return step


class HalfProducts(FloatProducts):
    """The same for formats whose codes are float16 after a shift. Two columns are neighbours in a vector of 16-bit
    lanes, and conversion leaves them so, rows 0 to 7 in one vector, 8 to 15 in the other, until they are sorted by
    column."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.printer = Printer("halves")

    def weight(self, step: int, which: int = 0) -> str:
        quad, column = divmod(step, 4)
        pairs = ", ".join(self._floats(quad, column % 2, half) for half in range(2))
        return f"fmul({('evens', 'odds')[column // 2]}({pairs}), scale)"

    def _floats(self, quad: int, odd: int, half: int) -> str:
        """Columns 0 and 2, or 1 and 3, of a quad as floats, of one half of the rows."""
        fmt = self.plan.spec.fmt
        found = half_bits(build(fmt.element.decode(), {"code": self._codes(quad, odd * 8)}))
        assert found is not None
        return f"{('half_low', 'half_high')[half]}({self.printer.text(found[0])})"


class PairProducts(HalfProducts):
    """The same with sums of pairs of columns, which only they need to be sorted for: a step is two columns.

    Activations are stored in the order of columns 0, 2, 1, 3 (`LB_PAIRS`).
    """

    steps, vectors, late = 16, 2, True

    def weight(self, step: int, which: int = 0) -> str:
        return self._floats(step // 2, step % 2, which)

    def activation(self, pointer: str, offset: str) -> str:
        return f"fset2({pointer} + {offset})"

    def offset(self, step: int) -> int:
        return 2 * step


class LevelProducts(IntProducts):
    """Products with bytes that are decoded before: what is left of `IntProducts` without a scalar format."""

    def __init__(self) -> None:
        self.printer = Printer("bytes")


class LevelWordProducts(WordProducts):
    """The same of words."""

    def __init__(self) -> None:
        self.printer = Printer("bytes")


class CentroidProducts(FloatProducts):
    """Products with rows that are decoded before: what is left of `FloatProducts` without a scalar format."""

    def __init__(self) -> None:
        self.printer = Printer("words")


def products(plan: Plan) -> Products:
    """The products of a plan's spec."""
    if plan.integer:
        if plan.words:
            if not plan.magnitudes:
                return WordProducts(plan)
            few = not plan.buffered and plan.tile_m * plan.np <= _UNSORTED
            return (UnsortedWordProducts if few else SignedWordProducts)(plan)
        if plan.magnitudes:
            return SignProducts(plan)
        return InPlaceProducts(plan) if plan.residues > 1 else (ShortProducts if plan.shorts else IntProducts)(plan)
    if plan.half_factor is None:
        return FloatProducts(plan)
    return HalfProducts(plan) if plan.buffered else PairProducts(plan)
