"""Source text of a kernel: what is particular to it as constants (`T`) and a decode function, over `text/`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from lowbit.codegen.cuda.any_plan import AnyPlan
from lowbit.codegen.cuda.bits import half_of, text
from lowbit.codegen.cuda.fragments import TILE
from lowbit.codegen.cuda.header import header
from lowbit.codegen.cuda.plan import PREPARE_THREADS, Plan
from lowbit.codegen.cuda.vector_emit import VECTOR_HEADERS, vector_traits
from lowbit.codegen.cuda.vector_plan import VectorPlan
from lowbit.codegen.rounded import ORDER, PIECE, ROUNDED
from lowbit.quantizers.formats import ActivationFormat, FloatElement
from lowbit.quantizers.formats.activation import WIDE_TOPS

__all__ = ["Machine", "emit_text"]

Machine = Literal["ptx", "host"]
"""What the text is for: a GPU's compiler, or a C++ compiler that runs it lane by lane."""

_HEADERS = ("memory", "sides", "multiply", "rows", "epilogue")
_TYPES = """#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif"""
_SIDES = {"f16": 0, "f32": 1, "e8m0": 2, "e4m3": 3}
_OUT = {"f16": 0, "bf16": 1, "f32": 2}


def emit_text(plan: AnyPlan, machine: Machine = "ptx") -> str:
    """The kernel `lb_kernel`, and `lb_prepare` where one has to run before it, as one text."""
    return _vectors(plan, machine) if isinstance(plan, VectorPlan) else _scalars(plan, machine)


def _machine(machine: Machine) -> list[str]:
    return [header(name, {}) for name in (("ptx",) if machine == "ptx" else ("host", "host_matrix"))]


def _begin(machine: Machine) -> list[str]:
    return [_TYPES, f"#define LB_DEV {'__device__ __forceinline__' if machine == 'ptx' else 'inline'}"]


def _vectors(plan: VectorPlan, machine: Machine) -> str:
    numbers, flags, tables = vector_traits(plan)
    parts = [
        f"// Kernel {plan.spec.digest()}: {plan.spec.format}.",
        *_begin(machine),
        "struct T {",
        *_constants(numbers, flags),
        *[_choice("int", name, [str(v) for v in values]) for name, values in tables.items()],
        "};",
        *_machine(machine),
        *[header(name, {}) for name in VECTOR_HEADERS],
        *_entry(plan),
    ]
    return "\n".join(parts) + "\n"


def _constants(numbers: dict[str, int], flags: dict[str, bool]) -> list[str]:
    lines = [f"  static constexpr int {name} = {value};" for name, value in numbers.items()]
    return lines + [f"  static constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()]


def _scalars(plan: Plan, machine: Machine) -> str:
    spec = plan.spec
    chosen = {
        "LB_ROWS_IN": plan.reads_rows,
        "LB_ROWS_COPIED": spec.reads_rows and not plan.reads_rows,
        "LB_ROWS_OUT": spec.out_rows is not None,
    }
    headers = [
        "args",
        *(["rows_order"] if spec.uses_rows else []),
        *(["rows_in"] if spec.reads_rows else []),
        *_HEADERS,
        *(["rows_out"] if spec.out_rows else []),
        *(["pipeline"] if plan.warpgroup else ["reduce", "stream"]),
        *(["halve", "prepare"] if plan.prepared else []),
    ]
    given = {"rows_order_check": _order_check()}
    given |= {"traits_out": "\n".join(_rows_out_traits(plan))} if spec.out_rows else {}
    parts = [
        f"// Kernel {spec.digest()}: {spec.format}, {spec.activation or plan.dtype} activations.",
        *_begin(machine),
        *_traits(plan),
        *_machine(machine),
        *_decode(plan),
        *(_wgmma(plan) if machine == "ptx" else []),
        *[header(name, chosen, given) for name in headers],
        *_entry(plan),
    ]
    return "\n".join(parts) + "\n"


def _traits(plan: Plan) -> list[str]:
    """`struct T`: every number the headers use."""
    spec, s, recipe = plan.spec, plan.schedule, plan.recipe
    numbers = {
        "PLANES": len(plan.planes), "K": spec.k, "K_BLOCKS": plan.k_blocks, "TILES": plan.tiles,
        "TILE_SETS": plan.tile_sets, "ROW_TILES": plan.row_tiles, "UNIT_BLOCKS": plan.unit_blocks,
        "UNITS_PER_SET": plan.units_per_set, "UNITS": plan.units, "TILE_M": s.tile_m, "TOKEN_TILES": plan.token_tiles,
        "WARPS": s.warps, "STAGES": s.stages, "GROUPS": spec.groups, "GROUP": plan.padded_group,
        "SOURCE_GROUP": spec.k if spec.groups == 1 else spec.group, "FLUSH": plan.flush, "FLUSHES": plan.flushes,
        "UNITS_PER_FLUSH": plan.units_per_flush, "SPLIT": s.split_k,
        "LEAD_UNITS": plan.lead_units,
        "SIDE": _SIDES[spec.scale_dtype], "SIDE_BYTES": plan.side_bytes, "SEGMENTS": len(spec.segments),
        "N_OUT": spec.n_out, "OUT": _OUT[spec.out_dtype], "REDUCE_STRIDE": plan.reduce_stride,
        "BARRIER_BYTES": plan.barrier_bytes, "ROW_WARPS": plan.row_warps, "AHEAD": plan.ahead, "ALIGN": plan.align,
        "GROUPS_OF_WARPS": plan.warp_groups, "TABLE_SIZE": len(recipe.table), "BITS": plan.operand_bits,
        "TILE_ROWS": TILE, "RING_BYTES": plan.ring_bytes, "FEW": plan.registers[0], "MANY": plan.registers[1],
        "X_COLUMNS": plan.x_columns, "SCALE_TOKENS": plan.scale_tokens, "X_SIDES": plan.x_sides, **_preparation(plan),
        **({"X_ROW": spec.x_rows.row_bytes, "X_SCALES": spec.x_rows.level_bytes} if spec.reads_rows else {}),
    }  # fmt: skip
    flags = {
        "BF16": plan.dtype == "bf16", "BULK": bool(s.get("bulk", 0)), "IN_LOOP": plan.in_loop, "ZERO": spec.fmt.zero,
        "OFFSET": spec.fmt.offset, "SUMS_X": plan.sums_x, "EXACT": plan.exact, "GATED": plan.gated,
        "DIRECT": plan.direct, "WGMMA": plan.warpgroup, "FIXED": plan.fixed, "INTEGER": plan.operand in ("s8", "s4"),
        "TOKEN_X": plan.halved or (bool(spec.rounding) and not plan.x_group), "GROUP_X": bool(plan.x_group),
        "ROUND": bool(spec.rounding), "HALVED": plan.halved, "STATIC_X": bool(spec.rounding and spec.rounding.static),
        "DENSE": spec.groups == 1 or plan.padded_group == spec.group, "ORDERED": spec.fmt.ordered and plan.prepared,
        "PLAIN_COLUMNS": plan.plain_columns or plan.prepared or plan.reads_rows,
        "BIAS": "bias" in spec.epilogue,
        "RESIDUAL_ADD": "residual" in spec.epilogue,
        "TENSOR_SCALE": spec.fmt.tensor and plan.side_bytes == 1,
    }  # fmt: skip
    ones = {16: half_of(1.0, plan.dtype) * 0x00010001, 8: 0x01010101, 4: 0x11111111}[plan.operand_bits]
    rounding = spec.rounding
    return [
        "struct T {",
        *_constants(numbers, flags),
        f"  static constexpr uint32_t ONES = 0x{ones:x}u;",
        f"  static constexpr float FACTOR = {_float(recipe.factor)}, UNFACTOR = {_float(1 / recipe.factor)};",
        f"  static constexpr float X_TOP = {_float(rounding.top if rounding else 1)};",
        f"  static constexpr float X_CLIP = {_float(rounding.clip if rounding else 1)};",
        f"  static constexpr uint32_t X_LEAST = {_least(rounding)}u;",
        _choice("float", "addend", [_float(v / recipe.factor) for v in recipe.addend]),
        _choice("int", "plane_bits", [*map(str, plan.planes), *["1"] * (3 - len(plan.planes))]),
        _choice("int", "segment_rows", [str(n) for n in spec.segments]),
        _choice("int", "segment_start", _starts(spec.segments, 1)),
        _choice("int", "segment_tile", _starts(spec.segments, TILE)),
        "};",
    ]


def _preparation(plan: Plan) -> dict[str, int]:
    """What `prepare` has to know: x's type, groups and their packed columns, threads of a group, mantissa bits."""
    rounding, group = plan.spec.rounding, plan.x_group or plan.x_columns
    piece = 32 if plan.nibbles else 16  # columns that a thread stores: 16 bytes
    return {
        "X": ("f16", "bf16", "f32", ROUNDED).index(plan.spec.x_dtype),
        "X_GROUPS": rounding.groups(plan.spec.k) if rounding and plan.x_group else 1,
        "X_GROUP": group,
        "X_WIDE": _wide(rounding),
        "X_WIDE_TOP": int(WIDE_TOPS[rounding.wide_bits if rounding else 8]),
        "X_LEAD": int(rounding is not None and bool(rounding.lead)),
        "ASYM_X": int(rounding is not None and rounding.asym),
        "X_MANTISSA": _mantissa(rounding),
        "PREPARE_THREADS": PREPARE_THREADS,
        "PIECE": piece,
        "TEAM": min(32, 1 << (max(group // piece, 1) - 1).bit_length()),
    }


def _wide(rounding: ActivationFormat | None) -> int:
    """Groups whose largest level is another one."""
    if rounding is None:
        return 0
    return min(rounding.wide, 1) if rounding.lead else rounding.wide


def _mantissa(rounding: ActivationFormat | None) -> int:
    """Mantissa bits of a format of small floats; -1 where levels are integers."""
    element = rounding.element if rounding else None
    return element.mantissa if isinstance(element, FloatElement) else -1


def _order_check() -> str:
    """That the text has the columns of a row where `codegen.rounded` has them."""
    terms = " && ".join(f"byte_of({PIECE + column}) == {PIECE + byte}" for byte, column in enumerate(ORDER))
    return f'static_assert({terms}, "rows have another order");'


def _rows_out_traits(plan: Plan) -> list[str]:
    """`struct T` of the output's rounding, under the names that `prepare` has for that of activations."""
    rows = plan.spec.out_rows
    assert rows is not None
    rounding = rows.rounding
    numbers = {
        "BITS": 8, "ROW_BYTES": rows.row_bytes, "SCALES": rows.level_bytes,
        "X_GROUPS": rounding.groups(rows.columns), "X_GROUP": rounding.lead or rounding.group or rows.columns,
        "SPAN": 32 if rounding.static else rounding.group,
        "X_WIDE": _wide(rounding), "X_WIDE_TOP": int(WIDE_TOPS[rounding.wide_bits]), "X_MANTISSA": _mantissa(rounding),
    }  # fmt: skip
    flags = {"INTEGER": rounding.integer, "BF16": False, "STATIC_X": rounding.static, "ASYM_X": rounding.asym}
    return [
        "struct T {",
        *_constants(numbers, flags),
        f"  static constexpr float X_TOP = {_float(rounding.top)}, X_CLIP = {_float(rounding.clip)};",
        f"  static constexpr uint32_t X_LEAST = {_least(rounding)}u;",
        "};",
    ]


def _least(rounding: ActivationFormat | None) -> int:
    """Bits of the exponent of an activation format's smallest normal number, as float32."""
    element = rounding.element if rounding else None
    return (1 - element.exponent_bias + 127) << 23 if isinstance(element, FloatElement) else 1 << 23


def _starts(segments: Sequence[int], unit: int) -> list[str]:
    """Where every segment begins, in units into which each is rounded up."""
    counts = [math.ceil(n / unit) for n in segments]
    return [str(sum(counts[:i])) for i in range(len(counts))]


def _choice(kind: str, name: str, values: list[str]) -> str:
    """A constant array as a function: device code cannot address a class's."""
    body = values[-1]
    for i in range(len(values) - 2, -1, -1):
        body = f"i == {i} ? {values[i]} : {body}"
    return f"  static LB_DEV constexpr {kind} {name}(int i) {{ return {body}; }}"


def _float(value: float) -> str:
    return f"{float(value).hex()}f"


def _decode(plan: Plan) -> list[str]:
    """Words of 16 rows x 64 columns -> operands, by the format's recipe; the table it may look up."""
    recipe = plan.recipe
    words = ", ".join(f"const uint32_t (&w{p})[T::plane_bits({p})]" for p in range(3))
    entries = ", ".join(str(half_of(v, plan.dtype)) for v in recipe.table) or "0"
    return [
        f"__device__ const uint16_t TABLE[] = {{{entries}}};",
        f"LB_DEV void decode(uint32_t (&a)[{64 // plan.step}][4], {words}, const uint16_t* table) {{",
        *[f"  {line}" for line in text(recipe.sequence)],
        "}",
    ]


_SHAPES = {"f16": ("k16.f32.f16.f16", ", 1, 1, 0"), "bf16": ("k16.f32.bf16.bf16", ", 1, 1, 0"),
           "e4m3": ("k32.f32.e4m3.e4m3", ", 1, 1"), "s8": ("k32.s32.s8.s8", "")}  # fmt: skip
"""Depth and types of a wgmma instruction, and what follows its operands: signs, and whether x is transposed."""


def _wgmma(plan: Plan) -> list[str]:
    """sums (64 rows x tokens) += a * x, in registers that the number of tokens decides."""
    if not plan.warpgroup:
        return []
    tokens, (shape, rest) = plan.schedule.tile_m, _SHAPES[plan.operand]
    kind, letter = ("int", "r") if plan.operand == "s8" else ("float", "f")
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    left = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+{letter}"(s[{i // 4}][{i % 4}])' for i in range(count))
    return [
        f"LB_DEV void wgmma({kind} (&s)[{tokens // 8}][4], const uint32_t (&a)[4], uint64_t x, bool add) {{",
        '  asm volatile("{\\n.reg .pred p;\\nsetp.ne.b32 p, %' + f'{count + 5}, 0;\\n"',
        f'      "wgmma.mma_async.sync.aligned.m64n{tokens}{shape} {{{sums}}}, {{{left}}}, "',
        f'      "%{count + 4}, p{rest};\\n}}"',
        f"      : {outputs}",
        '      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"((int)add));',
        "}",
    ]


def _entry(plan: AnyPlan) -> list[str]:
    resident = plan.schedule.get("resident", 1 if isinstance(plan, VectorPlan) else 2)
    lines = _kernel("lb_kernel", f"{plan.threads}, {resident}", "stream")
    return lines + (_kernel("lb_prepare", str(PREPARE_THREADS), "prepare") if plan.prepared else [])


def _kernel(name: str, bounds: str, body: str) -> list[str]:
    return [
        f'extern "C" __global__ void __launch_bounds__({bounds}) {name}(const __grid_constant__ Args a) {{',
        f"  {body}(a);",
        "}",
    ]
