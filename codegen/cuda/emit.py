"""Source text of a kernel: what is particular to it as constants (`T`) and a decode function, over `text/`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from lowbit.codegen.cuda.bits import half_of, text
from lowbit.codegen.cuda.plan import TILE, Plan

__all__ = ["HEADERS", "Machine", "emit_text"]

Machine = Literal["ptx", "host"]
"""What the text is for: a GPU's compiler, or a C++ compiler that runs it lane by lane."""

HEADERS = ("memory", "sides", "multiply", "warpgroup", "epilogue", "stream")
_SIDES = {"f16": 0, "f32": 1, "e8m0": 2, "e4m3": 3}
_OUT = {"f16": 0, "bf16": 1, "f32": 2}


@cache
def _header(name: str) -> str:
    return (Path(__file__).parent / "text" / f"{name}.cuh").read_text()


def emit_text(plan: Plan, machine: Machine = "ptx") -> str:
    """The kernel `lb_kernel` as one text."""
    inline = "__device__ __forceinline__" if machine == "ptx" else "inline"
    spec = plan.spec
    parts = [
        f"// Kernel {spec.digest()}: {spec.format}, {plan.dtype} activations.",
        "#include <stdint.h>",
        f"#define LB_DEV {inline}",
        *(["#define LB_WARPGROUP"] if plan.warpgroup else []),
        *_traits(plan),
        _header(machine),
        *_decode(plan),
        *(_wgmma(plan) if machine == "ptx" else []),
        *[_header(name) for name in HEADERS if name != "warpgroup" or plan.warpgroup],
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
        "SIDE": _SIDES[spec.scale_dtype], "SIDE_BYTES": plan.side_bytes, "SEGMENTS": len(spec.segments),
        "N_OUT": spec.n_out, "OUT": _OUT[spec.out_dtype], "REDUCE_STRIDE": plan.reduce_stride,
        "BARRIER_BYTES": plan.barrier_bytes, "ROW_WARPS": plan.row_warps, "AHEAD": plan.ahead, "ALIGN": plan.align,
         "GROUPS_OF_WARPS": plan.warp_groups,
         "TABLE_SIZE": len(recipe.table),
    }  # fmt: skip
    flags = {
        "BF16": plan.dtype == "bf16", "BULK": bool(s.get("bulk", 0)), "IN_LOOP": plan.in_loop, "ZERO": spec.fmt.zero,
        "OFFSET": spec.fmt.offset, "SUMS_X": plan.sums_x, "EXACT": plan.exact, "GATED": plan.gated,
        "DIRECT": not plan.in_loop and not plan.sums_x, "WGMMA": plan.warpgroup,
        "PLAIN_COLUMNS": plan.plain_columns, "BIAS": "bias" in spec.epilogue, "RESIDUAL": "residual" in spec.epilogue,
        "TENSOR_SCALE": spec.fmt.tensor and plan.side_bytes == 1,
    }  # fmt: skip
    ones = half_of(1.0, plan.dtype) * 0x00010001
    return [
        "struct T {",
        *[f"  static constexpr int {name} = {value};" for name, value in numbers.items()],
        *[f"  static constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()],
        f"  static constexpr uint32_t ONES = 0x{ones:x}u;",
        f"  static constexpr float FACTOR = {_float(recipe.factor)}, UNFACTOR = {_float(1 / recipe.factor)};",
        _choice("float", "addend", [_float(v / recipe.factor) for v in recipe.addend]),
        _choice("int", "plane_bits", [*map(str, plan.planes), *["1"] * (3 - len(plan.planes))]),
        _choice("int", "segment_rows", [str(n) for n in spec.segments]),
        _choice("int", "segment_start", _starts(spec.segments, 1)),
        _choice("int", "segment_tile", _starts(spec.segments, TILE)),
        "};",
    ]


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
        f"LB_DEV void decode(uint32_t (&a)[4][4], {words}, const uint16_t* table) {{",
        *[f"  {line}" for line in text(recipe.sequence)],
        "}",
    ]


def _wgmma(plan: Plan) -> list[str]:
    """sums (64 rows x tokens) += a * x, in registers that the number of tokens decides."""
    if not plan.warpgroup:
        return []
    tokens, kind = plan.schedule.tile_m, plan.dtype
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    left = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(s[{i // 4}][{i % 4}])' for i in range(count))
    return [
        f"LB_DEV void wgmma(float (&s)[{tokens // 8}][4], const uint32_t (&a)[4], uint64_t x, bool add) {{",
        '  asm volatile("{\\n.reg .pred p;\\nsetp.ne.b32 p, %' + f'{count + 5}, 0;\\n"',
        f'      "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind} {{{sums}}}, {{{left}}}, "',
        f'      "%{count + 4}, p, 1, 1, 0;\\n}}"',
        f"      : {outputs}",
        '      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"((int)add));',
        "}",
    ]


def _entry(plan: Plan) -> list[str]:
    resident = plan.schedule.get("resident", 2)
    bounds = f"__launch_bounds__({plan.schedule.warps * 32}, {resident})"
    return [
        f'extern "C" __global__ void {bounds} lb_kernel(const __grid_constant__ Args a) {{',
        "  stream(a);",
        "}",
    ]
