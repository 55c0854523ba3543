"""The kernel of vectors along the input for few tokens and codebooks too large for tables: a centroid is looked up once
per register tile of tokens, and multiplied with as many activations as it has elements."""

from __future__ import annotations

from lowbit.codegen.cpp.input_plan import ROWS, InputPlan
from lowbit.codegen.cpp.sides import indent
from lowbit.codegen.cpp.vector_direct import unit_texts
from lowbit.codegen.cpp.vector_lookup import book_pointers, centroid_terms, first_tiles, index_words, sum_of

__all__ = ["input_rows_text"]


def input_rows_text(plan: InputPlan) -> str:
    """Lookups at each height, units, and `work`, which runs one thread's share."""
    part = plan.part
    total = [
        f"LB_INLINE float total(F{part.lanes} x) {{",
        f"float room[{part.lanes}], sum = 0.0f;",
        "store(room, x);",
        f"for (int i = 0; i < {part.lanes}; ++i) sum += room[i];",
        "return sum;",
        "}",
    ]
    texts = [first_tiles(part), indent(total), *(_lookups(plan, height) for height in plan.heights)]
    return "\n".join([*texts, *unit_texts(plan)])


def _lookups(plan: InputPlan, height: int) -> str:
    """Adds the sums of 64 rows from `v` on of one segment to those at `y`: of some rows at a time, whose indices are
    neighbours, over one chunk of columns, whose indices stay in the first-level cache for the next rows."""
    part = plan.part
    many, lanes = plan.many(part), part.lanes
    cells = [(i, m) for i in range(many) for m in range(height)]
    lines = [
        f"static void {part.name}_{height}(const Args& a, int64_t segment, int64_t v, int64_t t, float* y) {{",
        *book_pointers(part, "0"),
        f"for (int64_t c = 0; c < {part.group_chunks}; ++c) {{",
        f"const int64_t n = chunk_columns(c) / {part.dim}, column = chunk_start(c) / {part.dim};",
        f"const int64_t at = ((first_{part.name}[segment] + v / {ROWS}) * {part.columns} + column) * {ROWS};",
        f"for (int64_t r = 0; r < {ROWS}; r += {many}) {{",
        *(f"const {b.index_type}* i_{b.index} = a.{b.index} + at + r;" for b in part.books),
        "const float* x = a.xq + (c * a.m + t) * kTokenStride;",
        *(f"F{lanes} y{i}_{m} = zero{lanes}();" for i, m in cells),
        f"for (int64_t k = 0; k < n; ++k, x += {part.dim}) {{",
        *index_words(part, many),
        *(line for m in range(height) for line in _activations(plan, m)),
    ]
    for i in range(many):
        lines += ["{", f"const F{lanes} w = {sum_of(centroid_terms(part, i))};"]
        lines += [*(f"y{i}_{m} = fma_(w, x{m}, y{i}_{m});" for m in range(height)), "}"]
    lines += [*(f"i_{b.index} += {ROWS};" for b in part.books), "}"]
    lines += [f"y[{m * plan.row_stride} + r + {i}] += total(y{i}_{m});" for i, m in cells]
    return indent([*lines, "}", "}", "}"])


def _activations(plan: InputPlan, m: int) -> list[str]:
    """`x<m>`: those of one vector of token `m`, zeros behind them."""
    part, at = plan.part, f"x + {m * plan.token_stride}"
    if part.dim == part.lanes:
        return [f"const F{part.lanes} x{m} = load{part.lanes}({at});"]
    room = f"float room{m}[{part.lanes}] = {{}};"
    return [room, f"memcpy(room{m}, {at}, {part.dim * 4});", f"const F{part.lanes} x{m} = load{part.lanes}(room{m});"]
