"""The kernel for many tokens: a chunk of a few panels is decoded once into a small buffer that stays in the first-level
cache, and a register tile of tokens x panels runs over it; sums of all chunks are kept in a buffer of partial results.
"""

from __future__ import annotations

from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.products import Products
from lowbit.codegen.cpp.sides import dispatch, indent, panel_of, scale_and_zero, start_value

__all__ = ["buffered_text"]


def buffered_text(plan: Plan, form: Products) -> str:
    """All tile functions, and `work`, which runs one thread's share."""
    parts = [_tile(plan, form, width, height) for width in plan.widths for height in plan.heights]
    parts += [_unit(plan, form, width) for width in plan.widths]
    return "\n".join([*parts, _work(plan)])


def _tile(plan: Plan, form: Products, width: int, height: int) -> str:
    """`width` panels x `height` tokens over one decoded chunk; digits one after the other in the same accumulators."""
    cells = [(m, i) for m in range(height) for i in range(width)]
    sides = ", const F* s, const V* z" if plan.integer else ""
    quantized = f"const float* xs, const int32_t* xi{sides}, " if plan.integer else ""
    lines = [
        f"static void tile_{width}_{height}(const {_buffer(plan)}* buffer, int64_t steps, const {form.item}* x, "
        f"{quantized}float* y) {{"
    ]
    if plan.integer:
        lines += [f"const F s{i} = s[{i}];" for i in range(width)]
        if plan.spec.fmt.zero:
            lines += [f"const V z{i} = z[{i}];" for i in range(width)]
    single = plan.spec.limbs == 1
    for m, i in cells:
        value = start_value(plan, i, f"xi[{m}]") if single else "vzero()" if plan.integer else "fzero()"
        lines.append(f"{form.vector} a{m}_{i} = {value};")
    for digit in range(max(1, plan.spec.limbs)):
        if digit:
            lines += [f"a{m}_{i} = vadd(shl<8>(a{m}_{i}), {start_value(plan, i, f'xi[{m}]')});" for m, i in cells]
        lines += _pass(plan, form, width, height, digit)
    for m, i in cells:
        at = f"y + {(m * width + i) * 16}"
        sum_ = (
            f"fma_(fmul(cvt(a{m}_{i}), fset1(xs[{m}])), s{i}, fload({at}))"
            if plan.integer
            else f"fadd(a{m}_{i}, fload({at}))"
        )
        lines.append(f"fstore({at}, {sum_});")
    return indent([*lines, "}"])


def _buffer(plan: Plan) -> str:
    return "uint8_t" if plan.integer else "float"


def _pass(plan: Plan, form: Products, width: int, height: int, digit: int) -> list[str]:
    """All steps of a chunk for one digit of the activations."""
    items, per_step = (64, 4) if plan.integer else (16, 1)
    lines = ["#pragma GCC unroll 1", "for (int64_t k = 0; k < steps; ++k) {"]
    lines += [f"const {form.vector} w{i} = {form.load}(buffer + (k * {width} + {i}) * {items});" for i in range(width)]
    for m in range(height):
        x = form.activation("x", f"{m * plan.token_stride + digit * plan.chunk_cols} + k * {per_step}")
        lines += ["{", f"const {form.vector} v = {x};"]
        lines += [f"a{m}_{i} = {form.multiply(f'a{m}_{i}', f'w{i}', 'v')};" for i in range(width)]
        lines.append("}")
    return [*lines, "}"]


def _unit(plan: Plan, form: Products, width: int) -> str:
    """One unit of work for tokens [t0, t1)."""
    lines = [
        f"static void unit_{width}(const Args& a, int64_t slot, int64_t t0, int64_t t1, uint8_t* room) {{",
        f"{_buffer(plan)}* buffer = ({_buffer(plan)}*)room;",
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
        names = ", ".join(f"s{i}" for i in range(width))
        zeros = ", ".join(f"z{i}" for i in range(width)) if plan.spec.fmt.zero else ""
        lines += [f"const F s[] = {{{names}}};", f"const V* z = {'pairs' if zeros else 'nullptr'};"]
        if zeros:
            lines.insert(-1, f"const V pairs[] = {{{zeros}}};")
        sides = "a.xs + c * a.m + t, a.xi + c * a.m + t, s, z, "
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


def _decode(plan: Plan, form: Products, width: int, i: int) -> list[str]:
    """Decode the chunk of panel `i` into the buffer, where the panels of a tile lie side by side."""
    items = 64 if plan.integer else 16
    lines = ["{"]
    at = f"(({panel_of(plan, width, i)}) * kBlocks + c * kChunkBlocks)"
    lines += [f"const uint8_t* w{j} = a.plane[{j}] + {at} * {64 * bits};" for j, bits in enumerate(plan.planes)]
    if not plan.integer:
        lines += [f"const F scale = s{i};", *([f"const F zero = z{i};"] if plan.spec.fmt.zero else [])]
    lines += [f"{_buffer(plan)}* to = buffer + {i * items};", "for (int64_t b = 0; b < blocks; ++b) {", *form.loads()]
    lines += [f"{form.store}(to + {step * width * items}, {form.weight(step)});" for step in range(form.steps)]
    lines += [f"to += {form.steps * width * items};"]
    return [*lines, *(f"w{j} += {64 * bits};" for j, bits in enumerate(plan.planes)), "}", "}"]


def _work(plan: Plan) -> str:
    """Units x token blocks, split evenly; the token blocks of a unit are neighbours, so its weights stay in cache."""
    lines = [
        "static void work(const Args& a, int part, int parts, uint8_t* room) {",
        f"const int64_t pieces = (a.m + {plan.tokens - 1}) / {plan.tokens}, items = kUnits * pieces;",
        f"const int64_t each = ((a.m + pieces - 1) / pieces + {plan.tile_m - 1}) / {plan.tile_m} * {plan.tile_m};",
        "for (int64_t n = items * part / parts; n < items * (part + 1) / parts; ++n) {",
        "int64_t slot = n / pieces * kUnit;",
        "const int64_t t0 = n % pieces * each, t1 = t0 + each < a.m ? t0 + each : a.m;",
        "if (t0 >= t1) continue;",
    ]
    if plan.np in plan.widths:
        lines += ["if (slot + kUnit <= kSlots) {", f"unit_{plan.np}(a, slot, t0, t1, room);", "continue;", "}"]
    if plan.slots % plan.unit:
        lines += [f"for (; slot < kSlots; ++slot) unit_{plan.widths[-1]}(a, slot, t0, t1, room);"]
    return indent([*lines, "}", "}"])
