"""The kernel for few tokens: weights are decoded in registers and multiplied with a tile of tokens there.

Scales meet the sums of a group, unless there are offsets, for which sums of activations would be needed.
"""

from __future__ import annotations

from lowbit.codegen.tvm.epilogue import finish
from lowbit.codegen.tvm.frame import each_column, inside, local, loop, panel_of, place_of, words, zero
from lowbit.codegen.tvm.plan import Plan
from lowbit.codegen.tvm.printing import LANES, Expr, Printer, spread
from lowbit.codegen.tvm.sides import group_of, load, part_columns, side_values
from lowbit.quantizers.formats import K_ALIGN

__all__ = ["direct_body"]


def direct_body(plan: Plan) -> list[str]:
    """Statements that run units [first, last)."""
    height, cells = plan.schedule.tile_m, plan.panels * plan.schedule.tile_m
    tile = loop(f"i in T.unroll({cells})", [zero("y", f"i * {LANES}")])
    tile += _groups(plan) if plan.spec.parts == 1 else loop(f"b in range({plan.spec.blocks})", _block(plan))
    tile += loop(f"p in T.unroll({plan.side_by_side})", _finish_direct(plan))
    units = loop(f"t in range(T.truncdiv(m + {height - 1}, {height}))", tile)
    return [local("y", cells), local("s", cells), *loop("u in range(first, last)", units)]


def _groups(plan: Plan) -> list[str]:
    """The loop over groups of whole blocks. Where there is one, or scales meet weights, it is one over blocks."""
    spec = plan.spec
    if not plan.late:
        return loop(f"b in range({spec.blocks})", _block(plan))
    cells = plan.panels * plan.schedule.tile_m
    end = f"T.min({spec.group_blocks}, {spec.blocks} - g * {spec.group_blocks})"
    blocks = loop(f"j in range({end})", [f"b: T.let[T.int32] = g * {spec.group_blocks} + j", *_block(plan)])
    lines = [*loop(f"i in T.unroll({cells})", [zero("s", f"i * {LANES}")]), *blocks]
    lines += loop(f"p in T.unroll({plan.panels})", [panel_of(plan), *_scaled(plan, "g", "s")])
    return loop(f"g in range({spec.groups})", lines)


def _scaled(plan: Plan, group: str, prefix: str) -> list[str]:
    """Adds the sums of a group, times its scales, to the results."""
    printer = Printer(plan.tables, prefix)
    scale = side_values(plan, printer, "panel", group)["scale"]
    at = f"(p * {plan.schedule.tile_m} + i) * {LANES}"
    each = f"{load('y', at)} = {load('y', at)} + {load('s', at)} * {scale}"
    return [*printer.take(), *loop(f"i in T.unroll({plan.schedule.tile_m})", [each])]


def _block(plan: Plan) -> list[str]:
    """One block of 32 columns, panel by panel: decodes and multiplies."""
    lines = [panel_of(plan), *words(plan)]
    for part in range(plan.spec.parts):
        group = group_of(plan, "b", part)
        lines += _part(plan, group, range(part * part_columns(plan), (part + 1) * part_columns(plan)))
    return loop(f"p in T.unroll({plan.panels})", lines)


def _part(plan: Plan, group: str, columns: range) -> list[str]:
    """Columns of a block that share a scale."""
    spec, height, tag = plan.spec, plan.schedule.tile_m, f"{columns.start}_"
    printer, small, at = Printer(plan.tables, f"g{tag}"), spec.parts > 1 and plan.late, f"(p * {height} + i) * {LANES}"
    sides = side_values(plan, printer, "panel", group) if not plan.late or spec.fmt.zero else {}
    if plan.late:
        sides["scale"] = Expr(value=1.0)
    target = load("s" if plan.late else "y", at)

    def multiply(column: str, value: Expr) -> list[str]:
        x = spread(f"x[(t * {height} + i) * {plan.columns} + b * {K_ALIGN} + {column}]")
        return loop(f"i in T.unroll({height})", [f"{target} = {target} + {value} * {x}"])

    lines = loop(f"i in T.unroll({height})", [zero("s", at)]) if small else []
    lines += [*printer.take(), *each_column(plan, columns, sides, f"v{tag}", multiply)]
    return [*lines, *(_scaled(plan, group, f"s{tag}") if small else [])]


def _finish_direct(plan: Plan) -> list[str]:
    height = plan.schedule.tile_m
    sums = [load("y", f"((p + {i * plan.side_by_side}) * {height} + i) * {LANES}") for i in range(plan.pairs)]
    token = [f"token: T.let[T.int32] = t * {height} + i", "if token < m:", *inside(finish(plan, sums))]
    return [*place_of(plan), *loop(f"i in T.unroll({height})", token)]
