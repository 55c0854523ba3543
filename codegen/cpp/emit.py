"""One kernel of a scalar format as C++ text: constants, decoding, tiles, epilogue.

Nothing in the text comes from a checkpoint: numbers, closed choices, and expressions printed from decode programs.
"""

from __future__ import annotations

from functools import partial

from lowbit.codegen.cpp.assemble import Pieces, assemble
from lowbit.codegen.cpp.bf16_products import Bf16Products
from lowbit.codegen.cpp.buffered import buffered_text
from lowbit.codegen.cpp.direct import direct_chunk, direct_text
from lowbit.codegen.cpp.lut import lut_chunk, lut_types
from lowbit.codegen.cpp.machines import MACHINES
from lowbit.codegen.cpp.plan import PANEL, Plan
from lowbit.codegen.cpp.products import Products, products
from lowbit.codegen.cpp.rounding import rounding_macros, rounding_types
from lowbit.codegen.cpp.sides import indent
from lowbit.codegen.cpp.trellis import TrellisWords, trellis_header, trellis_products

__all__ = ["emit_text"]

_LOADS = {"f32": ("fload", 1.0), "f16": ("load_f16", 1.0), "e8m0": ("load_e8m0", 1.0), "e4m3": ("load_e4m3", 256.0)}
"""How a type of scale is loaded, and what the result must be multiplied with."""

_LUT_FIELDS = (
    "uint8_t* tables;  // sums of activations, [chunk][token][digit][block][step]",
    "int32_t* excess;  // what all sums of a chunk have too much, [chunk][token][digit]",
)
_LUT_PLACES = (
    "tables = tokens;",
    "excess = (int32_t*)(tables + kChunkRows * m * LB_LIMBS * kLutBytes);",
    "tokens = (uint8_t*)(excess + kChunkRows * m * LB_LIMBS);",
)


def emit_text(plan: Plan, arch: str) -> str:
    """The whole source of one kernel for instruction set `arch`."""
    form = products_of(plan)
    chunk = lut_chunk if plan.lut else partial(direct_chunk, in_turn=MACHINES[arch].sums > 8)
    kernel = buffered_text(plan, form) if plan.buffered else direct_text(plan, form, chunk)
    fmt = plan.spec.fmt
    digits = plan.magnitudes.digits if plan.magnitudes else plan.levels.digits if plan.integer else ()
    top = max(map(max, digits)) if digits and plan.residues == 1 else 255
    macros = {"LB_CODE_TOP": top, "LB_LIMBS": plan.limbs, "LB_ZERO": int(fmt.zero)}
    macros |= rounding_macros(plan.spec)
    macros["LB_WORDS"] = 0 if not plan.words else 2 if plan.magnitudes else 1
    if isinstance(form, TrellisWords):
        macros |= {"LB_WORDS": 3, "LB_HALF": form.half}
    macros |= {"LB_ONCE": 1} if plan.scaled_once else {}
    macros["LB_BF16_X"] = int(plan.bf16)
    macros["LB_PAIRS"] = int(plan.half_factor is not None and not plan.buffered)
    macros |= {"LB_LUT": 1} if plan.lut else {}
    prepare = "LB_INLINE void prepare(const Args&, int, int) {}\n"
    text = "\n".join([prepare, form.tables, _unit_of(plan), _place(plan), _finish(plan), kernel])
    headers, rows = (("lut_avx2.h",), ("lut_rows.h", "scalar_rows.h")) if plan.lut else ((), ("scalar_rows.h",))
    found = (*headers, trellis_header(arch)) if fmt.element.window > 1 else headers
    types = (lut_types(plan) if plan.lut else "") + _types(plan)
    return assemble(plan, arch, Pieces(macros, found, _constants(plan), types, rows, "{y}", text))


def products_of(plan: Plan) -> Products:
    """How the plan's weights meet activations."""
    if plan.bf16:
        return Bf16Products(plan)
    if plan.spec.fmt.element.window > 1:
        return trellis_products(plan.integer, plan.words)(plan)
    return products(plan)


def _constants(plan: Plan) -> dict[str, int]:
    s = plan.spec
    return {
        "kBlocks": s.blocks,
        "kGroup": s.group,
        "kGroupCols": s.group if s.parts > 1 else s.group_blocks * 32,
        "kGroups": s.groups,
        "kGroupChunks": plan.group_chunks,
        "kParts": s.parts,
        "kChunkBlocks": s.chunk_blocks,
        "kChunkCols": plan.chunk_cols,
        "kChunks": s.chunks,
        "kTerms": s.terms,
        "kInputChunks": plan.input_chunks,
        "kDoubleChunks": s.double_chunks,
        "kChunkRows": plan.chunk_rows,
        "kSlots": plan.slots,
        "kUnit": plan.unit,
        "kUnits": plan.units,
        "kProducts": s.rows * s.blocks * 32,
    }


def _types(plan: Plan) -> str:
    """Helpers that depend on the constants, and `Args`: the weight's operands and the prepared activations."""
    s = plan.spec
    item, planes = plan.item, len(plan.planes)

    def at(operand: str, type_: str) -> str:
        there = operand in s.operands
        return f"(const {type_}*)weight[{s.operands.index(operand)}]" if there else "nullptr"

    sides = (("scale", "void"), ("zero", "uint8_t"), ("offset", "void"), ("tensor_scale", "float"),
             ("columns", "int32_t"), ("input_scale", "float"), ("norm_weight", "float"))  # fmt: skip
    lines = [
        f"[[maybe_unused]] constexpr int32_t kBias = {plan.bias if plan.integer else 0};",
        f"[[maybe_unused]] constexpr float kLevelUnit = {(2.0**plan.levels.exponent if plan.integer else 1.0).hex()}f;",
        f"LB_INLINE F load_side(const ST* p) {{ return {_LOADS[s.scale_dtype][0]}(p); }}",
        f"constexpr float kScaleUnit = {_scale_unit(plan).hex()}f;",
        f"LB_INLINE F load_scale(const ST* p, F unit) {{ return {_scale(plan)}; }}",
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
        "const float* tensor_scale;",
        "const int32_t* columns;",
        "const float* input_scale;",
        "const float* norm_weight;",
        *(_LUT_FIELDS if plan.lut else ()),
        f"{item}* xq;  // activations, [chunk][token][digit][column]; high digits of `kDoubleChunks` behind the rest",
        "float* xs;  // activation scales, [chunk][token]",
        "int32_t* xi;  // what an accumulator starts from, [chunk][part][token]",
        "float* xo;  // sums of activations, [chunk][part][token]",
        "void bind(const void* const* weight, uint8_t*, uint8_t* tokens) {",
        *(f"plane[{j}] = (const uint8_t*)weight[{j}];" for j in range(planes)),
        *(f"{name} = {at(name, type_)};" for name, type_ in sides),
        *(_LUT_PLACES if plan.lut else ()),
        f"xq = ({item}*)tokens;",
        f"xs = (float*)(tokens + kChunkRows * m * kTokenStride * int64_t(sizeof({item})));",
        "xi = (int32_t*)(xs + kChunkRows * m);",
        "xo = (float*)(xi + kChunkRows * kParts * m);",
        "}",
        "};",
        *rounding_types(s),
    ]
    return indent(lines)


def _scale_unit(plan: Plan) -> float:
    """A power of two that all scales are multiplied with."""
    return _LOADS[plan.spec.scale_dtype][1] * (1.0 if plan.half_factor is None else plan.half_factor)


def _scale(plan: Plan) -> str:
    """The scales at `p`, with `unit`: kScaleUnit times the scale of the whole tensor, if there is one."""
    plain = _scale_unit(plan) == 1.0 and not plan.spec.fmt.tensor
    return "load_side(p)" if plain else "fmul(load_side(p), unit)"


def _unit_of(plan: Plan) -> str:
    """`unit_of(a, panel)`: see `_scale`."""
    lines = ["LB_INLINE F unit_of(const Args& a, int64_t panel) {"]
    if plan.spec.fmt.tensor:
        first = 0
        for segment, n in enumerate(plan.spec.segments):
            first += -(-n // PANEL)
            lines.append(f"if (panel < {first}) return fset1(a.tensor_scale[{segment}] * kScaleUnit);")
    return indent([*lines, "return fset1(kScaleUnit);", "}"])


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
