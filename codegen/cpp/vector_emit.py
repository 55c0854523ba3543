"""One kernel of a vector format as C++ text: codebooks, lookups, tiles, epilogue."""

from __future__ import annotations

from lowbit.codegen.cpp.assemble import Pieces, assemble
from lowbit.codegen.cpp.sides import indent
from lowbit.codegen.cpp.vector_buffered import vector_buffered_text
from lowbit.codegen.cpp.vector_direct import vector_direct_text
from lowbit.codegen.cpp.vector_lookup import book_functions
from lowbit.codegen.cpp.vector_plan import VectorPlan

__all__ = ["emit_vector_text"]

_VALUE = {
    "none": "{y}",
    "col": "({y} + a.shift[t])",
    "row": "(a.norm_scale[{row}] * {y} + a.norm_bias[{row}] * a.shift[t])",
}


def emit_vector_text(plan: VectorPlan, arch: str) -> str:
    """The whole source of one kernel for instruction set `arch`."""
    norm = plan.fmt.norm
    macros = {"LB_CODE_TOP": 255, "LB_LIMBS": 0, "LB_PAIRS": 0, "LB_NORM": ("none", "col", "row").index(norm)}
    lanes = "lanes_x86.h" if arch.startswith("avx") else "lanes_generic.h"
    kernel = vector_buffered_text(plan) if plan.buffered else vector_direct_text(plan)
    text = "\n".join([book_functions(plan), _prepare(plan), _place(plan), kernel])
    pieces = Pieces(macros, (lanes,), _constants(plan), _types(plan), "vector_rows.h", _VALUE[norm], text)
    return assemble(plan, arch, pieces)


def _constants(plan: VectorPlan) -> dict[str, int]:
    return {
        "kChunkCols": plan.chunk_cols,
        "kChunks": plan.chunks,
        "kChunkRows": plan.chunks,
        "kUnitRows": plan.unit_rows,
        "kUnits": sum(plan.units),
        "kProducts": sum(plan.spec.segments) * plan.spec.k,
    }


def _types(plan: VectorPlan) -> str:
    names = plan.spec.operands
    lines = ["struct Args : Call {"]
    for name in names:
        lines.append(f"const {_operand_type(plan, name)}* {name};")
    lines += [f"float* wide_{b.name};" for b in plan.books if b.wide]
    lines += [
        "float* xq;  // activations, [chunk][token][column]",
        "float* shift;  // what norms add, [token]",
        "void bind(const void* const* weight, uint8_t* shared, uint8_t* tokens) {",
        *(f"{name} = (const {_operand_type(plan, name)}*)weight[{i}];" for i, name in enumerate(names)),
    ]
    at = 0
    for book in plan.books:
        if book.wide:
            lines.append(f"wide_{book.name} = (float*)(shared + {at});")
            at += book.wide_bytes
    lines += ["xq = (float*)tokens;", "shift = xq + kChunks * m * kTokenStride;", "}", "};"]
    column = "a.columns[i]" if plan.fmt.ordered else "i"
    lines += [f"LB_INLINE int64_t stored_column(const Args&{' a' if plan.fmt.ordered else ''}, int64_t i) {{"]
    lines += [f"return {column};", "}"]
    return indent([*lines, *_chunk_functions(plan)])


def _operand_type(plan: VectorPlan, name: str) -> str:
    for book in plan.books:
        if name in (book.name, book.index):
            return "ST" if name == book.name else book.index_type
    return "int32_t" if name == "columns" else "float"


def _chunk_functions(plan: VectorPlan) -> list[str]:
    """Chunks never cross groups, nor the border between outlier and main columns."""
    at = ["LB_INLINE int64_t chunk_start(int64_t c) {"]
    size = ["LB_INLINE int64_t chunk_columns(int64_t c) {"]
    start = 0
    for part in plan.parts:
        first, per, chunks = part.chunk, part.group_chunks, part.groups * part.group_chunks
        where = f"if (c < {first + chunks}) return "
        inner = f"(c - {first}) % {per} * kChunkCols"
        at.append(f"{where}{start} + (c - {first}) / {per} * {part.group_size} + {inner};")
        left = f"{part.group_size} - {inner}"
        size.append(f"{where}{left} < kChunkCols ? {left} : kChunkCols;")
        start += part.columns
    return [*at, "return 0;", "}", *size, "return 0;", "}"]


def _prepare(plan: VectorPlan) -> str:
    """Widen the codebooks that are kept as float32, shared out over the threads."""
    lines = ["static void prepare(const Args& a, int part, int parts) {", "(void)a, (void)part, (void)parts;"]
    for book in plan.books:
        if book.wide:
            n = book.count * book.size
            lines += [
                f"for (int64_t i = int64_t({n}) * part / parts; i < int64_t({n}) * (part + 1) / parts; ++i) {{",
                f"store(a.wide_{book.name} + i * {book.lanes}, stored_{book.name}(a.{book.name} + i * {book.dim}));",
                "}",
            ]
    return indent([*lines, "}"])


def _place(plan: VectorPlan) -> str:
    """Segment, first output column and number of rows of a unit."""
    rows = plan.unit_rows
    lines = ["struct Place {", "int64_t segment, unit, column;", "int rows;", "};"]
    lines += ["LB_INLINE Place place(int64_t slot) {"]
    first = column = 0
    for i, (count, n) in enumerate(zip(plan.units, plan.spec.segments, strict=False)):
        lines += [
            f"if (slot < {first + count}) {{",
            f"const int64_t unit = slot - {first}, left = {n} - unit * {rows};",
            f"return {{{i}, unit, {column} + unit * {rows}, int(left < {rows} ? left : {rows})}};",
            "}",
        ]
        first, column = first + count, column + n
    return indent([*lines, "return {0, 0, 0, 0};", "}"])
