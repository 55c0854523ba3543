"""The kernel for many tokens: a chunk of a panel's columns is decoded into memory, and tile after tile of tokens meets
it there. Their sums wait in memory for the next chunk."""

from __future__ import annotations

from lowbit.codegen.tvm.epilogue import finish
from lowbit.codegen.tvm.frame import each_column, local, loop, panel_of, place_of, words, zero
from lowbit.codegen.tvm.plan import Plan
from lowbit.codegen.tvm.printing import LANES, Expr, Printer, spread
from lowbit.codegen.tvm.sides import group_of, load, part_columns, side_values
from lowbit.quantizers.formats import K_ALIGN

__all__ = ["buffered_body"]


def buffered_body(plan: Plan) -> list[str]:
    """Statements that run units [first, last)."""
    spec, height, depth = plan.spec, plan.schedule.tile_m, plan.chunk_blocks
    tiles = f"T.truncdiv(m + {height - 1}, {height})"
    body = [f"count: T.let[T.int32] = T.min({depth}, {spec.blocks} - chunk * {depth})"]
    body += loop("j in range(count)", _decode_block(plan))
    body += loop(f"t in range({tiles})", _multiply(plan))
    panel = [panel_of(plan), *loop(f"t in range({tiles} * {height})", [zero("sums", _sums_at(plan, "t"))])]
    panel += loop(f"chunk in range({-(-spec.blocks // depth)})", body)
    unit = loop(f"p in range({plan.panels})", panel) + loop(f"p in range({plan.side_by_side})", _finish_buffered(plan))
    return [local("y", height), *loop("u in range(first, last)", unit)]


def _sums_at(plan: Plan, token: str, panel: str = "p") -> str:
    height = plan.schedule.tile_m
    return f"(({panel}) * (T.truncdiv(m + {height - 1}, {height}) * {height}) + {token}) * {LANES}"


def _decode_block(plan: Plan) -> list[str]:
    """Weights of one block of the chunk, into `decoded`."""
    lines = [f"b: T.let[T.int32] = chunk * {plan.chunk_blocks} + j", *words(plan)]

    def store(column: str, value: Expr) -> list[str]:
        return [f"{load('decoded', f'(j * {K_ALIGN} + {column}) * {LANES}')} = {value}"]

    for part in range(plan.spec.parts):
        printer = Printer(plan.tables, f"g{part}_")
        sides = side_values(plan, printer, "panel", group_of(plan, "b", part))
        columns = range(part * part_columns(plan), (part + 1) * part_columns(plan))
        lines += [*printer.take(), *each_column(plan, columns, sides, f"v{part}_", store)]
    return lines


def _multiply(plan: Plan) -> list[str]:
    """A tile of tokens meets the chunk."""
    height = plan.schedule.tile_m
    here, there = f"i * {LANES}", _sums_at(plan, f"t * {height} + i")
    x = spread(f"x[(t * {height} + i) * {plan.columns} + chunk * {plan.chunk_blocks * K_ALIGN} + k]")
    step = [f"w: T.let[T.float32x{LANES}] = {load('decoded', f'k * {LANES}')}"]
    step += loop(f"i in T.unroll({height})", [f"{load('y', here)} = {load('y', here)} + w * {x}"])
    lines = loop(f"i in T.unroll({height})", [f"{load('y', here)} = {load('sums', there)}"])
    lines += loop(f"k in range(count * {K_ALIGN})", step)
    return lines + loop(f"i in T.unroll({height})", [f"{load('sums', there)} = {load('y', here)}"])


def _finish_buffered(plan: Plan) -> list[str]:
    sums = [load("sums", _sums_at(plan, "token", f"p + {i * plan.side_by_side}")) for i in range(plan.pairs)]
    return [*place_of(plan), *loop("token in range(m)", finish(plan, sums))]
