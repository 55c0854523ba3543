"""The kernel for many tokens: a chunk of a few panels is decoded once into a small buffer that stays in the first-level
cache, and a register tile of tokens x panels runs over it; sums of all chunks are kept in a buffer of partial results.
"""

from __future__ import annotations

from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.products import Products
from lowbit.codegen.cpp.sides import decode_sides, dispatch, indent, panel_of, scale_and_zero, start_value
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
    """Digits one after the other in the same accumulators; then scales and, if stored, offsets."""
    cells = [(m, i) for m in range(height) for i in range(width)]
    lines = [
        f"static void tile_{width}_{height}(const uint8_t* buffer, int64_t steps, const int8_t* x, "
        "const float* xs, const int32_t* xi, const float* xo, const F* s, const V* z, const F* o, float* y) {"
    ]
    lines += [f"const F s{i} = s[{i}];" for i in range(width)]
    lines += [f"const V z{i} = z[{i}];" for i in range(width) if plan.spec.fmt.zero]
    for m, i in cells:
        value = start_value(plan, i, f"xi[{m}]") if plan.spec.limbs == 1 else "vzero()"
        lines.append(f"V a{m}_{i} = {value};")
    for digit in range(plan.spec.limbs):
        if digit:
            lines += [f"a{m}_{i} = vadd(shl<8>(a{m}_{i}), {start_value(plan, i, f'xi[{m}]')});" for m, i in cells]
        lines += tile_pass(form, width, height, width, plan.token_stride, digit * plan.chunk_cols)
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
        f"memset(sums, 0, size_t(t1 - t0) * {width * 64});",
        "for (int64_t c = 0; c < kChunks; ++c) {",
        f"const int64_t blocks = c + 1 < kChunks ? kChunkBlocks : {plan.last_blocks};",
        *scale_and_zero(plan, width, "c / kGroupChunks"),
    ]
    for i in range(width):
        lines += _decode(plan, form, width, i)
    sides = ""
    if plan.integer:
        lines += _side_arrays(plan, width)
        sides = "a.xs + c * a.m + t, a.xi + c * a.m + t, a.xo + c * a.m + t, s, z, o, "
    x = f"(const {form.item}*)a.xq + (c * a.m + t) * kTokenStride"
    y = f"sums + (t - t0) * {width * 16}"
    lines += dispatch(
        plan.heights, "t0", "t1", lambda h: f"tile_{width}_{h}(buffer, blocks * {form.steps}, {x}, {sides}{y});"
    )
    lines += ["}", "for (int64_t t = t0; t < t1; ++t) {", f"const float* y = sums + (t - t0) * {width * 16};"]
    half = width // 2 if plan.silu else width
    for i in range(half):
        up = f", fload(y + {16 * (i + half)})" if plan.silu else ""
        lines.append(f"finish(a, {panel_of(plan, width, i)}, t, fload(y + {16 * i}){up});")
    return indent([*lines, "}", "}"])


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
    if not plan.integer:
        lines += decode_sides(plan, i)
    code = "uint8_t" if plan.integer else "float"
    lines += [f"{code}* to = buffer + {i * items};", "for (int64_t b = 0; b < blocks; ++b) {", *form.loads()]
    lines += [f"{form.store}(to + {step * width * items}, {form.weight(step)});" for step in range(form.steps)]
    lines += [f"to += {form.steps * width * items};"]
    return [*lines, *(f"w{j} += {64 * bits};" for j, bits in enumerate(plan.planes)), "}", "}"]


def _work(plan: Plan) -> str:
    body = ["int64_t slot = n / pieces * kUnit;"]
    if plan.np in plan.widths:
        body += ["if (slot + kUnit <= kSlots) {", f"unit_{plan.np}(a, slot, t0, t1, room);", "continue;", "}"]
    if plan.slots % plan.unit:
        body += [f"for (; slot < kSlots; ++slot) unit_{plan.widths[-1]}(a, slot, t0, t1, room);"]
    return indent(pieces_of_work(plan, body))
