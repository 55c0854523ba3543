"""The kernel for few tokens: weights are read once, decoded in registers and multiplied with every token at hand."""

from __future__ import annotations

from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.products import Products
from lowbit.codegen.cpp.sides import decode_sides, dispatch, indent, panel_of, pointers, scale_and_zero, start_value

__all__ = ["direct_text"]


def direct_text(plan: Plan, form: Products) -> str:
    """All tile functions, and `work`, which runs units [u0, u1)."""
    tiles = [_tile(plan, form, width, height) for width in plan.widths for height in plan.heights]
    return "\n".join([*tiles, _work(plan)])


def _tile(plan: Plan, form: Products, width: int, height: int) -> str:
    """One tile: `width` panels x `height` tokens, over all of K."""
    cells = [(i, m) for i in range(width) for m in range(height)]
    lines = [f"static void direct_{width}_{height}(const Args& a, int64_t slot, int64_t t) {{"]
    lines += pointers(plan, width)
    lines += [f"F y{i}_{m} = fzero();" for i, m in cells]
    lines += ["int64_t c = 0;", "for (int64_t g = 0; g < kGroups; ++g) {"]
    lines += scale_and_zero(plan, width, "g")
    if plan.group_chunks > 1:
        if plan.integer:
            lines += [f"F t{i}_{m} = fzero();" for i, m in cells]
            lines += [f"float g{m} = 0.0f;" for m in range(height) if plan.shifts]
        lines += [
            "const int64_t end = c + kGroupChunks < kChunks ? c + kGroupChunks : kChunks;",
            "for (; c < end; ++c) {",
        ]
    lines += _chunk(plan, form, width, height)
    if plan.group_chunks > 1:
        lines.append("}")
        if plan.integer:
            lines += [f"y{i}_{m} = fma_(t{i}_{m}, s{i}, y{i}_{m});" for i, m in cells]
            lines += [f"y{i}_{m} = fma_(fset1(g{m}), o{i}, y{i}_{m});" for i, m in cells if plan.shifts]
    else:
        lines.append("++c;")
    lines.append("}")
    return indent([*lines, *_finish(plan, width, height), "}"])


def _sums(plan: Plan, height: int) -> list[tuple[int, int]]:
    """(token, digit) of every running sum of one panel; digit 0 is the high one when there are two."""
    return [(m, d) for m in range(height) for d in range(max(1, plan.spec.limbs))]


def _chunk(plan: Plan, form: Products, width: int, height: int) -> list[str]:
    """Sum over one chunk, then add it to the running result with its scales."""
    last = (
        ""
        if plan.last_blocks == plan.spec.chunk_blocks
        else f" - (c + 1 == kChunks) * {plan.spec.chunk_blocks - plan.last_blocks}"
    )
    lines = [
        f"const {form.item}* x = (const {form.item}*)a.xq + (c * a.m + t) * kTokenStride;",
        *(["const float* xs = a.xs + c * a.m + t;", "const int32_t* xi = a.xi + c * a.m + t;"] if plan.integer else []),
        *(["const float* xo = a.xo + c * a.m + t;"] if plan.shifts else []),
    ]
    for i in range(width):
        for m, d in _sums(plan, height):
            for k in range(plan.accs):
                # The low digit's first accumulator starts from the zero point's share.
                starts = plan.integer and d == plan.spec.limbs - 1 and k == 0
                value = start_value(plan, i, f"xi[{m}]") if starts else "vzero()" if plan.integer else "fzero()"
                lines.append(f"{form.vector} a{i}_{m}_{d}_{k} = {value};")
    lines += [f"const int blocks = kChunkBlocks{last};", "#pragma GCC unroll 1", "for (int b = 0; b < blocks; ++b) {"]
    for i in range(width):
        lines += _block(plan, form, i, height)
    lines += ["x += 32;", "}"]
    for i in range(width):
        for m in range(height):
            lines += _collect(plan, i, m)
    # What an offset is multiplied with: the sum of the group's activations.
    return [*lines, *(f"g{m} += xo[{m}];" for m in range(height) if plan.shifts and plan.group_chunks > 1)]


def _block(plan: Plan, form: Products, i: int, height: int) -> list[str]:
    """One 32-column block of one panel."""
    lines = ["{", *(f"const uint8_t* w{j} = p{i}w{j};" for j in range(len(plan.planes)))]
    if not plan.integer:
        lines += decode_sides(plan, i)
    if plan.prefetch:
        lines += [
            f"prefetch(w{j} + {plan.prefetch * bits // sum(plan.planes) // 64 * 64 + 64 * v});"
            for j, bits in enumerate(plan.planes)
            for v in range(bits)
        ]
    lines += form.loads()
    for step in range(form.steps):
        lines += ["{", f"const {form.vector} w = {form.weight(step)};"]
        for m, d in _sums(plan, height):
            x = form.activation("x", str(m * plan.token_stride + d * plan.chunk_cols + form.offset(step)))
            acc = f"a{i}_{m}_{d}_{step % plan.accs}"
            lines.append(f"{acc} = {form.multiply(acc, 'w', x)};")
        lines.append("}")
    return [*lines, *(f"p{i}w{j} += {64 * bits};" for j, bits in enumerate(plan.planes)), "}"]


def _collect(plan: Plan, i: int, m: int) -> list[str]:
    """Add the sums of panel `i`, token `m` to the result."""
    if not plan.integer:
        total = f"a{i}_{m}_0_0"
        for k in range(1, plan.accs):
            total = f"fadd({total}, a{i}_{m}_0_{k})"
        return [f"y{i}_{m} = fadd(y{i}_{m}, {total});"]
    digits = []
    for d in range(plan.spec.limbs):
        total = f"a{i}_{m}_{d}_0"
        for k in range(1, plan.accs):
            total = f"vadd({total}, a{i}_{m}_{d}_{k})"
        digits.append(total)
    total = digits[0] if len(digits) == 1 else f"vadd(shl<8>({digits[0]}), {digits[1]})"
    if plan.group_chunks > 1:
        return [f"t{i}_{m} = fma_(cvt({total}), fset1(xs[{m}]), t{i}_{m});"]
    shift = [f"y{i}_{m} = fma_(fset1(xo[{m}]), o{i}, y{i}_{m});"] if plan.shifts else []
    return [f"y{i}_{m} = fma_(fmul(cvt({total}), fset1(xs[{m}])), s{i}, y{i}_{m});", *shift]


def _finish(plan: Plan, width: int, height: int) -> list[str]:
    if plan.silu:
        half = width // 2
        return [
            f"finish(a, {panel_of(plan, width, i)}, t + {m}, y{i}_{m}, y{i + half}_{m});"
            for i in range(half)
            for m in range(height)
        ]
    return [f"finish(a, {panel_of(plan, width, i)}, t + {m}, y{i}_{m});" for i in range(width) for m in range(height)]


def _work(plan: Plan) -> str:
    lines = ["static void work(const Args& a, int part, int parts, uint8_t*) {"]
    lines += ["for (int64_t u = kUnits * part / parts; u < kUnits * (part + 1) / parts; ++u) {"]
    lines += ["int64_t slot = u * kUnit;"]
    full = plan.np in plan.widths
    if full:
        lines += ["if (slot + kUnit <= kSlots) {"]
        lines += dispatch(plan.heights, "0", "a.m", lambda h: f"direct_{plan.np}_{h}(a, slot, t);")
        lines += ["continue;", "}"]
    if plan.slots % plan.unit:
        width = plan.widths[-1]
        lines += ["for (; slot < kSlots; ++slot) {"]
        lines += dispatch(plan.heights, "0", "a.m", lambda h: f"direct_{width}_{h}(a, slot, t);")
        lines += ["}"]
    return indent([*lines, "}", "}"])
