"""C++ that looks rows of a packed matrix up: where a code lies is read off the layout, what it means off the format."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lowbit.codegen.backend import Source
from lowbit.codegen.cpp.assemble import ISA_FLAGS, prelude
from lowbit.codegen.cpp.launch import load_openmp
from lowbit.codegen.cpp.plan import PANELS
from lowbit.codegen.cpp.toolchain import FLAGS
from lowbit.codegen.table import TableSpec
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.formats import K_ALIGN
from lowbit.quantizers.qtensor import padded_columns, padded_group

__all__ = ["TableKernel", "entry_text", "load_table", "table_problem", "table_source"]

TableKernel = Callable[[Tensor, list[Tensor]], Tensor]
"""run(ids int64 [n], operands) -> float32 [n, K]."""

_SCALES = {"f16": ("uint16_t", "from_f16"), "f32": ("float", "float")}


def table_problem(spec: TableSpec) -> str | None:
    """Why there is no C++ kernel for a table, or None."""
    if spec.linear.layout_ not in PANELS.values():
        return f"the C++ kernel reads layouts {', '.join(PANELS)}"
    return None if spec.linear.scale_dtype in _SCALES else f"it reads no scales of type {spec.linear.scale_dtype}"


def entry_text(spec: TableSpec) -> str:
    """`table_entry(operands, row, column)`: one number of the table, as float.

    Codes of a block of 16 rows and 32 columns lie together in each plane; a table says at which byte and bit.
    """
    linear, layout, names = spec.linear, spec.linear.layout_, spec.linear.operands
    fmt, tile, lines = linear.fmt, spec.linear.layout_.row_tile, list[str]()
    type_, convert = _SCALES[linear.scale_dtype]
    blocks = padded_columns(fmt, spec.k, layout.block) // K_ALIGN
    group, padded = min(fmt.granularity.group_size(spec.k), spec.k), padded_group(fmt, spec.k)
    code, low = [], 0
    sizes = layout.widths(fmt.bits)
    for i, (plane, bits, place, shift) in enumerate(layout.places(fmt.bits, tile, K_ALIGN)):
        cells = ", ".join(
            str(p << 3 | s) for p, s in zip(place.flatten().tolist(), shift.flatten().tolist(), strict=True)
        )
        lines.append(f"static const uint16_t kCell{i}[{tile * K_ALIGN}] = {{{cells}}};")
        byte = f"((const uint8_t*)w[{plane}])[block * {tile * K_ALIGN * sizes[plane] // 8} + (kCell{i}[cell] >> 3)]"
        code.append(f"(({byte} >> (kCell{i}[cell] & 7)) & {2**bits - 1}u) << {low}")
        low += bits
    levels = ", ".join(
        f"{float(v).hex()}f" if v == v and abs(v) != float("inf") else "0.0f" for v in fmt.element.levels()
    )
    lines += [
        f"static const float kLevel[{2**fmt.bits}] = {{{levels}}};",
        "LB_INLINE float table_entry(const void* const* w, int64_t row, int64_t column) {",
        f"const int64_t group = column / {group}, at = group * {padded} + column % {group};",
        f"const int64_t block = row / {tile} * {blocks} + at / {K_ALIGN};",
        f"const int64_t cell = row % {tile} * {K_ALIGN} + at % {K_ALIGN};",
        f"const int64_t side = (row / {tile} * {linear.groups} + group) * {tile} + row % {tile};",
        f"float value = kLevel[{' | '.join(code)}];",
    ]
    if "zero" in names:
        lines.append(f"value -= float(((const uint8_t*)w[{names.index('zero')}])[side]);")
    lines.append(f"value *= {convert}(((const {type_}*)w[{names.index('scale')}])[side]);")
    if "offset" in names:
        lines.append(f"value += {convert}(((const {type_}*)w[{names.index('offset')}])[side]);")
    return "\n".join([*lines, "return value;", "}"]) + "\n"


def table_source(spec: TableSpec, arch: str) -> Source:
    """The kernel of `spec` for instruction set `arch`; a pure function of its arguments."""
    text = [
        prelude(spec.linear.digest(), arch, {"LB_CODE_TOP": 255}),
        "namespace {",
        entry_text(spec),
        "}  // namespace",
        "// Returns 0, or 1 + the place of the first id that is no row.",
        'extern "C" __attribute__((visibility("default"))) int64_t lb_rows(const int64_t* ids, int64_t n, '
        "const void* const* weight, float* out) {",
        "for (int64_t i = 0; i < n; ++i) {",
        f"if (ids[i] < 0 || ids[i] >= {spec.rows}) return i + 1;",
        f"for (int64_t c = 0; c < {spec.k}; ++c) out[i * {spec.k} + c] = table_entry(weight, ids[i], c);",
        "}",
        "return 0;",
        "}",
    ]
    return Source("\n".join(text) + "\n", ".so", (*FLAGS, "-Wno-unused-function", *ISA_FLAGS[arch]))


def load_table(artifact: Path, spec: TableSpec) -> TableKernel:
    """The kernel in a shared object; raises KernelError: LB0414 when it cannot be loaded, LB0432 for ids beyond it."""
    load_openmp()
    try:
        rows = ctypes.CDLL(str(artifact)).lb_rows
    except (OSError, AttributeError) as e:
        raise KernelError("LB0414", f"cannot load the kernel {artifact.name}: {e}") from e
    rows.argtypes, rows.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int64
    pointers = ctypes.c_void_p * len(spec.linear.operands)

    def run(ids: Tensor, operands: list[Tensor]) -> Tensor:
        out = torch.empty(ids.numel(), spec.k)
        if at := rows(ids.data_ptr(), ids.numel(), pointers(*[t.data_ptr() for t in operands]), out.data_ptr()):
            raise KernelError("LB0432", f"id {int(ids[at - 1])} is no row of a table of {spec.rows}")
        return out

    return run
