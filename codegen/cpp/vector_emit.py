"""One kernel of a vector format as C++ text: codebooks, lookups, tiles, epilogue."""

from __future__ import annotations

from lowbit.codegen.cpp.assemble import Pieces, assemble
from lowbit.codegen.cpp.bytes_panels import bytes_panels_text
from lowbit.codegen.cpp.bytes_plan import BytesPlan, byte_entries, table_bytes
from lowbit.codegen.cpp.bytes_steps import bytes_direct_text
from lowbit.codegen.cpp.input_plan import InputPlan, SumsPlan
from lowbit.codegen.cpp.input_rows import input_rows_text
from lowbit.codegen.cpp.input_sums import input_sums_text, prepare_books, sums_types
from lowbit.codegen.cpp.rounding import rounding_macros, rounding_types
from lowbit.codegen.cpp.sides import indent
from lowbit.codegen.cpp.vector_buffered import vector_buffered_text
from lowbit.codegen.cpp.vector_direct import vector_direct_text
from lowbit.codegen.cpp.vector_lookup import book_functions
from lowbit.codegen.cpp.vector_plan import Book, VectorPlan

__all__ = ["emit_vector_text"]

_ACTIVATIONS = [
    "{item}* xq;  // activations, [chunk][token][digit][column]",
    "float* xs;  // their scales, [chunk][token]",
    "int32_t* xi;  // what an accumulator starts from, [chunk][token]",
    "float* xo;  // sums of activations, [chunk][token]",
]
_ACTIVATIONS_AT = [
    "xq = ({item}*)tokens;",
    "xs = (float*)(tokens + kChunks * m * kTokenStride * int64_t(sizeof({item})));",
    "xi = (int32_t*)(xs + kChunks * m);",
    "xo = (float*)(xi + kChunks * m);",
    "shift = xo + kChunks * m;",
]
_VALUE = {
    "none": "{y}",
    "col": "({y} + a.shift[t])",
    "row": "(a.norm_scale[{row}] * {y} + a.norm_bias[{row}] * a.shift[t])",
}


def emit_vector_text(plan: VectorPlan, arch: str) -> str:
    """The whole source of one kernel for instruction set `arch`."""
    norm = plan.fmt.norm
    macros = {"LB_CODE_TOP": 255, "LB_LIMBS": plan.spec.limbs, "LB_PAIRS": 0, "LB_BF16_X": 0, "LB_VECTORS": 1}
    headers: tuple[str, ...]
    rows: tuple[str, ...]
    macros["LB_NORM"] = ("none", "col", "row").index(norm)
    if isinstance(plan, SumsPlan):
        lanes = _by_arch(arch, "lanes_x86.h", "lanes_x86.h", "lanes_generic.h")
        headers = (lanes, "sums_avx512.h" if arch.startswith("avx512") else "sums_generic.h", "sums.h")
        rows = ("vector_rows.h",)
        text = "\n".join([book_functions(plan), _prepare(plan), _place(plan), input_sums_text(plan)])
    elif isinstance(plan, BytesPlan):
        headers = (_by_arch(arch, "bytes_avx512.h", "bytes_avx2.h", "bytes_generic.h"), "vector_bytes.h")
        headers += ("bytes_permute.h",) if plan.permutes else ()
        rows = ("scalar_rows.h", "vector_rows.h")
        macros |= {"LB_ZERO": 0, "LB_WORDS": int(plan.words), **rounding_macros(plan.spec)}
        macros["LB_BYTE_ENTRIES"] = byte_entries(arch)
        kernel = bytes_panels_text(plan) if plan.buffered else bytes_direct_text(plan)
        text = "\n".join([_prepare(plan), _place(plan), kernel])
    else:
        headers, rows = (_by_arch(arch, "lanes_x86.h", "lanes_x86.h", "lanes_generic.h"),), ("vector_rows.h",)
        kernel = vector_buffered_text(plan) if plan.buffered else _direct(plan)
        text = "\n".join([book_functions(plan), _prepare(plan), _place(plan), kernel])
    pieces = Pieces(macros, headers, _constants(plan), _types(plan), rows, _VALUE[norm], text)
    return assemble(plan, arch, pieces)


def _direct(plan: VectorPlan) -> str:
    return input_rows_text(plan) if isinstance(plan, InputPlan) else vector_direct_text(plan)


def _by_arch(arch: str, avx512: str, avx2: str, other: str) -> str:
    return avx512 if arch.startswith("avx512") else avx2 if arch.startswith("avx2") else other


def _constants(plan: VectorPlan) -> dict[str, int]:
    bias = plan.spec.integer_levels.bias if plan.spec.integer_levels else 0
    return {
        # As if every chunk had one scale group, and no chunk two rounds.
        "kParts": 1,
        "kDoubleChunks": 0,
        "kBias": bias,
        "kChunkCols": plan.chunk_cols,
        "kChunks": plan.chunks,
        "kInputChunks": plan.chunks,
        "kChunkRows": plan.chunks,
        "kUnitRows": plan.unit_rows,
        "kUnits": sum(plan.units),
        "kProducts": sum(plan.spec.segments) * plan.spec.k,
    }


def _types(plan: VectorPlan) -> str:
    names = plan.spec.operands
    lines = ["[[maybe_unused]] constexpr float kLevelUnit = 1.0f;", "struct Args : Call {"]
    for name in names:
        lines.append(f"const {_operand_type(plan, name)}* {name};")
    copies = [(*_copy(plan, b), plan.copy_bytes(b)) for b in plan.books if plan.copy_bytes(b)]
    lines += [f"{type_}* {name};" for type_, name, _ in copies]
    lines += ["uint8_t* tables;", "float* table_scale;"] if isinstance(plan, SumsPlan) else []
    floats = ["float* xq;  // activations, [chunk][token][column]"]
    lines += [line.format(item=plan.item) for line in _ACTIVATIONS] if isinstance(plan, BytesPlan) else floats
    lines += [
        "float* shift;  // what norms add, [token]",
        "void bind(const void* const* weight, uint8_t* shared, uint8_t* tokens) {",
        *(f"{name} = (const {_operand_type(plan, name)}*)weight[{i}];" for i, name in enumerate(names)),
    ]
    for i, (type_, name, _) in enumerate(copies):
        lines.append(f"{name} = ({type_}*)(shared + {sum(nbytes for *_, nbytes in copies[:i])});")
    floats = ["xq = (float*)tokens;", "shift = xq + kChunks * m * kTokenStride;"]
    lines += [line.format(item=plan.item) for line in _ACTIVATIONS_AT] if isinstance(plan, BytesPlan) else floats
    lines += sums_types(plan) if isinstance(plan, SumsPlan) else []
    lines += ["}", "};"]
    if isinstance(plan, BytesPlan):
        return indent([*lines, *rounding_types(plan.spec), *_chunk_functions(plan)])
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
        start += part.columns * part.span
    return [*at, "return 0;", "}", *size, "return 0;", "}"]


def _prepare(plan: VectorPlan) -> str:
    """Widen the codebooks that are kept as float32, and make the tables that permutes read, shared out over threads."""
    lines = ["static void prepare(const Args& a, int part, int parts) {", "(void)a, (void)part, (void)parts;"]
    if isinstance(plan, SumsPlan):
        return indent([*lines, *prepare_books(plan), "}"])
    for book in plan.books:
        if plan.copy_bytes(book):
            n = book.count * (book.size if book.wide else book.dim)
            lines.append(f"for (int64_t n = {n}, i = n * part / parts; i < n * (part + 1) / parts; ++i) {{")
            lines += [*(_widen(book) if book.wide else _sort(book)), "}"]
    return indent([*lines, "}"])


def _copy(plan: VectorPlan, book: Book) -> tuple[str, str]:
    """Type and name of what `prepare` makes of a codebook."""
    if isinstance(plan, BytesPlan):
        return "uint8_t", f"table_{book.name}"
    return "float", f"{'flat' if isinstance(plan, SumsPlan) else 'wide'}_{book.name}"


def _widen(book: Book) -> list[str]:
    """Centroid `i` as floats."""
    found = f"stored_{book.name}(a.{book.name} + i * {book.stored_row})"
    if book.item_bytes == 1:
        found = f"fma_({found}, set{book.lanes}(a.{book.scale}[i / {book.size}]), zero{book.lanes}())"
    return [f"store(a.wide_{book.name} + i * {book.lanes}, {found});"]


def _sort(book: Book) -> list[str]:
    """Table `i`, of one coordinate."""
    return [
        f"const int64_t at = i / {book.dim}, e = i % {book.dim};",
        f"const uint8_t* from = a.{book.name} + at * {book.size * book.lanes} + e;",
        f"put_table<{book.size}, {book.lanes}>(a.table_{book.name} + at * {table_bytes(book)}, e, from);",
    ]


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
