"""Sums of a chunk looked up instead of computed: see `lut_plan` for the method.

A block's vectors are sorted by column once; then every nibble is an index into one of four tables. Low and high bytes
of the entries are added up as bytes, then as 16-bit numbers, and once a chunk these are the exact sums of dot products.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from lowbit.codegen.cpp.direct import activations, block_at, blocks_loop, collect, group_sums, jump
from lowbit.codegen.cpp.lut_plan import (
    LOW_BITS,
    OFFSET,
    TABLE_BYTES,
    WIDEST,
    LutStep,
    blocks_per_sum,
    centre,
    code_step,
    factors,
    lut_steps,
)
from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.products import Products
from lowbit.codegen.cpp.sides import indent, start_value

__all__ = ["lut_chunk", "lut_types"]


def lut_types(plan: Plan) -> str:
    """The constants that tables are filled from (`text/lut_rows.h`)."""
    steps = (f"{{{{{_list(step.columns)}}}, {step.plane}}}" for step in _steps(plan))
    lines = [
        f"constexpr int kLutOffset = {OFFSET}, kLutLowBits = {LOW_BITS}, kLutTableBytes = {TABLE_BYTES};",
        f"constexpr int64_t kLutBytes = {plan.lut_bytes};",
        f"constexpr int kLutPlanes = {len(plan.planes)}, kLutWidths[] = {{{_list(plan.planes)}}};",
        f"constexpr int kLutCentres[] = {{{_list(map(centre, plan.planes))}}};",
        f"constexpr int kLutShifts[] = {{{_list(_shifts(plan))}}};",
        "// Columns of a nibble's codes in the first of its four tables, and their plane.",
        "struct LutStep {",
        "int columns[4], plane;",
        "};",
        f"constexpr LutStep kLutSteps[] = {{{_list(steps)}}};",
    ]
    for width in (1, WIDEST):
        rows = (f"{{{_list(row)}}}" for row in factors(width))
        lines.append(f"constexpr int16_t kLutFactors{width}[][16] = {{{_list(rows)}}};")
    return indent(lines)


def lut_chunk(plan: Plan, form: Products, width: int, height: int) -> list[str]:
    """Sum over one chunk, then add it to the running result with its scales."""
    cells = list(product(range(width), range(height), range(plan.digits)))
    lines = [
        *activations(plan, form),
        f"const int64_t first = ({plan.input_row} * a.m + t) * {plan.digits};",
        "const uint8_t* tables = a.tables + first * kLutBytes;",
        *jump(plan, width),
    ]
    for (i, m, d), p in product(cells, range(len(plan.planes))):
        lines += [f"ByteSums b{i}_{m}_{d}_{p} = no_bytes();", f"WordSums r{i}_{m}_{d}_{p} = no_words();"]
    lines += blocks_loop(plan)
    for i in range(width):
        lines += _indices(plan, form, i)
    for n, step in enumerate(_steps(plan)):
        lines += _look_up(plan, step, n * TABLE_BYTES, cells, width)
    lines += [line for p in range(len(plan.planes)) for line in _add_bytes(plan, p, cells)]
    lines += [f"tables += {len(_steps(plan)) * TABLE_BYTES};", "}"]
    for i, m, d in cells:
        lines.append(f"const V a{i}_{m}_{d}_0_0 = {_exact(plan, i, m, d)};")
    for i, m in product(range(width), range(height)):
        lines += collect(plan, form, i, m)
    return [*lines, *group_sums(plan, height)]


def _indices(plan: Plan, form: Products, i: int) -> list[str]:
    """`k<panel>_<plane>_<vector>`: the vectors of one block of one panel, sorted by column."""
    vectors = [(p, v) for p, bits in enumerate(plan.planes) for v in range(bits)]
    lines = [f"V {_list(f'k{i}_{p}_{v}' for p, v in vectors)};", "{", *block_at(plan, i)]
    lines += [load for _, load in form.loads()]
    lines += [f"k{i}_{p}_{v} = by_column(w{p}_{v});" for p, v in vectors]
    return [*lines, *(f"p{i}w{p} += {64 * bits};" for p, bits in enumerate(plan.planes)), "}"]


def _look_up(plan: Plan, step: LutStep, at: int, cells: list[tuple[int, int, int]], width: int) -> list[str]:
    """One nibble of a vector of every panel, in the tables of every token and digit."""
    lines = ["{"]
    lines += [f"const V n{i} = nibble<{step.half}>(k{i}_{step.plane}_{step.vector});" for i in range(width)]
    for i, m, d in sorted(cells, key=lambda cell: cell[1:]):  # panels in turn, which use the same tables
        sums = f"b{i}_{m}_{d}_{step.plane}"
        lines.append(f"{sums} = look_up({sums}, n{i}, tables + {(m * plan.digits + d) * plan.lut_bytes + at});")
    return [*lines, "}"]


def _add_bytes(plan: Plan, p: int, cells: list[tuple[int, int, int]]) -> list[str]:
    """Sums of bytes go on as 16-bit numbers before they can overflow."""
    lines, blocks = [], blocks_per_sum(plan.planes[p])
    for i, m, d in cells:
        bytes_, words = f"b{i}_{m}_{d}_{p}", f"r{i}_{m}_{d}_{p}"
        lines += [f"{words} = add_bytes<kLutLowBits>({words}, {bytes_});", f"{bytes_} = no_bytes();"]
    if blocks == 1:
        return lines
    return [f"if ((b + 1) % {blocks} == 0 || b + 1 == blocks) {{", *lines, "}"]


def _exact(plan: Plan, i: int, m: int, d: int) -> str:
    """The sum of a digit's products: those of all planes, less what tables have too much. The lowest digit's has the
    zero point's share."""
    total = f"set1(uint32_t(-a.excess[first + {m * plan.digits + d}]))"
    for p, shift in enumerate(_shifts(plan)):
        rows = f"in_rows(r{i}_{m}_{d}_{p})"
        total = f"vadd({total}, {f'shl<{shift}>({rows})' if shift else rows})"
    return f"vadd({total}, {start_value(plan, f'z{i}', f'xi[{m}]')})" if d == plan.digits - 1 else total


def _steps(plan: Plan) -> tuple[LutStep, ...]:
    return lut_steps(plan.spec.layout_, plan.spec.fmt.bits)


def _shifts(plan: Plan) -> list[int]:
    """By plane: the power of two that its codes count."""
    step = code_step(plan.levels).bit_length() - 1
    return [step + sum(plan.planes[:p]) for p in range(len(plan.planes))]


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
