"""Kernels of codebooks of bytes: what the one for few tokens and the one for many have in common, and the former.

Four columns of a block are one step: 64 bytes of centroids each, brought together by eight shuffles to the operands of
four byte dot products (`text/vector_bytes.h`); or, in permuted parts, an operand for every coordinate, whose bytes are
looked up by permutes, of two coordinates at a time (`text/bytes_permute.h`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

from lowbit.codegen.cpp.bytes_plan import BytesPlan, pair_bytes, table_bytes
from lowbit.codegen.cpp.plan import PANEL
from lowbit.codegen.cpp.sides import indent
from lowbit.codegen.cpp.vector_direct import unit_texts
from lowbit.codegen.cpp.vector_lookup import first_tiles
from lowbit.codegen.cpp.vector_plan import TILE, Part

__all__ = ["Operands", "add_function", "block_pointers", "books_of", "bytes_direct_text", "columns_loop"]


@dataclass(frozen=True)
class Operands:
    """Operands of a step that are made together: statements before them, then expressions by their numbers."""

    lines: tuple[str, ...]
    made: dict[int, str]


def bytes_direct_text(plan: BytesPlan) -> str:
    """Passes over each part, units, and `work`, which runs one thread's share."""
    texts = [first_tiles(part) for part in plan.parts]
    for part in plan.parts:
        texts += [_pass(plan, part, height) for height in plan.heights]
    return "\n".join([*texts, *unit_texts(plan)])


def block_pointers(part: Part, column: str) -> list[str]:
    """Declarations of `p<i>` and `q<i>`: the block's indices into book i from vector `v` of `segment` on, at a column;
    `q<i>` those of the tile behind, where a block has two (any tile at the end of a segment, whose rows are
    nobody's)."""
    tiles, lines = f"tiles_{part.name}[segment]", []
    place = f"((first_{part.name}[segment] + {{}}) * {part.columns} + {column}) * {TILE}"
    second = f"v / {TILE} + 1 < {tiles} ? v / {TILE} + 1 : v / {TILE}"
    for i, book in enumerate(part.books):
        lines += [
            f"const {book.index_type}* p{i} = a.{book.index} + {place.format(f'v / {TILE}')} + v % {TILE};",
            f"[[maybe_unused]] const {book.index_type}* q{i} = a.{book.index} + {place.format(f'({second})')};",
        ]
    return lines


def move_pointers(part: Part, by: str) -> str:
    """A statement that moves what `block_pointers` declares by so many columns."""
    pointers = (f"{letter}{i}" for i in range(len(part.books)) for letter in "pq")
    return ", ".join(f"{pointer} += {by} * {TILE}" for pointer in pointers) + ";"


def books_of(plan: BytesPlan, part: Part, group: str) -> list[str]:
    """Declarations of `book<i>` and `scale`: the codebooks of `segment` and `group`, or their tables."""
    at = f"(segment * {part.groups} + {group})"
    lines = [f"[[maybe_unused]] const F scale = fset1(a.{part.books[0].scale}[{at}]);"]
    for i, b in enumerate(part.books):
        table = f"table_{b.name} + {at} * {table_bytes(b)}"
        lines.append(
            f"const uint8_t* book{i} = a.{table if plan.permuted(part) else f'{b.name} + {at} * {b.size * b.lanes}'};"
        )
    return lines


def columns_loop(
    plan: BytesPlan, part: Part, wanted: range, use: Callable[[Operands], list[str]], ahead: bool = True
) -> list[str]:
    """What `use` makes of the `wanted` operands, in turn of those that are made together, for every four of the `n`
    columns from what `block_pointers` declares on; missing columns of the last step have bytes 0, whatever they meet.
    ahead: fetch indices."""

    def step(left: bool) -> list[str]:
        lines, groups = _permutes(part, wanted, left) if plan.permuted(part) else _loads(part, wanted, left)
        return [*lines, *(line for group in groups for line in ("{", *group.lines, *use(group), "}"))]

    # Hardware follows the streams of indices within a page.
    streams = [f"{letter}{i}" for i in range(len(part.books)) for letter in "pq"[: 1 + (plan.many(part) > TILE)]]
    fetch = [f"prefetch_far((const uint8_t*){index} + {plan.prefetch});" for index in streams if ahead]
    return [
        "int64_t k = 0;",
        "#pragma GCC unroll 1",
        *("for (; k + 4 <= n; k += 4) {", *fetch, *step(False), move_pointers(part, "4"), "}"),
        *("if (const int64_t left = n - k) {", *step(True), move_pointers(part, "left"), "}"),
    ]


def _loads(part: Part, wanted: range, left: bool) -> tuple[list[str], list[Operands]]:
    """Statements before a step's operands, and these: centroids loaded one by one."""
    lines = []
    for j in range(4):
        places = (f"p{i} + {TILE * j}, q{i} + {TILE * j}" for i in range(len(part.books)))
        value = _added(f"centroids<{part.lanes}>(book{i}, {place})" for i, place in enumerate(places))
        lines.append(f"const V c{j} = {f'left > {j} ? {value} : vzero()' if left and j else value};")
    quads = "const Quads w = quads(c0, c1, c2, c3);"
    return lines, [Operands((quads,), {i: f"w.w[{i}]" for i in wanted})]


def _permutes(part: Part, wanted: range, left: bool) -> tuple[list[str], list[Operands]]:
    """The same of permutes: operands are looked up where they are used, which leaves registers to sums."""
    books = range(len(part.books))
    lines = [f"const V index{i} = by_vector(p{i}, q{i}{', left' if left else ''});" for i in books]
    lines += ["const V kept = columns_of(left);"] if left else []
    groups = []
    for first in wanted[::2]:
        tables = [f"{book.size}, {first // 2 * pair_bytes(book)}" for book in part.books]
        pairs = tuple(f"const auto found{i} = pair_of<{tables[i]}>(index{i}, book{i});" for i in books)
        made = {}
        for e in (e for e in wanted if e // 2 == first // 2):
            value = _added(f"operand_of<{tables[i]}, {e % 2}>(found{i}, book{i})" for i in books)
            made[e] = f"vand(kept, {value})" if left else value
        groups.append(Operands(pairs, made))
    return lines, groups


def _added(terms: Iterable[str]) -> str:
    """Centroids of main and residual codebooks, as bytes of one."""
    first, *others = terms
    return f"add_levels({first}, {others[0]})" if others else first


def _pass(plan: BytesPlan, part: Part, height: int) -> str:
    """Adds the products of a part with a block of vectors, over all of its columns, to the sums at `y`."""
    cells = [(i, m) for m in range(height) for i in range(plan.operands(part))]
    sweeps = plan.sweeps(part)
    lines = [
        f"static void {part.name}_{height}(const Args& a, int64_t segment, int64_t v, int64_t t, float* y) {{",
        *(f"F y{i}_{m} = fzero();" for i, m in cells),
        *block_pointers(part, "0"),
        f"int64_t c = {part.chunk};",
        f"for (int64_t g = 0; g < {part.groups}; ++g) {{",
        *books_of(plan, part, "g"),
        f"for (const int64_t end = c + {part.group_chunks}; c < end; ++c) {{",
        "const int64_t n = chunk_columns(c), at = c * a.m + t;",
        f"const {plan.item}* x = a.xq + at * kTokenStride;",
    ]
    for sweep in sweeps:
        again = [move_pointers(part, "-n")] if sweep.start else []
        lines += ["{", *again, *_sweep(plan, part, height, sweep), "}"]
    lines += ["}", "}", f"alignas(64) float s[{PANEL * plan.operands(part)}];"]
    for m in range(height):
        lines += [f"fstore(s + {PANEL * i}, y{i}_{m});" for i in range(plan.operands(part))]
        lines.append(f"{add_function(plan, part)}(s, y + {m * plan.row_stride});")
    return indent([*lines, "}"])


def add_function(plan: BytesPlan, part: Part) -> str:
    """What adds the sums of a block to the rows of its vectors."""
    return f"add_coordinates<{part.dim}>" if plan.permuted(part) else f"add_rows<{part.lanes}, {part.dim}>"


def _sweep(plan: BytesPlan, part: Part, height: int, sweep: range) -> list[str]:
    """Sums of some operands over one chunk, then added to the floats `y`."""
    cells, digits = [(i, m) for m in range(height) for i in sweep], range(plan.digits)
    lines = [f"V a{i}_{m}_{d} = {_start(plan, m, d)};" for i, m in cells for d in digits]

    def use(operands: Operands) -> list[str]:
        return _products(plan, height, operands, plan.permuted(part))

    lines += columns_loop(plan, part, sweep, use, ahead=not sweep.start)
    for i, m in cells:
        exact = f"a{i}_{m}_0" if plan.digits == 1 else f"vadd(shl<8>(a{i}_{m}_0), a{i}_{m}_1)"
        lines.append(f"y{i}_{m} = fma_(fmul(cvt({exact}), fset1(a.xs[at + {m}])), scale, y{i}_{m});")
    return lines


def _products(plan: BytesPlan, height: int, operands: Operands, one_by_one: bool) -> list[str]:
    """Operands times the activations of four columns: operands in turn where they come `one_by_one`, else these."""
    if plan.words:
        return _word_products(plan, height, operands)
    lines: list[str] = []
    rows = [(m, d) for m in range(height) for d in range(plan.digits)]
    u = {(m, d): f"const V u{m}_{d} = bcast4(x + k + {m * plan.token_stride + d * plan.chunk_cols});" for m, d in rows}
    if one_by_one:
        lines += u.values()
        for i, operand in operands.made.items():
            lines += ["{", f"const V w = {operand};"]
            lines += [*(f"a{i}_{m}_{d} = dot(a{i}_{m}_{d}, w, u{m}_{d});" for m, d in rows), "}"]
        return lines
    for m, d in rows:
        dots = (f"a{i}_{m}_{d} = dot(a{i}_{m}_{d}, {w}, u{m}_{d});" for i, w in operands.made.items())
        lines += ["{", u[m, d], *dots, "}"]
    return lines


def _word_products(plan: BytesPlan, height: int, operands: Operands) -> list[str]:
    """The same of words: columns 0 and 2 of a step, and 1 and 3, each two products."""
    lines: list[str] = []
    for i, operand in operands.made.items():
        lines += ["{", f"const V all = {operand}, w0 = word<0>(all), w1 = word<1>(all);"]
        for m, odd in product(range(height), (0, 1)):
            x = f"bcast4(x + k + {m * plan.token_stride + 2 * odd})"
            lines.append(f"a{i}_{m}_0 = dot16(a{i}_{m}_0, w{odd}, {x});")
        lines.append("}")
    return lines


def _start(plan: BytesPlan, m: int, d: int) -> str:
    """What a digit's sums start from: the lowest one's from what the bytes have too much."""
    return f"set1(uint32_t(a.xi[at + {m}]))" if d == plan.digits - 1 else "vzero()"
