"""What the loops of all kernels share: statements, panels, and the decoding of a block's columns."""

from __future__ import annotations

from collections.abc import Callable

from lowbit.codegen.tvm.plan import Plan
from lowbit.codegen.tvm.printing import LANES, Expr, Printer, spread
from lowbit.codegen.tvm.sides import load, output_place

__all__ = ["Use", "each_column", "inside", "local", "loop", "panel_of", "place_of", "words", "zero"]

Use = Callable[[str, Expr], list[str]]
"""(a column's number as text, its weights) -> statements."""


def inside(lines: list[str]) -> list[str]:
    """Statements one step further in."""
    return ["    " + line for line in lines]


def loop(head: str, lines: list[str]) -> list[str]:
    """Statements in a loop."""
    return [f"for {head}:", *inside(lines)]


def local(name: str, vectors: int) -> str:
    """Vectors that live in registers: so few bytes that TVM leaves them on the stack, whence LLVM takes them."""
    return f'{name} = T.alloc_buffer(({vectors * LANES},), "float32", scope="global")'


def zero(name: str, at: str) -> str:
    """A vector of zeros."""
    return f"{load(name, at)} = {spread('T.float32(0)')}"


def panel_of(plan: Plan) -> str:
    """Defines `panel`, that of place `p` in unit `u`. Behind the last panel of outputs the last is computed again."""
    output = f"T.min(u * {plan.side_by_side} + T.truncmod(p, {plan.side_by_side}), {plan.output_panels - 1})"
    half = f" + T.truncdiv(p, {plan.side_by_side}) * {plan.output_panels}" if plan.pairs == 2 else ""
    return f"panel: T.let[T.int32] = {output}{half}"


def place_of(plan: Plan) -> list[str]:
    """Defines `panel`, and `column` and `rows` of its outputs."""
    column, rows = output_place(plan, "panel")
    return [panel_of(plan), f"column: T.let[T.int32] = {column}", f"rows: T.let[T.int32] = {rows}"]


def words(plan: Plan) -> list[str]:
    """The words of block `b` of a panel, as `word<plane>_<vector>`; nothing where columns are `regular`."""
    found = [] if plan.regular else plan.vectors
    return [f"word{p}_{v}: T.let[T.uint32x{LANES}] = {load(f'plane{p}', _word(plan, p, str(v)))}" for p, v in found]


def _word(plan: Plan, plane: int, vector: str) -> str:
    """Where a vector of block `b` is."""
    return f"((panel * {plan.spec.blocks} + b) * {plan.plane_vectors[plane]} + {vector}) * {LANES}"


def each_column(plan: Plan, columns: range, sides: dict[str, Expr], prefix: str, use: Use) -> list[str]:
    """Statements for some columns of block `b` of a panel: its weights, and what `use` does with them.

    Where columns are regular they are a loop, which TVM unrolls: it takes long to read text.
    """
    printer = Printer(plan.tables, prefix)
    if plan.regular:
        column = f"(c + {columns.start})"
        value = _weights(plan, printer, 0, sides | _regular(plan, printer, column))
        return loop(f"c in T.unroll({len(columns)})", [*printer.take(), *use(column, value)])
    lines = []
    for number in columns:
        args = dict(sides)
        for i, part in enumerate(plan.parts[number]):
            args |= {f"w{i}": Expr(f"word{part.plane}_{part.vector}"), f"s{i}": Expr(value=part.shift)}
        value = _weights(plan, printer, number, args)
        lines += [*printer.take(), *use(str(number), value)]
    return lines


def _regular(plan: Plan, printer: Printer, column: str) -> dict[str, Expr]:
    """Words and shifts of a column whose number the loop knows (see `Plan.regular`)."""
    args = {}
    for i, part in enumerate(plan.parts[0]):
        per = 8 // part.width
        at = _word(plan, part.plane, f"T.truncdiv({column}, {4 * per})")
        shift = f"T.truncmod({column}, 4) * 8 + T.truncmod(T.truncdiv({column}, 4), {per}) * {part.width}"
        args[f"w{i}"] = printer.let(load(f"plane{part.plane}", at), "uint32")
        args[f"s{i}"] = Expr(spread(f'T.Cast("uint32", {shift})'))
    return args


def _weights(plan: Plan, printer: Printer, column: int, args: dict[str, Expr]) -> Expr:
    return printer.let(str(printer.run(plan.program(column), args)), "float32")
