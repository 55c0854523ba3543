"""The kernel of codebooks of bytes for many tokens: a chunk of a unit's columns is decoded once, to the panels that
byte dot products want, and register tiles of tokens x panels run over it, as they do for scalar formats."""

from __future__ import annotations

from lowbit.codegen.cpp.bytes_plan import BLOCK, BytesPlan
from lowbit.codegen.cpp.bytes_steps import Operands, add_function, block_pointers, books_of, columns_loop
from lowbit.codegen.cpp.plan import PANEL
from lowbit.codegen.cpp.products import LevelProducts, LevelWordProducts
from lowbit.codegen.cpp.sides import dispatch, indent
from lowbit.codegen.cpp.tiles import pieces_of_work, tile_pass
from lowbit.codegen.cpp.vector_lookup import first_tiles
from lowbit.codegen.cpp.vector_plan import TILE, Part

__all__ = ["bytes_panels_text"]


def bytes_panels_text(plan: BytesPlan) -> str:
    """Register tiles, decoding with each codebook, and `work`, which runs one thread's share."""
    shapes = {(plan.part_panels(part), width): None for part in plan.parts for width in plan.split(part)}
    texts = [_tile(plan, stride, width, height) for stride, width in shapes for height in plan.heights]
    for part in plan.parts:
        texts += [first_tiles(part), _decode(plan, part)]
    body = ["unit(a, place(n / pieces), t0, t1, room);"]
    return "\n".join([*texts, _unit(plan), indent(pieces_of_work(plan, body))])


def _tile(plan: BytesPlan, stride: int, width: int, height: int) -> str:
    """`tile_<stride>_<width>_<height>`: exact sums over the chunk, times the scales, added to the sums at `y`; `stride`
    panels lie side by side."""
    cells = [(m, i) for m in range(height) for i in range(width)]
    form = LevelWordProducts() if plan.words else LevelProducts()
    lines = [
        f"static void tile_{stride}_{width}_{height}(const uint8_t* buffer, int64_t steps, "
        f"const {plan.item}* x, const float* xs, const int32_t* xi, F scale, float* y) {{",
        *(f"V a{m}_{i} = {'vzero()' if plan.digits > 1 else f'set1(uint32_t(xi[{m}]))'};" for m, i in cells),
    ]
    for d in range(plan.digits):
        if d:
            lines += [f"a{m}_{i} = vadd(shl<8>(a{m}_{i}), set1(uint32_t(xi[{m}])));" for m, i in cells]
        together = 2 if plan.words else 1
        lines += tile_pass(form, width, height, stride, plan.token_stride, d * plan.chunk_cols, together=together)
    for m, i in cells:
        at = f"y + {(m * stride + i) * PANEL}"
        lines.append(f"fstore({at}, fma_(fmul(cvt(a{m}_{i}), fset1(xs[{m}])), scale, fload({at})));")
    return indent([*lines, "}"])


def _decode(plan: BytesPlan, part: Part) -> str:
    """`decode_<part>`: the blocks of a unit over the columns of chunk `c`, as [step][panel][row][column]."""
    many, operands, stride = plan.many(part), plan.operands(part), plan.part_panels(part) * BLOCK

    def use(made: Operands) -> list[str]:
        stores = [store for i, operand in made.made.items() for store in _stores(plan, BLOCK * i, operand, stride)]
        return [*stores, *([f"to += {stride * (1 + plan.words)};"] if operands - 1 in made.made else [])]

    start = sum(p.columns for p in plan.parts if p.chunk < part.chunk)
    lines = [
        f"static void decode_{part.name}(const Args& a, int64_t segment, int64_t unit, int64_t g, int64_t c, "
        "uint8_t* buffer) {",
        f"const int64_t n = chunk_columns(c), column = chunk_start(c) - {start};",
        *books_of(plan, part, "g"),
        f"for (int64_t b = 0; b < {plan.blocks(part)}; ++b) {{",
        f"const int64_t v = unit * {part.per_unit} + b * {many};",
        # Rows behind a segment's end are computed from whatever is there, and not written.
        f"if (v >= tiles_{part.name}[segment] * {TILE}) break;",
        *block_pointers(part, "column"),
        f"uint8_t* to = buffer + b * {operands * BLOCK};",
        *columns_loop(plan, part, range(operands), use),
    ]
    return indent([*lines, "}", "}"])


def _stores(plan: BytesPlan, at: int, operand: str, stride: int) -> list[str]:
    """An operand of a step of four columns, or two of words of two columns each, which are steps of their own."""
    if not plan.words:
        return [f"vstore(to + {at}, {operand});"]
    halves = [f"vstore(to + {at + odd * stride}, word<{odd}>(all));" for odd in (0, 1)]
    return ["{", f"const V all = {operand};", *halves, "}"]


def _unit(plan: BytesPlan) -> str:
    """One unit of work for tokens [t0, t1)."""
    floats = sum(plan.part_panels(p) for p in plan.parts) * PANEL * plan.tokens
    lines = [
        "static void unit(const Args& a, const Place& p, int64_t t0, int64_t t1, uint8_t* room) {",
        f"float* sums = (float*)(room + {plan.code_bytes});",
        f"float* rows = sums + {floats};",
        f"memset(room, 0, {plan.code_bytes});",
        f"memset(sums, 0, {floats * 4});",
    ]
    for part in plan.parts:
        lines += _part_chunks(plan, part)
    lines += ["for (int64_t t = t0; t < t1; ++t) {", f"memset(rows, 0, {plan.pair * plan.row_stride * 4});"]
    lines += [line for part in plan.parts for line in _add(plan, part)]
    up = f"rows + {plan.row_stride}, " if plan.silu else ""
    return indent([*lines, f"put(a, t, p.column, rows, {up}p.rows);", "}", "}"])


def _part_chunks(plan: BytesPlan, part: Part) -> list[str]:
    """All chunks of one part: decoded for gate and up, or for the one segment, then multiplied."""
    stride = plan.part_panels(part)
    half = stride // plan.pair
    lines = [
        "{",
        f"int64_t c = {part.chunk};",
        f"for (int64_t g = 0; g < {part.groups}; ++g) {{",
        f"for (const int64_t end = c + {part.group_chunks}; c < end; ++c) {{",
        f"const int64_t steps = (chunk_columns(c) + 3) / 4{' * 2' if plan.words else ''};",
    ]
    for i in range(plan.pair):
        segment = str(i) if plan.silu else "p.segment"
        lines += ["{", f"const int64_t segment = {segment};"]
        lines += [f"decode_{part.name}(a, segment, p.unit, g, c, room + {i * half * BLOCK});"]
        lines += [f"const F scale = fset1(a.{part.books[0].scale}[segment * {part.groups} + g]);"]
        at = i * half
        for width in plan.split(part):
            y = f"sums + {plan.sums_at(part) + at * PANEL} + (t - t0) * {stride * PANEL}"
            sides = "a.xq + (c * a.m + t) * kTokenStride, a.xs + c * a.m + t, a.xi + c * a.m + t, scale"
            tile = f"tile_{stride}_{width}_{{}}(room + {at * BLOCK}, steps, {sides}, {y});"
            lines += dispatch(plan.heights, "t0", "t1", tile.format)
            at += width
        lines.append("}")
    return [*lines, "}", "}", "}"]


def _add(plan: BytesPlan, part: Part) -> list[str]:
    """Token `t`'s sums of a part, added to its rows."""
    stride, blocks, rows = plan.part_panels(part) * PANEL, plan.blocks(part), plan.many(part) * part.dim
    size = plan.operands(part) * PANEL
    out = []
    for i in range(plan.pair):
        y = f"sums + {plan.sums_at(part)} + (t - t0) * {stride} + ({i * blocks} + b) * {size}"
        to = f"rows + {i * plan.row_stride} + b * {rows}"
        out.append(f"for (int b = 0; b < {blocks}; ++b) {add_function(plan, part)}({y}, {to});")
    return out
