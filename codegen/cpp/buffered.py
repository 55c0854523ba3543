"""The kernel for many tokens: a chunk of a few panels is decoded once into a small buffer that stays in the first-level
cache, and a register tile of tokens x panels runs over it; sums of all chunks are kept in a buffer of partial results.
"""

from __future__ import annotations

from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.products import Products
from lowbit.codegen.cpp.sides import (
    decode_sides,
    dispatch,
    indent,
    panel_of,
    part_group,
    scale_and_zero,
    start_value,
    units,
)
from lowbit.codegen.cpp.tiles import float_tile, pieces_of_work, tile_pass

__all__ = ["buffered_text"]


def buffered_text(plan: Plan, form: Products) -> str:
    """All tile functions, and `work`, which runs one thread's share."""
    parts = [_tile(plan, form, width, height) for width in plan.widths for height in plan.heights]
    parts += [_unit(plan, form, width) for width in plan.widths]
    return "\n".join([*parts, _work(plan)])


def _tile(plan: Plan, form: Products, width: int, height: int) -> str:
    """`width` panels x `height` tokens over one decoded chunk."""
    return _int_tile(plan, form, width, height) if plan.integer else float_tile(plan, form, width, height, width)


def _int_tile(plan: Plan, form: Products, width: int, height: int) -> str:
    """Digits one after the other in the same accumulators (see `Plan.terms`); then scales and, if stored, offsets."""
    cells = [(m, i) for m in range(height) for i in range(width)]
    lines = [
        f"static void tile_{width}_{height}(const uint8_t* buffer, int64_t steps, const int8_t* x, "
        "const float* xs, const int32_t* xi, const float* xo, const F* s, const V* z, const F* o, float* y) {"
    ]
    lines += [f"const F s{i} = s[{i}];" for i in range(width)]
    lines += [f"const V z{i} = z[{i}];" for i in range(width) if plan.spec.fmt.zero]
    lines += [f"V a{m}_{i} = vzero();" for m, i in cells]
    before = plan.terms[0][0]
    for shift, d, e in plan.terms:
        if by := before - shift:
            lines += [f"a{m}_{i} = shl<{by}>(a{m}_{i});" for m, i in cells]
        if not shift:
            lines += [f"a{m}_{i} = vadd(a{m}_{i}, {start_value(plan, i, f'xi[{m}]')});" for m, i in cells]
        weights = e * _digit_bytes(plan, width)
        lines += tile_pass(form, width, height, width, plan.token_stride, d * plan.chunk_cols, weights)
        before = shift
    for m, i in cells:
        at = f"y + {(m * width + i) * 16}"
        sum_ = f"fma_(fmul(cvt(a{m}_{i}), fset1(xs[{m}])), s{i}, fload({at}))"
        lines.append(f"fstore({at}, {f'fma_(fset1(xo[{m}]), o[{i}], {sum_})' if plan.shifts else sum_});")
    return indent([*lines, "}"])


def _unit(plan: Plan, form: Products, width: int) -> str:
    """One unit of work for tokens [t0, t1)."""
    code = "uint8_t" if plan.integer else "float"
    lines = [
        f"static void unit_{width}(const Args& a, int64_t slot, int64_t t0, int64_t t1, uint8_t* room) {{",
        f"{code}* buffer = ({code}*)room;",
        f"float* sums = (float*)(room + {plan.code_bytes});",
        *units(plan, width),
        f"memset(sums, 0, size_t(t1 - t0) * {width * 64});",
        "for (int64_t c = 0; c < kChunks; ++c) {",
        f"const int64_t blocks = c + 1 < kChunks ? kChunkBlocks : {plan.last_blocks};",
    ]
    if plan.spec.parts == 1:
        lines += scale_and_zero(plan, width, "c / kGroupChunks")
    for i in range(width):
        lines += _decode(plan, form, width, i)
    # Sums of integers are scaled part by part, floats before.
    for part in range(plan.spec.parts if plan.integer else 1):
        lines += ["{", *_tiles_of_part(plan, form, width, part), "}"]
    lines += ["}", "for (int64_t t = t0; t < t1; ++t) {", f"const float* y = sums + (t - t0) * {width * 16};"]
    half = width // 2 if plan.silu else width
    for i in range(half):
        up = f", fload(y + {16 * (i + half)})" if plan.silu else ""
        lines.append(f"finish(a, {panel_of(plan, width, i)}, t, fload(y + {16 * i}){up});")
    return indent([*lines, "}", "}"])


def _tiles_of_part(plan: Plan, form: Products, width: int, part: int) -> list[str]:
    """The calls of tiles over the decoded chunk, or for integers over one part of it."""
    lines, sides, steps, first = [], "", f"blocks * {form.steps}", 0
    if plan.integer:
        if plan.spec.parts > 1:
            lines += scale_and_zero(plan, width, part_group(plan, "c", part))
            steps, first = str(form.steps // plan.spec.parts), part * plan.part_cols
        lines += _side_arrays(plan, width)
        at = f"(c * kParts + {part}) * a.m + t"
        sides = f"a.xs + c * a.m + t, a.xi + {at}, a.xo + {at}, s, z, o, "
    x = f"(const {form.item}*)a.xq + (c * a.m + t) * kTokenStride + {first}"
    y, buffer = f"sums + (t - t0) * {width * 16}", f"buffer + {first * width * 16}"
    return lines + dispatch(
        plan.heights, "t0", "t1", lambda h: f"tile_{width}_{h}({buffer}, {steps}, {x}, {sides}{y});"
    )


def _digit_bytes(plan: Plan, width: int) -> int:
    """Bytes of one digit of a decoded chunk."""
    return width * 16 * plan.chunk_cols


def _side_arrays(plan: Plan, width: int) -> list[str]:
    """`s`, `z` and `o`: scales, and zero points and offsets where they are stored, of all panels of a tile."""
    stored = {"s": True, "z": plan.spec.fmt.zero, "o": plan.spec.fmt.offset}
    out = []
    for side, there in stored.items():
        type_, names = "V" if side == "z" else "F", ", ".join(f"{side}{i}" for i in range(width))
        out.append(f"const {type_} {side}[] = {{{names}}};" if there else f"const {type_}* {side} = nullptr;")
    return out


def _decode(plan: Plan, form: Products, width: int, i: int) -> list[str]:
    """Decode the chunk of panel `i` into the buffer, where the panels of a tile lie side by side."""
    items = 64 if plan.integer else 16
    lines = ["{"]
    at = f"(({panel_of(plan, width, i)}) * kBlocks + c * kChunkBlocks)"
    lines += [f"const uint8_t* w{j} = a.plane[{j}] + {at} * {64 * bits};" for j, bits in enumerate(plan.planes)]
    if not plan.integer and plan.spec.parts == 1:
        lines += decode_sides(plan, i)
    code = "uint8_t" if plan.integer else "float"
    lines += [f"{code}* to = buffer + {i * items};", "for (int64_t b = 0; b < blocks; ++b) {", *form.loads()]
    for part in range(plan.spec.parts):
        lines += ["{", *_part_sides(plan, width, i, part)]
        for step in range(form.steps):
            if plan.spec.parts == 1 or form.offset(step) // plan.part_cols == part:
                for e in range(form.vectors):
                    to = step * width * items + e * _digit_bytes(plan, width)
                    lines.append(f"{form.store}(to + {to}, {form.weight(step, e)});")
        lines.append("}")
    lines += [f"to += {form.steps * width * items};"]
    return [*lines, *(f"w{j} += {64 * bits};" for j, bits in enumerate(plan.planes)), "}", "}"]


def _part_sides(plan: Plan, width: int, i: int, part: int) -> list[str]:
    """What floats of one part of a block are decoded with."""
    if plan.integer or plan.spec.parts == 1:
        return []
    return [*scale_and_zero(plan, width, part_group(plan, "c", part), (i,)), *decode_sides(plan, i)]


def _work(plan: Plan) -> str:
    body = ["int64_t slot = n / pieces * kUnit;"]
    if plan.np in plan.widths:
        body += ["if (slot + kUnit <= kSlots) {", f"unit_{plan.np}(a, slot, t0, t1, room);", "continue;", "}"]
    if plan.slots % plan.unit:
        body += [f"for (; slot < kSlots; ++slot) unit_{plan.widths[-1]}(a, slot, t0, t1, room);"]
    return indent(pieces_of_work(plan, body))
