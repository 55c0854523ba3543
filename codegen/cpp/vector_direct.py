"""The kernel of vector formats for few tokens: every index is looked up once per register tile of tokens, and the
centroid, a vector of neighbouring rows, multiplies the column's activation of each token."""

from __future__ import annotations

from lowbit.codegen.cpp.sides import dispatch, indent
from lowbit.codegen.cpp.vector_lookup import (
    batch_pointers,
    book_pointers,
    centroid_terms,
    first_tiles,
    index_words,
    sum_of,
)
from lowbit.codegen.cpp.vector_plan import TILE, Part, VectorPlan

__all__ = ["unit_texts", "vector_direct_text"]


def vector_direct_text(plan: VectorPlan) -> str:
    """Lookups of each part and height, units, and `work`, which runs one thread's share."""
    texts = [first_tiles(part) for part in plan.parts]
    texts += [_lookups(plan, part, height) for part in plan.parts for height in plan.heights]
    return "\n".join([*texts, *unit_texts(plan)])


def unit_texts(plan: VectorPlan) -> list[str]:
    """Units of every height, which call `<part>_<height>(a, segment, v, t, y)`, and `work`."""
    return [*(_unit(plan, height) for height in plan.heights), _work(plan)]


def _lookups(plan: VectorPlan, part: Part, height: int) -> str:
    """Adds `vectors` vectors from `v` on of one segment, over all columns of the part, to the sums at `y`."""
    many, lanes = plan.many(part), part.lanes
    cells = [(v, m) for v in range(many) for m in range(height)]
    lines = [
        f"static void {part.name}_{height}(const Args& a, int64_t segment, int64_t v, int64_t t, float* y) {{",
        *(f"F{lanes} y{i}_{m} = zero{lanes}();" for i, m in cells),
        *batch_pointers(part, "0"),
        f"int64_t c = {part.chunk};",
        f"for (int64_t g = 0; g < {part.groups}; ++g) {{",
        *book_pointers(part, "g"),
        f"for (const int64_t end = c + {part.group_chunks}; c < end; ++c) {{",
        "const float* x = a.xq + (c * a.m + t) * kTokenStride;",
        "const int64_t n = chunk_columns(c);",
        "for (int64_t k = 0; k < n; ++k) {",
        *index_words(part, many),
        *(f"const F{lanes} x{m} = set{lanes}(x[k + {m * plan.token_stride}]);" for m in range(height)),
    ]
    for i in range(many):
        lines += _products(part, i, height)
    lines += [f"i_{b.index} += {TILE};" for b in part.books]
    lines += ["}", "}", "}"]
    # Lanes beyond the vector's length hold zeros, or what the next vector's sums may be spoilt by anyway.
    for i, m in cells:
        at = f"y + {m * plan.row_stride + i * part.dim}"
        lines.append(f"store({at}, fadd(load{lanes}({at}), y{i}_{m}));")
    return indent([*lines, "}"])


def _products(part: Part, i: int, height: int) -> list[str]:
    """Vector `i` of the batch times the column's activations. For one token the sum of centroids is not formed."""
    terms = centroid_terms(part, i)
    if height == 1:
        return [f"y{i}_0 = fma_({term}, x0, y{i}_0);" for term in terms]
    weights = [f"const F{part.lanes} w = {sum_of(terms)};"]
    return ["{", *weights, *(f"y{i}_{m} = fma_(w, x{m}, y{i}_{m});" for m in range(height)), "}"]


def _unit(plan: VectorPlan, height: int) -> str:
    """All sums of one unit for `height` tokens, then their end."""
    rows = height * plan.row_stride
    lines = [
        f"static void unit_{height}(const Args& a, const Place& p, int64_t t, float* y) {{",
        f"memset(y, 0, {plan.pair * rows * 4});",
    ]
    for i in range(plan.pair):
        segment = "1" if i else "p.segment"
        for part in plan.parts:
            many = plan.per_call(part)
            lines += [
                "{",
                f"const int64_t segment = {segment}, first = p.unit * {part.per_unit};",
                f"for (int64_t v = 0; v < {part.per_unit}; v += {many}) {{",
                f"if (first + v >= tiles_{part.name}[segment] * {plan.tile}) break;",
                f"{part.name}_{height}(a, segment, first + v, t, y + {i * rows} + v * {part.dim // part.span});",
                "}",
                "}",
            ]
    for m in range(height):
        up = f"y + {rows + m * plan.row_stride}, " if plan.silu else ""
        lines.append(f"put(a, t + {m}, p.column, y + {m * plan.row_stride}, {up}p.rows);")
    return indent([*lines, "}"])


def _work(plan: VectorPlan) -> str:
    lines = [
        "static void work(const Args& a, int part, int parts, uint8_t* room) {",
        "for (int64_t u = kUnits * part / parts; u < kUnits * (part + 1) / parts; ++u) {",
        "const Place p = place(u);",
        *dispatch(plan.heights, "0", "a.m", lambda h: f"unit_{h}(a, p, t, (float*)room);"),
        "}",
        "}",
    ]
    return indent(lines)
