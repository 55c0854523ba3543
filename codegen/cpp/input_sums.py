"""The kernel of vectors along the input for few tokens: tables of products first, then sums of their entries.

What differs by instruction set is in `text/sums_*.h`: entries are 16-bit words that permutes of registers choose from,
64 rows at once, or floats that are loaded one by one.
"""

from __future__ import annotations

from itertools import product

from lowbit.codegen.cpp.input_plan import ROWS, SumsPlan, entries
from lowbit.codegen.cpp.plan import align
from lowbit.codegen.cpp.sides import indent
from lowbit.codegen.cpp.vector_lookup import first_tiles
from lowbit.codegen.cpp.vector_plan import Book

__all__ = ["input_sums_text", "prepare_books", "sums_types"]


def sums_types(plan: SumsPlan) -> list[str]:
    """Members of `Args`, and what `bind` does with them."""
    at = plan.shared_bytes - plan.table_bytes
    return [f"table_scale = (float*)(shared + {at});", f"tables = shared + {at + align(plan.table_slots * 4)};"]


def prepare_books(plan: SumsPlan) -> list[str]:
    """Codebooks as floats, coordinate after coordinate; entries behind the last centroid are 0."""
    lines = []
    for book in plan.books:
        size, found = entries(book), f"stored_{book.name}(a.{book.name} + i * {book.stored_row})"
        if book.item_bytes == 1:
            found = f"fma_({found}, set{book.lanes}(a.{book.scale}[i / {book.size}]), zero{book.lanes}())"
        place = f"i / {book.size} * {book.dim * size} + i % {book.size}"
        lines += [
            f"for (int64_t n = {book.count * book.size}, i = n * part / parts; i < n * (part + 1) / parts; ++i) {{",
            f"float room[{book.lanes}];",
            f"store(room, {found});",
            f"for (int e = 0; e < {book.dim}; ++e) a.flat_{book.name}[{place} + e * {size}] = room[e];",
            "}",
        ]
        if size > book.size:
            rows, rest = book.count * book.dim, size - book.size
            to = f"a.flat_{book.name} + i * {size} + {book.size}"
            lines.append(f"if (!part) for (int64_t i = 0; i < {rows}; ++i) memset({to}, 0, {rest * 4});")
    return lines


def input_sums_text(plan: SumsPlan) -> str:
    """Tables, passes over the indices, and `work`, which runs one thread's share."""
    return "\n".join([first_tiles(plan.part), _tables(plan), _pass(plan), _finish(plan), _work(plan)])


def _tables(plan: SumsPlan) -> str:
    """`make_tables`: those of chunk `c` of token `t`, number `slot` of the tables. Words share a scale by which the
    largest sums that are added up as words fit."""
    part, step = plan.part, plan.step_entries
    lines = [
        "static void make_tables(const Args& a, int64_t segment, int64_t t, int64_t c, int64_t slot, float* fresh) {",
        f"const int64_t n = chunk_columns(c) / {part.dim};",
        "const float* x = a.xq + (c * a.m + t) * kTokenStride;",
        "float sum = 0.0f;",
        "uint32_t most = 0;",
        f"for (int64_t g = 0; g < n; ++g, x += {part.dim}) {{",
        f"if (g % {plan.steps} == 0) sum = 0.0f;",
    ]
    for book, at in _places(plan):
        size = entries(book)
        to, flat = f"fresh + g * {step} + {at}", f"a.flat_{book.name} + segment * {book.dim * size}"
        lines.append(f"sum += lb_float(products<{book.dim}, {size}>(x, {flat}, {to}));")
    lines += [
        "most = lb_bits(sum) > most ? lb_bits(sum) : most;",
        "}",
        "float inverse = 0.0f;",
        "a.table_scale[slot] = scale_for(most, inverse);",
        f"uint8_t* to = a.tables + slot * {plan.chunk_entries} * kEntryBytes;",
        f"for (int64_t g = 0; g < n; ++g, fresh += {step}, to += {step} * kEntryBytes) {{",
    ]
    for book, at in _places(plan):
        lines.append(f"put_entries<{book.size}>(fresh + {at}, inverse, to + {at} * kEntryBytes);")
    return indent([*lines, "}", "}"])


def _places(plan: SumsPlan) -> list[tuple[Book, int]]:
    """Codebooks, and where their tables begin among the entries of one vector of activations."""
    books = plan.part.books
    return [(book, sum(entries(b) for b in books[:i])) for i, book in enumerate(books)]


def _pass(plan: SumsPlan) -> str:
    """`pass`: adds the sums of a unit's rows over chunks [c0, c1), with the tables from `slot` on, to those at `y`."""
    part, tiles = plan.part, range(plan.pass_tiles)
    lines = [
        "static void pass(const Args& a, int64_t segment, int64_t unit, int64_t slot, int64_t c0, int64_t c1, "
        "float* y) {",
        f"const int64_t first = first_{part.name}[segment], last = first + tiles_{part.name}[segment] - 1;",
    ]
    for w in tiles:
        # Rows behind a segment's end are computed from whatever is there, and not written.
        tile = f"first + unit * {len(tiles)} + {w}"
        at = f"(({tile} < last ? {tile} : last) * {part.columns} + c0 * {plan.chunk_cols // part.dim}) * {ROWS}"
        lines += [f"const uint8_t* {_index(book, w)} = a.{book.index} + {at};" for book in part.books]
    lines += [
        "for (int64_t c = c0; c < c1; ++c, ++slot) {",
        f"const uint8_t* tables = a.tables + slot * {plan.chunk_entries} * kEntryBytes;",
        f"const int64_t n = chunk_columns(c) / {part.dim};",
        *(f"Sums s{w} = no_sums();" for w in tiles),
        *(f"Found f{w} = no_found();" for w in tiles),
        "int64_t g = 0;",
        "#pragma GCC unroll 1",
        f"for (; g + {plan.steps} <= n; g += {plan.steps}) {{",
        *(
            f"prefetch_far({_index(book, w)} + {plan.prefetch + i * ROWS});"
            for w, book, i in product(tiles, part.books, range(plan.steps))
        ),
        *_steps(plan, plan.steps),
        "}",
    ]
    if plan.steps > 1:
        lines += ["#pragma GCC unroll 1", "for (; g < n; ++g) {", *_steps(plan, 1), "}"]
    lines += [f"put_sums(y + {w * ROWS}, s{w}, f{w}, a.table_scale[slot]);" for w in tiles]
    return indent([*lines, "}", "}"])


def _index(book: Book, w: int) -> str:
    return f"{book.index}{w}"


def _steps(plan: SumsPlan, many: int) -> list[str]:
    """Entries of `many` vectors of activations, added up as they are found, then on to the sums."""
    lines, tiles = [], range(plan.pass_tiles)
    for i in range(many):
        for book, at in _places(plan):
            place = f"tables + {i * plan.step_entries + at} * kEntryBytes"
            lines += ["{", f"const auto table = table_at<{book.size}>({place});"]
            lines += [f"look_up<{book.size}>(f{w}, {_index(book, w)} + {i * ROWS}, table);" for w in tiles]
            lines.append("}")
    lines += [f"add_up(s{w}, f{w});" for w in tiles]
    lines += [f"{_index(book, w)} += {many * ROWS};" for w in tiles for book in plan.part.books]
    return [*lines, f"tables += {many * plan.step_entries} * kEntryBytes;"]


def _finish(plan: SumsPlan) -> str:
    """`finish`: a unit's sums of one token, in the order of rows, to their end."""
    rows = plan.unit_rows
    lines = [
        "static void finish(const Args& a, const Place& p, int64_t t, const float* y) {",
        f"alignas(64) float rows[{plan.pair * rows}];",
        f"for (int i = 0; i < {plan.pair * rows}; i += {ROWS}) in_order(y + i, rows + i);",
    ]
    return indent([*lines, f"put(a, t, p.column, rows, {f'rows + {rows}, ' if plan.silu else ''}p.rows);", "}"])


def _work(plan: SumsPlan) -> str:
    """Tables of a block of chunks are made by all threads; a barrier later each has its own rows. The next block's lie
    in another place, so that nobody has to wait until all have read them."""
    segments, row = len(plan.spec.segments), plan.pair * plan.unit_rows
    lines = [
        "static void work(const Args& a, int part, int parts, uint8_t* room) {",
        "float* const sums = (float*)room;",
        "const int64_t first = kUnits * part / parts, end = kUnits * (part + 1) / parts;",
        "int64_t place_of_block = 0;",
        f"for (int64_t t0 = 0; t0 < a.m; t0 += {plan.tile_m}) {{",
        f"const int64_t tokens = a.m - t0 < {plan.tile_m} ? a.m - t0 : {plan.tile_m};",
        f"memset(sums, 0, size_t(end - first) * size_t(tokens) * {row * 4});",
        f"for (int64_t c = 0; c < kChunks; c += {plan.block_chunks}) {{",
        f"const int64_t chunks = kChunks - c < {plan.block_chunks} ? kChunks - c : {plan.block_chunks};",
        f"const int64_t items = tokens * chunks * {segments};",
        "for (int64_t i = items * part / parts; i < items * (part + 1) / parts; ++i) {",
        "const int64_t t = i / chunks % tokens, segment = i / chunks / tokens;",
        f"make_tables(a, segment, t0 + t, c + i % chunks, place_of_block + i, sums + {plan.sum_floats});",
        "}",
        "#pragma omp barrier",
        "for (int64_t u = first; u < end; ++u) {",
        "const Place p = place(u);",
        "for (int64_t t = 0; t < tokens; ++t) {",
        f"float* const y = sums + ((u - first) * tokens + t) * {row};",
    ]
    for i in range(plan.pair):
        segment = str(i) if plan.silu else "p.segment"
        slot = f"place_of_block + ({segment} * tokens + t) * chunks"
        lines.append(f"pass(a, {segment}, p.unit, {slot}, c, c + chunks, y + {i * plan.unit_rows});")
    lines += [
        "}",
        "}",
        f"place_of_block = {plan.table_slots // 2} - place_of_block;",
        "}",
        "for (int64_t u = first; u < end; ++u) {",
        "const Place p = place(u);",
        f"for (int64_t t = 0; t < tokens; ++t) finish(a, p, t0 + t, sums + ((u - first) * tokens + t) * {row});",
        "}",
        "}",
        "}",
    ]
    return indent(lines)
