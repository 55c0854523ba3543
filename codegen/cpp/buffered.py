"""The kernel for many tokens: a chunk of a few panels is decoded once into a small buffer that stays in the first-level
cache, and a register tile of tokens x panels runs over it; sums of all chunks are kept in a buffer of partial results.
"""

from __future__ import annotations

import math

from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.products import Products
from lowbit.codegen.cpp.sides import (
    decode_sides,
    dispatch,
    fetched,
    indent,
    panel_of,
    part_group,
    scale_and_zero,
    side_loads,
    start_value,
    units,
)
from lowbit.codegen.cpp.tiles import float_tile, pieces_of_work, tile_pass

__all__ = ["buffered_text"]

_FEW_SUMS = 8
"""Sums of a tile whose steps are so short that counting them shows; compilers make several of longer ones slower."""


def buffered_text(plan: Plan, form: Products) -> str:
    """All tile functions, and `work`, which runs one thread's share."""
    parts = [_tile(plan, form, width, height) for width in plan.widths for height in plan.heights]
    parts += [_unit(plan, form, width) for width in plan.widths]
    return "\n".join([*parts, _work(plan)])


def _tile(plan: Plan, form: Products, width: int, height: int) -> str:
    """`width` panels x `height` tokens over one decoded chunk, or several."""
    if plan.bf16:
        return _bf16_tile(plan, form, width, height)
    return _int_tile(plan, form, width, height) if plan.integer else float_tile(plan, form, width, height, width)


def _int_tile(plan: Plan, form: Products, width: int, height: int) -> str:
    """Sums of integers over one chunk, times the scales of weights and of activations, added to the results at `y`.

    Blocks of several scale groups are summed part by part, and these sums, scaled, in registers. Scales that all of a
    token's activations share wait for `_result`.
    """
    cells, once = [(m, i) for m in range(height) for i in range(width)], plan.scaled_once
    lines = [
        f"static void tile_{width}_{height}(const uint8_t* buffer, int64_t steps, const {form.item}* x, "
        "[[maybe_unused]] const float* xs, const int32_t* xi, const float* xo, [[maybe_unused]] int64_t stride, "
        "const F* s, const V* z, const F* o, float* y) {"
    ]
    if plan.spec.parts > 1:
        lines += [f"F t{m}_{i} = fzero();" for m, i in cells]
        lines += ["for (int64_t part = 0; part < kParts; ++part) {", *_exact_sums(plan, form, width, height)]
        lines += [f"t{m}_{i} = fma_(cvt(a{m}_{i}), s[{i}], t{m}_{i});" for m, i in cells]
        lines += [f"fstore({y}, fma_(fset1(xo[{m}]), o[{i}], fload({y})));" for m, i, y in _at(cells, width, plan)]
        lines += [f"buffer += steps * {width * 64}, x += {plan.part_cols}, xi += stride, xo += stride;"]
        lines += [f"s += {width};", *[f"z += {width};"] * plan.spec.fmt.zero, *[f"o += {width};"] * plan.shifts, "}"]
        for m, i, y in _at(cells, width):
            sum_ = f"fadd(t{m}_{i}, fload({y}))" if once else f"fma_(t{m}_{i}, fset1(xs[{m}]), fload({y}))"
            lines.append(f"fstore({y}, {sum_});")
        return indent([*lines, "}"])
    lines += _exact_sums(plan, form, width, height)
    for m, i, y in _at(cells, width):
        whole = f"cvt(a{m}_{i})" if once else f"fmul(cvt(a{m}_{i}), fset1(xs[{m}]))"
        sum_ = f"fma_({whole}, s[{i}], fload({y}))"
        lines.append(f"fstore({y}, {f'fma_(fset1(xo[{m}]), o[{i}], {sum_})' if plan.shifts else sum_});")
    return indent([*lines, "}"])


def _bf16_tile(plan: Plan, form: Products, width: int, height: int) -> str:
    """Sums of bfloat16 products, times the scales of weights unless they wait, added to the results at `y`."""
    cells = [(m, i) for m in range(height) for i in range(width)]
    lines = [
        f"static void tile_{width}_{height}(const uint8_t* buffer, int64_t steps, [[maybe_unused]] int64_t chunks, "
        f"const {form.item}* x, [[maybe_unused]] int64_t stride, [[maybe_unused]] const F* s, float* y) {{"
    ]
    sums, step = [f"F a{m}_{i} = fzero();" for m, i in cells], tile_pass(form, width, height, width, plan.token_stride)
    if plan.scaled_last:
        lines += [*sums, "for (int64_t chunk = 0; chunk < chunks; ++chunk) {", *step]
        lines += [f"buffer += steps * {width * 64}, x += stride;", "}"]
        return indent([*lines, *(f"fstore({y}, fadd(a{m}_{i}, fload({y})));" for m, i, y in _at(cells, width)), "}"])
    if plan.spec.parts > 1:
        lines.append("for (int64_t part = 0; part < kParts; ++part) {")
    lines += [*sums, *step, *(f"fstore({y}, fma_(a{m}_{i}, s[{i}], fload({y})));" for m, i, y in _at(cells, width))]
    if plan.spec.parts > 1:
        lines += [f"buffer += steps * {width * 64}, x += {plan.part_cols}, s += {width};", "}"]
    return indent([*lines, "}"])


def _at(cells: list[tuple[int, int]], width: int, plan: Plan | None = None) -> list[tuple[int, int, str]]:
    """Each cell with the address of its result; none for a plan without offsets."""
    return [(m, i, f"y + {(m * width + i) * 16}") for m, i in cells] if plan is None or plan.shifts else []


def _exact_sums(plan: Plan, form: Products, width: int, height: int) -> list[str]:
    """Digits one after the other in the same accumulators `a<token>_<panel>` (see `Plan.terms`)."""
    cells = [(m, i) for m in range(height) for i in range(width)]
    lines, before = [], plan.terms[0][0]
    for shift, d, e in plan.terms:
        if by := before - shift:
            lines += [f"a{m}_{i} = shl<{by}>(a{m}_{i});" for m, i in cells]
        starts = {(m, i): start_value(plan, f"z[{i}]", f"xi[{m}]") for m, i in cells}
        if shift == before:
            lines += [f"V a{m}_{i} = {'vzero()' if shift else starts[m, i]};" for m, i in cells]
        elif not shift:
            lines += [f"a{m}_{i} = vadd(a{m}_{i}, {starts[m, i]});" for m, i in cells]
        weights = e * _digit_bytes(plan, width)
        few = plan.words and width * height <= _FEW_SUMS
        together = math.gcd(4, form.steps // plan.spec.parts) if few else 1
        shorts = min((8, *plan.shorts)) if plan.shorts else 0
        lines += tile_pass(
            form, width, height, width, plan.token_stride, d * plan.chunk_cols, weights, shorts, together
        )
        before = shift
    return lines


def _unit(plan: Plan, form: Products, width: int) -> str:
    """One unit of work for tokens [t0, t1)."""
    code = "float" if plan.item == "float" else "uint8_t"
    lines = [
        f"static void unit_{width}(const Args& a, int64_t slot, int64_t t0, int64_t t1, uint8_t* room) {{",
        f"{code}* buffer = ({code}*)room;",
        f"float* sums = (float*)(room + {plan.code_bytes});",
        *units(plan, width),
        f"memset(sums, 0, size_t(t1 - t0) * {width * 64});",
        f"for (int64_t c = 0; c < kChunks; c += {plan.together}) {{",
        _blocks(plan),
    ]
    if plan.spec.parts == 1 and plan.item == "float":
        lines += scale_and_zero(plan, width, "c / kGroupChunks")
    for i in range(width):
        lines += _decode(plan, form, width, i)
    lines += ["{", *_tiles(plan, form, width), "}"]
    lines += ["}", "for (int64_t t = t0; t < t1; ++t) {", f"const float* y = sums + (t - t0) * {width * 16};"]
    half = width // 2 if plan.silu else width
    for i in range(half):
        up = f", {_result(plan, width, i + half)}" if plan.silu else ""
        lines.append(f"finish(a, {panel_of(plan, width, i)}, t, {_result(plan, width, i)}{up});")
    return indent([*lines, "}", "}"])


def _blocks(plan: Plan) -> str:
    """`blocks`: how many are decoded before tiles run over them."""
    if plan.together > 1:  # chunks of one block
        return f"const int64_t blocks = c + {plan.together} < kChunks ? {plan.together} : kChunks - c;"
    return f"const int64_t blocks = c + 1 < kChunks ? kChunkBlocks : {plan.last_blocks};"


def _result(plan: Plan, width: int, i: int) -> str:
    """Results of panel `i` and token `t`, with the scales that waited."""
    found = f"fload(y + {16 * i})"
    if plan.scaled_last:
        scale = f"u{i}" if plan.folded else side_loads(plan, panel_of(plan, width, i), i, "0")["s"][1]
        found = f"fmul({found}, {scale})"
    return f"fmul({found}, fset1(a.xs[t]))" if plan.scaled_once else found


def _tiles(plan: Plan, form: Products, width: int) -> list[str]:
    """The calls of tiles over the decoded chunk."""
    lines, sides, steps = [], "", f"blocks * {form.steps}"
    row, more = plan.input_row, ""
    if plan.bf16:
        lines += [] if plan.scaled_last else _side_arrays(plan, width)
        more = f"a.m * kTokenStride, {'nullptr' if plan.scaled_last else 's'}, "
        if plan.together > 1:
            steps = f"{form.steps}, blocks"
        else:
            steps = f"{steps}, 1" if plan.spec.parts == 1 else f"{form.steps // plan.spec.parts}, 1"
    if plan.integer:
        lines += _side_arrays(plan, width)
        at = f"{row} * kParts * a.m + t"
        sides = f"a.xs + {row} * a.m + t, a.xi + {at}, a.xo + {at}, a.m, s, z, o, "
        steps = str(form.steps // plan.spec.parts) if plan.spec.parts > 1 else steps
    x = f"(const {form.item}*)a.xq + ({row} * a.m + t) * kTokenStride"
    y = f"sums + (t - t0) * {width * 16}"
    calls = dispatch(plan.heights, "t0", "t1", lambda h: f"tile_{width}_{h}(buffer, {steps}, {x}, {sides}{more}{y});")
    if not plan.spec.double_chunks:
        return lines + calls
    head = ["for (int high = c < kDoubleChunks; high >= 0; --high) {", "const int64_t row = high ? kChunks + c : c;"]
    return [*lines, *head, *calls, "}"]


def _digit_bytes(plan: Plan, width: int) -> int:
    """Bytes of one digit of a decoded chunk."""
    return width * 16 * plan.chunk_cols


def _side_arrays(plan: Plan, width: int) -> list[str]:
    """`s`, `z` and `o`: scales, and zero points and offsets where they are stored, of all panels, part by part."""
    groups = [part_group(plan, "c", p) for p in range(plan.spec.parts)] if plan.spec.parts > 1 else ["c / kGroupChunks"]
    loads = [side_loads(plan, panel_of(plan, width, i), i, group) for group in groups for i in range(width)]
    out = []
    for side, type_ in (("s", "F"), ("z", "V"), ("o", "F")):
        values = ", ".join(load[side][1] for load in loads if side in load)
        out.append(f"const {type_} {side}[] = {{{values}}};" if values else f"const {type_}* {side} = nullptr;")
    return out


def _decode(plan: Plan, form: Products, width: int, i: int) -> list[str]:
    """Decode the chunk of panel `i` into the buffer, where the panels of a tile lie side by side."""
    items = 16 if plan.item == "float" else 64
    lines = ["{"]
    at = f"(({panel_of(plan, width, i)}) * kBlocks + c * kChunkBlocks)"
    lines += [f"const uint8_t* w{j} = a.plane[{j}] + {at} * {64 * bits};" for j, bits in enumerate(plan.planes)]
    if plan.item == "float" and plan.spec.parts == 1:
        lines += decode_sides(plan, i)
    code = "float" if plan.item == "float" else "uint8_t"
    lines += [
        f"{code}* to = buffer + {i * items};",
        "for (int64_t b = 0; b < blocks; ++b) {",
        *fetched(plan),
        *(load for _, load in form.loads()),
    ]
    for part in range(plan.spec.parts):
        lines += ["{", *_part_sides(plan, width, i, part)]
        for step in range(form.steps):
            if plan.spec.parts == 1 or form.offset(step) // plan.part_cols == part:
                lines += ["{", *form.before(step)]
                for e in range(form.vectors):
                    to = step * width * items + e * _digit_bytes(plan, width)
                    lines.append(f"{form.store}(to + {to}, {form.weight(step, e)});")
                lines.append("}")
        lines.append("}")
    lines += [f"to += {form.steps * width * items};"]
    return [*lines, *(f"w{j} += {64 * bits};" for j, bits in enumerate(plan.planes)), "}", "}"]


def _part_sides(plan: Plan, width: int, i: int, part: int) -> list[str]:
    """What floats of one part of a block are decoded with."""
    if plan.folded:
        chunk = "(c + b)" if plan.together > 1 else "c"
        group = part_group(plan, chunk, part) if plan.spec.parts > 1 else f"{chunk} / kGroupChunks"
        return [
            f"const F scale = load_side((const ST*)a.scale + (({panel_of(plan, width, i)}) * kGroups + {group}) * 16);"
        ]
    if plan.item != "float" or plan.spec.parts == 1:
        return []
    return [*scale_and_zero(plan, width, part_group(plan, "c", part), (i,)), *decode_sides(plan, i)]


def _work(plan: Plan) -> str:
    body = ["int64_t slot = n / pieces * kUnit;"]
    if plan.np in plan.widths:
        body += ["if (slot + kUnit <= kSlots) {", f"unit_{plan.np}(a, slot, t0, t1, room);", "continue;", "}"]
    if plan.slots % plan.unit:
        body += [f"for (; slot < kSlots; ++slot) unit_{plan.widths[-1]}(a, slot, t0, t1, room);"]
    return indent(pieces_of_work(plan, body))
