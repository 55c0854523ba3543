"""Side values of panels, and where a panel's outputs go: the expressions that all kernels share.

`panel` is the text of a panel's number, `group` that of a scale group; both are scalars of the script.
"""

from __future__ import annotations

from lowbit.codegen.tvm.plan import Plan
from lowbit.codegen.tvm.printing import LANES, Expr, Printer, spread, wide
from lowbit.quantizers.formats import K_ALIGN, FloatElement

__all__ = ["group_of", "load", "output_place", "part_columns", "side_values"]

_LEAST_POWER = 0x00400000  # 2**-127, a subnormal float: the smallest e8m0


def load(buffer: str, at: str) -> str:
    """16 numbers of a buffer."""
    return f"{buffer}[T.Ramp({at}, 1, {LANES})]"


def part_columns(plan: Plan) -> int:
    """Columns of a block that share a scale."""
    return K_ALIGN // plan.spec.parts


def group_of(plan: Plan, block: str, part: int) -> str:
    """The scale group of a block's part. Parts behind the last group are padding: they may have any scale."""
    spec = plan.spec
    if spec.groups == 1:
        return "0"
    if spec.parts == 1:
        return f"T.truncdiv({block}, {spec.group_blocks})"
    return f"T.min({block} * {spec.parts} + {part}, {spec.groups - 1})"


def side_values(plan: Plan, printer: Printer, panel: str, group: str) -> dict[str, Expr]:
    """Arguments `scale` and, where stored, `zero` or `offset` of the decode program: float32 vectors."""
    fmt = plan.spec.fmt
    at = f"(({panel}) * {plan.spec.groups} + {group}) * {LANES}"
    values = {"scale": _scale(plan, printer, panel, at)}
    if fmt.zero:
        values["zero"] = printer.let(_number(load("zero", at), "uint8"), "float32")
    if fmt.offset:
        values["offset"] = printer.let(_number(load("offset", at), plan.params["offset"]), "float32")
    return values


def _number(text: str, kind: str) -> str:
    return text if kind == "float32" else f'T.Cast("{wide("float32")}", {text})'


def _scale(plan: Plan, printer: Printer, panel: str, at: str) -> Expr:
    stored = load("scale", at)
    if plan.params["scale"] != "uint8":
        return printer.let(_number(stored, plan.params["scale"]), "float32")
    code = printer.let(f'T.Cast("{wide("uint32")}", {stored})', "uint32")
    if plan.spec.scale_dtype == "e8m0":
        bits = f"T.max(T.shift_left({code}, {Expr(value=23)}), {Expr(value=_LEAST_POWER)})"
        value = Expr(f'T.reinterpret("{wide("float32")}", {bits})')
    else:
        value = printer.run(FloatElement(4, 3, "fn").decode(), {"code": code})
    if plan.whole_scales:
        value = Expr(f"({value} * {spread(f'tensor_scale[{_segment(plan, panel)}]')})")
    return printer.let(str(value), "float32")


def _by_segment(plan: Plan, panel: str, values: list[str]) -> str:
    """The value of the segment that a panel belongs to."""
    text, start = values[0], 0
    for n, value in zip(plan.spec.segments, values[1:], strict=False):
        start += -(-n // LANES)
        text = f"T.Select({panel} < {start}, {text}, {value})"
    return text


def _segment(plan: Plan, panel: str) -> str:
    return _by_segment(plan, panel, [str(i) for i in range(len(plan.spec.segments))])


def output_place(plan: Plan, panel: str) -> tuple[str, str]:
    """(column of the panel's first row in the output, how many of its rows there are). Of a gated MLP `panel` is one of
    the first segment."""
    columns, rows, column, start = [], [], 0, 0
    for n in plan.spec.segments[: 1 if plan.pairs == 2 else None]:
        columns.append(f"{panel} * {LANES} + {column - start * LANES}")
        rows.append(f"T.min({LANES}, {n + start * LANES} - {panel} * {LANES})")
        column, start = column + n, start + -(-n // LANES)
    return _by_segment(plan, panel, columns), _by_segment(plan, panel, rows)
