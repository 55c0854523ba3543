"""The kernel of vector formats for many tokens: a chunk of a unit's columns is decoded once into a buffer that stays in
the first-level cache, and the register tiles of float kernels run over it."""

from __future__ import annotations

from lowbit.codegen.cpp.input_plan import ROWS, InputPlan
from lowbit.codegen.cpp.plan import PANEL
from lowbit.codegen.cpp.products import CentroidProducts
from lowbit.codegen.cpp.sides import dispatch, indent
from lowbit.codegen.cpp.tiles import float_tile, pieces_of_work
from lowbit.codegen.cpp.vector_lookup import (
    batch_pointers,
    book_pointers,
    centroid_terms,
    first_tiles,
    index_words,
    sum_of,
)
from lowbit.codegen.cpp.vector_plan import TILE, Part, VectorPlan

__all__ = ["vector_buffered_text"]


def vector_buffered_text(plan: VectorPlan) -> str:
    """Register tiles, decoding of each part, and `work`, which runs one thread's share."""
    form = CentroidProducts()
    widths = tuple(dict.fromkeys(plan.widths))
    texts = [float_tile(plan, form, width, height, plan.panels) for width in widths for height in plan.heights]
    texts += [first_tiles(part) for part in plan.parts]
    texts += [_decode_rows(plan) if isinstance(plan, InputPlan) else _decode(plan, part) for part in plan.parts]
    body = ["unit(a, place(n / pieces), t0, t1, room);"]
    return "\n".join([*texts, _unit(plan), indent(pieces_of_work(plan, body))])


def _decode(plan: VectorPlan, part: Part) -> str:
    """`decode_<part>`: the rows of a unit over the columns of chunk `c`, as [column][row of all the unit's panels]."""
    stride, dim = plan.panels * PANEL, part.dim
    lines = [
        f"static void decode_{part.name}(const Args& a, int64_t segment, int64_t unit, int64_t c, float* buffer) {{",
        f"const int64_t n = chunk_columns(c), column = chunk_start(c) - {_start(plan, part)};",
        *book_pointers(part, f"column / {part.group_size}" if part.groups > 1 else "0"),
        f"for (int64_t first = 0; first < {part.per_unit}; first += {part.batch}) {{",
        f"const int64_t v = unit * {part.per_unit} + first;",
        f"float* to = buffer + first * {dim};",
        f"if (v >= tiles_{part.name}[segment] * {TILE}) {{",
        f"for (int64_t k = 0; k < n; ++k) memset(to + k * {stride}, 0, {part.batch * dim * 4});",
        "continue;",
        "}",
        *batch_pointers(part, "column"),
        "for (int64_t k = 0; k < n; ++k) {",
        *index_words(part, part.batch),
    ]
    for i in range(part.batch):
        lines += ["{", f"const F{part.lanes} w = {sum_of(centroid_terms(part, i))};"]
        # The last vectors must not reach into rows that are decoded already.
        whole = i * dim + part.lanes <= part.batch * dim
        at = f"to + {i * dim}"
        lines += [f"store({at}, w);" if whole else f"memcpy({at}, &w, {dim * 4});", "}"]
    lines += [f"to += {stride};", *(f"i_{b.index} += {TILE};" for b in part.books)]
    return indent([*lines, "}", "}", "}"])


def _decode_rows(plan: InputPlan) -> str:
    """The same of vectors along the input, whose elements are of one row each: as [column][row] too."""
    part, stride, tiles = plan.part, plan.panels * PANEL, plan.unit_rows // ROWS
    lines = [
        f"static void decode_{part.name}(const Args& a, int64_t segment, int64_t unit, int64_t c, float* buffer) {{",
        f"const int64_t n = chunk_columns(c) / {part.dim}, column = chunk_start(c) / {part.dim};",
        *book_pointers(part, "0"),
        f"for (int64_t tile = unit * {tiles}; tile < (unit + 1) * {tiles}; ++tile, buffer += {ROWS}) {{",
        f"if (tile >= tiles_{part.name}[segment]) {{",
        f"for (int64_t k = 0; k < n * {part.dim}; ++k) memset(buffer + k * {stride}, 0, {ROWS * 4});",
        "continue;",
        "}",
        f"const int64_t at = ((first_{part.name}[segment] + tile) * {part.columns} + column) * {ROWS};",
        f"for (int64_t v = 0; v < n * {ROWS}; v += {part.batch}) {{",
        *(f"const {b.index_type}* i_{b.index} = a.{b.index} + at + v;" for b in part.books),
        *index_words(part, part.batch),
        f"float* to = buffer + v / {ROWS} * {part.dim * stride} + v % {ROWS};",
        f"alignas(64) float room[{part.batch * part.lanes}];",
        *(f"store(room + {i * part.lanes}, {sum_of(centroid_terms(part, i))});" for i in range(part.batch)),
        f"for (int e = 0; e < {part.dim}; ++e)",
        f"for (int i = 0; i < {part.batch}; ++i) to[e * {stride} + i] = room[i * {part.lanes} + e];",
    ]
    return indent([*lines, "}", "}", "}"])


def _start(plan: VectorPlan, part: Part) -> int:
    """Stored column at which the part begins."""
    return sum(p.columns for p in plan.parts if p.chunk < part.chunk)


def _unit(plan: VectorPlan) -> str:
    """One unit of work for tokens [t0, t1)."""
    row = plan.panels * PANEL
    lines = [
        "static void unit(const Args& a, const Place& p, int64_t t0, int64_t t1, uint8_t* room) {",
        "float* buffer = (float*)room;",
        f"float* sums = (float*)(room + {plan.code_bytes});",
        f"memset(sums, 0, size_t(t1 - t0) * {row * 4});",
        "for (int64_t c = 0; c < kChunks; ++c) {",
    ]
    for n, part in enumerate(plan.parts):
        last = part.chunk + part.groups * part.group_chunks
        guard = f"if (c < {last}) {{" if n + 1 < len(plan.parts) else "{"
        lines += [("else " if n else "") + guard, f"decode_{part.name}(a, p.segment, p.unit, c, buffer);"]
        if plan.silu:
            lines.append(f"decode_{part.name}(a, 1, p.unit, c, buffer + kUnitRows);")
        lines.append("}")
    lines.append("const int64_t n = chunk_columns(c);")
    x, at = "a.xq + (c * a.m + t) * kTokenStride", 0
    for width in plan.widths:
        tiles = {h: f"tile_{width}_{h}(buffer + {at}, n, {x}, sums + (t - t0) * {row} + {at});" for h in plan.heights}
        lines += dispatch(plan.heights, "t0", "t1", tiles.__getitem__)
        at += width * PANEL
    up = "y + kUnitRows, " if plan.silu else ""
    lines += [
        "}",
        "for (int64_t t = t0; t < t1; ++t) {",
        f"const float* y = sums + (t - t0) * {row};",
        f"put(a, t, p.column, y, {up}p.rows);",
        "}",
    ]
    return indent([*lines, "}"])
