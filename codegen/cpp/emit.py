"""One kernel of a scalar format as C++ text: constants, decoding, tiles, epilogue.

Nothing in the text comes from a checkpoint: numbers, closed choices, and expressions printed from decode programs.
"""

from __future__ import annotations

from lowbit.codegen.cpp.assemble import Pieces, assemble
from lowbit.codegen.cpp.buffered import buffered_text
from lowbit.codegen.cpp.direct import direct_text
from lowbit.codegen.cpp.plan import PANEL, Plan
from lowbit.codegen.cpp.products import products
from lowbit.codegen.cpp.sides import indent

__all__ = ["emit_text"]


def emit_text(plan: Plan, arch: str) -> str:
    """The whole source of one kernel for instruction set `arch`."""
    form = products(plan)
    kernel = buffered_text(plan, form) if plan.buffered else direct_text(plan, form)
    fmt = plan.spec.fmt
    macros = {"LB_CODE_BITS": fmt.bits, "LB_LIMBS": plan.spec.limbs, "LB_ZERO": int(fmt.zero)}
    prepare = "LB_INLINE void prepare(const Args&, int, int) {}\n"
    text = "\n".join([prepare, form.printer.tables, _place(plan), _finish(plan), kernel])
    return assemble(plan, arch, Pieces(macros, (), _constants(plan), _types(plan), "scalar_rows.h", "{y}", text))


def _constants(plan: Plan) -> dict[str, int]:
    s = plan.spec
    return {
        "kBlocks": s.blocks,
        "kGroup": s.group,
        "kGroupCols": s.group_blocks * 32,
        "kGroups": s.groups,
        "kGroupChunks": plan.group_chunks,
        "kChunkBlocks": s.chunk_blocks,
        "kChunkCols": plan.chunk_cols,
        "kChunks": s.chunks,
        "kSlots": plan.slots,
        "kUnit": plan.unit,
        "kUnits": plan.units,
        "kProducts": s.rows * s.blocks * 32,
    }


def _types(plan: Plan) -> str:
    """Helpers that depend on the constants, and `Args`: the weight's operands and the prepared activations."""
    s, fmt = plan.spec, plan.spec.fmt
    item, planes = "int8_t" if plan.integer else "float", len(plan.planes)
    lines = [
        f"[[maybe_unused]] constexpr int32_t kBias = {fmt.element.bias};",
        f"LB_INLINE F load_scale(const ST* p) {{ return {'load_f16' if s.scale_dtype == 'f16' else 'fload'}(p); }}",
        # A zero point as the pair (z, 128 * z): multiplied with a sum split the same way, the product is exact.
        "[[maybe_unused]] LB_INLINE V zero_pair(V z) { return vor(z, shl<23>(z)); }",
        "LB_INLINE int64_t chunk_start(int64_t c) { return c * kChunkCols; }",
        "LB_INLINE int64_t chunk_columns(int64_t c) {",
        "return c + 1 < kChunks ? kChunkCols : kBlocks * 32 - c * kChunkCols;",
        "}",
        "struct Args : Call {",
        f"const uint8_t* plane[{planes}];",
        "const void* scale;",
        "const uint8_t* zero;",
        "const void* offset;",
        f"{item}* xq;  // activations, [chunk][token][digit][column]",
        "float* xs;  // activation scales, [chunk][token]",
        "int32_t* xi;  // what an accumulator starts from, [chunk][token]",
        "float* xo;  // sums of activations, [chunk][token]",
        "void bind(const void* const* weight, uint8_t*, uint8_t* tokens) {",
        *(f"plane[{j}] = (const uint8_t*)weight[{j}];" for j in range(planes)),
        f"scale = weight[{planes}];",
        f"zero = {f'(const uint8_t*)weight[{planes + 1}]' if fmt.zero else 'nullptr'};",
        f"offset = {f'weight[{planes + 1}]' if fmt.offset else 'nullptr'};",
        f"xq = ({item}*)tokens;",
        f"xs = (float*)(tokens + kChunks * m * kTokenStride * int64_t(sizeof({item})));",
        "xi = (int32_t*)(xs + kChunks * m);",
        "xo = (float*)(xi + kChunks * m);",
        "}",
        "};",
    ]
    return indent(lines)


def _place(plan: Plan) -> str:
    """Where a panel's rows go. Every segment is padded to whole panels, so a panel belongs to one segment."""
    lines = ["struct Place {", "int64_t column;", "int rows;", "};", "LB_INLINE Place place(int64_t panel) {"]
    column = first = 0
    # With silu_mul only gate panels are asked for: up columns are gate columns.
    for n in plan.spec.segments[: 1 if plan.silu else None]:
        panels = -(-n // PANEL)
        lines += [
            f"if (panel < {first + panels}) {{",
            f"const int64_t in = (panel - {first}) * {PANEL};",
            f"return {{{column} + in, int({n} - in < {PANEL} ? {n} - in : {PANEL})}};",
            "}",
        ]
        first, column = first + panels, column + n
    return indent([*lines, f"return {{{column}, 0}};", "}"])


def _finish(plan: Plan) -> str:
    """`finish`: write 16 results of one token."""
    sums = ("gate", "up") if plan.silu else ("y",)
    rooms = ", ".join(f"v_{s}" for s in sums)
    lines = [
        f"static inline void finish(const Args& a, int64_t panel, int64_t t, {', '.join(f'F {s}' for s in sums)}) {{",
        f"alignas(64) float {', '.join(f'v_{s}[16]' for s in sums)};",
        *(f"fstore(v_{s}, {s});" for s in sums),
        "const Place p = place(panel);",
        f"if (p.rows == 16) put(a, t, p.column, {rooms}, 16);",
        f"else put(a, t, p.column, {rooms}, p.rows);",
        "}",
    ]
    return indent(lines)
