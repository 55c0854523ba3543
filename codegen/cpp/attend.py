"""C++ text of attention over a packed key-value cache, and of appending to one: constants, and how codes are unpacked.

The text of `text/attend*.h` is fixed; what depends on the format is printed from the format's own extract program and
from the layout's addresses. Codes are multiplied as bytes with two signed digits per number of the other factor, with
exact sums, as in kernels of linear layers.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files

from lowbit.codegen.attend import LANES, WINDOWS, AttendSpec
from lowbit.codegen.backend import Source
from lowbit.codegen.cpp.assemble import ISA_FLAGS, prelude
from lowbit.codegen.cpp.expr import Printer, build, name, number
from lowbit.codegen.cpp.sides import indent
from lowbit.codegen.cpp.toolchain import FLAGS
from lowbit.codegen.decode import extract_program
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import plane_bits
from lowbit.quantizers.formats.kv import KV_BLOCK, KVSide

__all__ = ["STATE_ORDER", "attend_parts", "attend_source", "partial_floats", "unit_tokens"]

STATE_ORDER = tuple(f"{letter}_{part}" for letter in "kv" for part in ("plane0", "scale", "minimum", "window"))
"""What the entry points are given, by operand name; null for names that the spec does not have."""

_DOT = """#if LB_ROWS == 1
#define LB_DOT static __attribute__((noinline))
#else
#define LB_DOT LB_INLINE
#endif
"""


def unit_tokens(spec: AttendSpec) -> int:
    """Tokens that are handled at once: whole groups of either side, and enough to make up for their cost."""
    group = math.lcm(KV_BLOCK, spec.fmt.key.token_group, spec.fmt.value.token_group)
    return group * max(1, 128 // group)


def partial_floats(spec: AttendSpec) -> int:
    """float32 scratch of one query row in one split: `kState` of the text."""
    return spec.head_dim + 16


def attend_source(spec: AttendSpec, arch: str) -> Source:
    """The source of `lb_attend` and `lb_append`; raises KernelError (LB0425) for formats with a correction."""
    macros, text = attend_parts(spec, arch)
    top = max((2**side.bits - 1 for _, side in spec.sides if side.quantized), default=255)
    parts = [prelude(spec.digest(), arch, {"LB_CODE_TOP": top, **macros}), "namespace {", text, "}  // namespace"]
    return Source("\n".join([*parts, _text("attend_run.h")]), ".so", (*FLAGS, *ISA_FLAGS[arch]))


def attend_parts(spec: AttendSpec, arch: str) -> tuple[dict[str, int], str]:
    """Macros and text of attention and of appending, over the primitives of `arch`, without entry points; raises
    KernelError (LB0425) for formats with a correction."""
    if spec.fmt.gear is not None:
        raise KernelError("LB0425", f"no kernel reads {spec.format}", hint="leave gear out, or let torch attend")
    macros = {
        # Vectors that the compiler must split itself take it minutes when rows and columns are unrolled as well.
        "LB_ROWS": 1 if arch == "generic" else 4,
        "LB_KEYS": int(spec.fmt.key.quantized),
        "LB_VALUES": int(spec.fmt.value.quantized),
        "LB_KEY_CHANNELS": int(spec.fmt.key.token_group > 1),
        "LB_VALUE_CHANNELS": int(spec.fmt.value.token_group > 1),
        "LB_WINDOW": list(WINDOWS).index(spec.window),
    }
    parts = [_DOT, _constants(spec)]
    parts += [_dot(label, side) for label, side in _named(spec) if side.quantized]
    parts += [_places(spec, letter, side) for letter, side in spec.sides]
    return macros, "\n".join([*parts, _text("attend.h"), _text("attend_append.h")])


@cache
def _text(file: str) -> str:
    return files("lowbit.codegen.cpp").joinpath("text", file).read_text()


def _named(spec: AttendSpec) -> tuple[tuple[str, KVSide], ...]:
    return (("key", spec.fmt.key), ("value", spec.fmt.value))


def _constants(spec: AttendSpec) -> str:
    columns = math.ceil(spec.head_dim / KV_BLOCK) * KV_BLOCK
    unit = unit_tokens(spec)
    values = {"kDim": spec.head_dim, "kCols": columns, "kUnit": unit, "kPitch": max(unit, columns)}
    for label, side in _named(spec):
        size, groups = side.dim_group(spec.head_dim), side.dim_groups(spec.head_dim)
        bits = side.bits if side.quantized else 0
        tile = "Panel" if label == "key" else "Block"
        values |= {
            f"k{label.title()}{tile}": spec.panel_bytes(label[0]) * bits,
            f"k{label.title()}Group": side.token_group if side.token_group > 1 else 0,
            # A group of all keys of a token takes the padding along.
            f"k{label.title()}Dims": size if groups > 1 else columns,
            f"k{label.title()}DimGroups": groups,
        }
    return "".join(f"[[maybe_unused]] constexpr int64_t {key} = {value};\n" for key, value in values.items())


def _dot(label: str, side: KVSide) -> str:
    """`key_dot`, `value_dot`: one block of 16 rows x 32 columns times the digits of ROWS vectors."""
    planes, printer, extract = plane_bits(side.bits), Printer("bytes"), extract_program(*plane_bits(side.bits))
    if not (side.element.integer and side.element.bias == 0 and len(planes) == 1):
        raise KernelError("LB0425", f"no kernel reads {side.element.name} keys or values")
    lines = [
        "template <int ROWS>",
        f"LB_DOT void {label}_dot(const uint8_t* w, const int8_t* x, V* acc) {{",
        *(f"const V w{v} = vload(w + {64 * v});" for v in range(side.bits)),
    ]
    for quad in range(KV_BLOCK // 4):
        vector, slot = divmod(quad, 8 // side.bits)
        code = printer.text(build(extract, {"w0": name(f"w{vector}"), "s0": number(slot * side.bits)}))
        lines += [
            "{",
            f"const V code = {code};",
            f"for (int r = 0; r < 2 * ROWS; ++r) acc[r] = dot(acc[r], code, bcast4(x + r * kPitch + {4 * quad}));",
            "}",
        ]
    return indent([*lines, "}"])


def _places(spec: AttendSpec, letter: str, side: KVSide) -> str:
    """`Keys`, `Values`: what appending needs to know of one side, with the places of codes from the layout."""
    label = "Keys" if letter == "k" else "Values"
    size, groups = side.dim_group(spec.head_dim), side.dim_groups(spec.head_dim)
    lines = [
        f"struct {label} {{",
        f"static constexpr int bits = {side.bits};",
        f"static constexpr int64_t group = {side.token_group if side.token_group > 1 else 0};",
        f"static constexpr int64_t dims = {size}, dim_groups = {groups};",
    ]
    if side.quantized:
        rows, columns, shifts = _addresses(spec, letter, side)
        row, column = ("t % 16", "d") if letter == "k" else ("d", "t % 32")
        start = "t / 16 * kKeyPanel" if letter == "k" else "t / 32 * kValueBlock"
        lines += [
            *(_table(key, values) for key, values in (("row", rows), ("column", columns), ("bit", shifts))),
            f"static int64_t at(int64_t t, int64_t d) {{ return {start} + row[{row}] + column[{column}]; }}",
            f"static int shift(int64_t t, int64_t d) {{ return (void)t, (void)d, bit[{column}]; }}",
        ]
    return indent([*lines, "};"])


def _table(label: str, values: list[int]) -> str:
    return f"static constexpr uint16_t {label}[] = {{{', '.join(map(str, values))}}};"


def _addresses(spec: AttendSpec, letter: str, side: KVSide) -> tuple[list[int], list[int], list[int]]:
    """(row offsets, column offsets, column shifts) of a panel of keys or a block of values: byte of a code = sum."""
    rows = LANES if letter == "k" else spec.head_dim
    columns = math.ceil(spec.head_dim / KV_BLOCK) * KV_BLOCK if letter == "k" else KV_BLOCK
    index, shift = spec.layout.address(side.bits, rows, columns)
    if not (index == index[:, :1] + index[:1]).all() or not (shift == shift[:1]).all():
        raise KernelError("LB0425", f"no kernel reads codes laid out as {spec.layout}")
    return index[:, 0].tolist(), index[0].tolist(), shift[0].tolist()
