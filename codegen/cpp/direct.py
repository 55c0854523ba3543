"""The kernel for few tokens: weights are read once, decoded in registers and multiplied with every token at hand."""

from __future__ import annotations

import re
from collections.abc import Callable

from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.products import Products
from lowbit.codegen.cpp.sides import (
    decode_sides,
    dispatch,
    fetched,
    indent,
    panel_of,
    part_group,
    pointers,
    scale_and_zero,
    side_prefetch,
    slots_of,
    start_value,
    units,
)

__all__ = [
    "Chunk",
    "activations",
    "block_at",
    "blocks_loop",
    "collect",
    "direct_chunk",
    "direct_text",
    "group_sums",
    "jump",
]

Chunk = Callable[[Plan, Products, int, int], list[str]]
"""Statements for a chunk of whole groups: its sums for a tile of (width, height), added to the results."""


def direct_text(plan: Plan, form: Products, chunk: Chunk) -> str:
    """All tile functions, and `work`, which runs units [u0, u1)."""
    tiles = [_tile(plan, form, chunk, width, height) for width in plan.widths for height in plan.heights]
    return "\n".join([*tiles, _work(plan)])


def _tile(plan: Plan, form: Products, chunk: Chunk, width: int, height: int) -> str:
    """One tile: `width` panels x `height` tokens, over all of K."""
    cells = [(i, m) for i in range(width) for m in range(height)]
    lines = [f"static void direct_{width}_{height}(const Args& a, int64_t slot, int64_t t) {{"]
    lines += [*pointers(plan, width), *units(plan, width)]
    lines += [f"F y{i}_{m} = fzero();" for i, m in cells]
    lines += _parts(plan, form, width, height) if plan.spec.parts > 1 else _groups(plan, form, chunk, width, height)
    return indent([*lines, *_finish(plan, width, height), "}"])


def _groups(plan: Plan, form: Products, chunk: Chunk, width: int, height: int) -> list[str]:
    """The loop over groups of whole chunks."""
    cells = [(i, m) for i in range(width) for m in range(height)]
    lines = ["int64_t c = 0;", "for (int64_t g = 0; g < kGroups; ++g) {", *scale_and_zero(plan, width, "g")]
    lines += [fetch for i in range(width) for fetch in side_prefetch(plan, width, i, "g")]
    if plan.group_chunks > 1:
        if plan.carried:
            lines += [sum_ for i in range(width) for sum_ in _sums(plan, form, i, height)]
        elif form.late:
            lines += [f"F t{i}_{m} = fzero();" for i, m in cells]
        lines += [f"float g{m} = 0.0f;" for m in range(height) if plan.shifts]
        lines += [
            "const int64_t end = c + kGroupChunks < kChunks ? c + kGroupChunks : kChunks;",
            "for (; c < end; ++c) {",
        ]
    lines += _rounds(plan, width, chunk(plan, form, width, height))
    if plan.group_chunks > 1:
        lines.append("}")
        if plan.carried:
            lines += [line for i, m in cells for line in collect(plan, form, i, m)]
        elif form.late:
            lines += [f"y{i}_{m} = fma_(t{i}_{m}, s{i}, y{i}_{m});" for i, m in cells]
        lines += [f"y{i}_{m} = fma_(fset1(g{m}), o{i}, y{i}_{m});" for i, m in cells if plan.shifts]
    else:
        lines.append("++c;")
    return [*lines, "}"]


def _parts(plan: Plan, form: Products, width: int, height: int) -> list[str]:
    """The loop over blocks of several groups: a block is a chunk, and every part of it a sum with its own scale."""
    lines = ["for (int64_t c = 0; c < kChunks; ++c) {", *activations(plan, form), *jump(plan, width)]
    for i in range(width):
        lines += ["{", *block_at(plan, i), *(load for _, load in form.loads())]
        for part in range(plan.spec.parts):
            lines += ["{", *scale_and_zero(plan, width, part_group(plan, "c", part), (i,))]
            lines += _sums(plan, form, i, height, part)
            lines += [] if form.late else decode_sides(plan, i)
            for step in range(form.steps):
                if form.offset(step) // plan.part_cols == part:
                    lines += _step(plan, form, i, height, step)
            for m in range(height):
                lines += collect(plan, form, i, m, part)
            lines.append("}")
        lines += [*(f"p{i}w{j} += {64 * bits};" for j, bits in enumerate(plan.planes)), "}"]
    return [*lines, "}"]


def _digits(plan: Plan, form: Products, height: int) -> list[tuple[int, int, int]]:
    """(token, activation digit, weight vector) of every running sum of one panel; digit 0 is the high one of two."""
    limbs = range(max(1, plan.digits))
    return [(m, d, e) for m in range(height) for d in limbs for e in range(form.vectors)]


def activations(plan: Plan, form: Products) -> list[str]:
    """Pointers to the chunk's activations and what belongs to them."""
    row = plan.input_row
    at = f"{row} * a.m + t" if plan.spec.parts == 1 else "c * kParts * a.m + t"
    return [
        f"const {form.item}* x = (const {form.item}*)a.xq + ({row} * a.m + t) * kTokenStride;",
        *([f"const float* xs = a.xs + {row} * a.m + t;", f"const int32_t* xi = a.xi + {at};"] if plan.integer else []),
        *([f"const float* xo = a.xo + {at};"] if plan.shifts else []),
    ]


def _of_part(m: int, part: int) -> str:
    """Index of a token's number of a part."""
    return f"{m} + {part} * a.m" if part else str(m)


def _sums(plan: Plan, form: Products, i: int, height: int, part: int = 0) -> list[str]:
    """Accumulators of panel `i`. One of the lowest digits' starts from the zero point's share, which those that are
    carried from chunk to chunk are given in each (see `_shares`)."""
    last = (plan.digits - 1, form.vectors - 1, 0)
    lines = []
    for m, d, e in _digits(plan, form, height):
        if plan.shorts and e != last[1]:
            continue  # 16-bit sums of all digits of weights are added to one of 32 bits
        for k in range(len(form.shifts)):
            starts = plan.integer and not (form.unsorted or plan.carried) and (d, e, k) == last
            zero = "vzero()" if plan.integer else "fzero()"
            value = start_value(plan, f"z{i}", f"xi[{_of_part(m, part)}]") if starts else zero
            lines.append(f"{form.total} a{i}_{m}_{d}_{e}_{k} = {value};")
    return lines


def _shares(plan: Plan, form: Products, i: int, height: int) -> list[str]:
    """The chunk's shares of zero points, added to accumulators that are carried."""
    d, e = plan.digits - 1, form.vectors - 1
    lines = []
    for m in range(height):
        acc = f"a{i}_{m}_{d}_{e}_0"
        lines.append(f"{acc} = vadd({acc}, {start_value(plan, f'z{i}', f'xi[{m}]')});")
    return lines


def _short_sums(plan: Plan, form: Products, i: int, height: int) -> list[str]:
    """Sums of 16-bit numbers of panel `i`."""
    return [f"V h{i}_{m}_{d}_{e}_{k} = vzero();" for m, d, e, k in _short_digits(plan, form, height)]


def _short_digits(plan: Plan, form: Products, height: int) -> list[tuple[int, int, int, int]]:
    """(token, activation digit, weight vector, accumulator) of every such sum of one panel."""
    sums = _digits(plan, form, height) if plan.shorts else []
    return [(*sum_, k) for sum_ in sums for k in range(len(form.shifts))]


def _lengthen(plan: Plan, form: Products, i: int, height: int, step: int) -> list[str]:
    """Adds sums of 16-bit numbers to those of 32 bits, after the step of a block that may be their last."""
    lines = []
    for m, d, e, k in _short_digits(plan, form, height):
        fit, factor = plan.shorts[e], 1 << plan.weight_shifts[e]
        of, to = f"h{i}_{m}_{d}_{e}_{k}", f"a{i}_{m}_{d}_{form.vectors - 1}_{k}"
        blocks, sums = fit // form.steps, [f"{to} = add_pairs<{factor}>({to}, {of});", f"{of} = vzero();"]
        if (step + 1) % min(fit, form.steps) == 0:
            lines += sums if blocks < 2 else [f"if ((b + 1) % {blocks} == 0 || b + 1 == blocks) {{", *sums, "}"]
    return lines


def direct_chunk(plan: Plan, form: Products, width: int, height: int, in_turn: bool = False) -> list[str]:
    """Sum over one chunk, then add it to the running result with its scales. in_turn: of several panels and tokens,
    steps of all panels together, for which registers have to hold all sums beside what a step decodes."""
    lines = [*activations(plan, form), *jump(plan, width)]
    for i in range(width):
        lines += (_shares if plan.carried else _sums)(plan, form, i, height)
        lines += _short_sums(plan, form, i, height)
    lines += blocks_loop(plan)
    lines += (_steps_in_turn if in_turn and width > 1 and height > 1 else _panels)(plan, form, width, height)
    for i in range(width):
        lines += [f"p{i}w{j} += {64 * bits};" for j, bits in enumerate(plan.planes)]
    lines += ["x += 32;", "}"]
    cells = [(i, m) for i in range(width) for m in range(height)]
    lines += [line for i, m in cells if not plan.carried for line in collect(plan, form, i, m)]
    return [*lines, *group_sums(plan, height)]


def _panels(plan: Plan, form: Products, width: int, height: int) -> list[str]:
    """One block of one panel after the other."""
    lines = []
    for i in range(width):
        lines += ["{", *block_at(plan, i), *([] if form.late else decode_sides(plan, i))]
        steps = [[*_step(plan, form, i, height, s), *_lengthen(plan, form, i, height, s)] for s in range(form.steps)]
        lines += [*_loaded_when_read(form, steps), "}"]
    return lines


def _steps_in_turn(plan: Plan, form: Products, width: int, height: int) -> list[str]:
    """The same step of all panels, then the next one: each broadcasts every token's activations, and compilers share
    what lies close together. What lies a panel apart they keep, more than registers hold."""
    lines = []
    for i in range(width):
        lines += ["{", *block_at(plan, i), "}"]
    for s in range(form.steps):
        for i in range(width):
            lines += ["{", *(f"const uint8_t* w{j} = p{i}w{j};" for j in range(len(plan.planes)))]
            lines += [] if form.late else decode_sides(plan, i)
            step = [*_step(plan, form, i, height, s), *_lengthen(plan, form, i, height, s)]
            lines += [*_loaded_when_read(form, [step]), "}"]
    return lines


def blocks_loop(plan: Plan) -> list[str]:
    """The head of the loop over the chunk's `blocks` blocks."""
    short = plan.spec.chunk_blocks - plan.last_blocks
    last = f" - (c + 1 == kChunks) * {short}" if short else ""
    return [f"const int blocks = kChunkBlocks{last};", "#pragma GCC unroll 1", "for (int b = 0; b < blocks; ++b) {"]


def group_sums(plan: Plan, height: int) -> list[str]:
    """What an offset is multiplied with: the sum of the group's activations."""
    return [f"g{m} += xo[{m}];" for m in range(height) if plan.shifts and plan.group_chunks > 1]


def _rounds(plan: Plan, width: int, chunk: list[str]) -> list[str]:
    """A chunk's statements, once more for the high digits of activations where it has two: with the same weights."""
    if not plan.spec.double_chunks:
        return chunk
    back = [f"p{i}w{j} -= high * blocks * {64 * bits};" for i in range(width) for j, bits in enumerate(plan.planes)]
    head = ["for (int high = c < kDoubleChunks; high >= 0; --high) {", "const int64_t row = high ? kChunks + c : c;"]
    return [*head, *chunk, *back, "}"]


def _loaded_when_read(form: Products, steps: list[list[str]]) -> list[str]:
    """A block's steps, each behind the loads of what it is the first to read: what is loaded before takes registers."""
    lines, left = [], dict(form.loads())
    for step in steps:
        read = set(re.findall(r"\w+", " ".join(step)))
        for name, load in reversed(left.items()):
            read |= set(re.findall(r"\w+", load)) if name in read else set()
        lines += [left.pop(name) for name in tuple(left) if name in read]
        lines += step
    return lines


def block_at(plan: Plan, i: int) -> list[str]:
    """Where the words of one block of one panel are; fetches those of another."""
    return [*(f"const uint8_t* w{j} = p{i}w{j};" for j in range(len(plan.planes))), *fetched(plan, "jump + ")]


def jump(plan: Plan, width: int) -> list[str]:
    """`jump`: blocks to add to what is fetched ahead where that lies behind a panel's end: then the panel of the next
    unit is meant, not the one that another stream of this unit has read."""
    if not plan.ahead:
        return []
    blocks = (slots_of(plan, width) - 1) * plan.spec.blocks
    return [f"const int64_t jump = c * kChunkBlocks + {plan.ahead} >= kBlocks ? {blocks} : 0;"]


def _step(plan: Plan, form: Products, i: int, height: int, step: int) -> list[str]:
    """One step of one panel: every weight vector times every token's digits."""
    lines = ["{", *form.before(step)]
    lines += [f"const {form.vector} v{e} = {form.weight(step, e)};" for e in range(form.vectors)]
    for m, d, e in _digits(plan, form, height):
        x = form.activation("x", str(m * plan.token_stride + d * plan.chunk_cols + form.offset(step)))
        acc = f"{form.sums}{i}_{m}_{d}_{e}_{form.accumulator(step)}"
        lines.append(f"{acc} = {form.multiply(acc, f'v{e}', x)};")
    return [*lines, "}"]


def collect(plan: Plan, form: Products, i: int, m: int, part: int = 0) -> list[str]:
    """Add the sums of panel `i`, token `m` to the result."""
    add = "vadd" if plan.integer else "fadd"

    def total(d: int, e: int) -> str:
        found, before = "", 0
        for k, shift in reversed(list(enumerate(form.shifts))):
            one = f"a{i}_{m}_{d}_{e}_{k}"
            moved = f"sra<{before - shift}>({found})" if before > shift else found
            found, before = f"{add}({moved}, {one})" if found else one, shift
        return found

    if not plan.integer:
        if not form.late:
            return [f"y{i}_{m} = fadd(y{i}_{m}, {total(0, 0)});"]
        halves = f"({total(0, 0)}, {total(0, form.vectors - 1)})"
        sums = f"fadd(evens{halves}, odds{halves})" if form.vectors > 1 else total(0, 0)
        late = f"t{i}_{m} = fadd(t{i}_{m}, {sums});"
        return [late if plan.group_chunks > 1 else f"y{i}_{m} = fma_({sums}, s{i}, y{i}_{m});"]
    if form.unsorted:
        start = start_value(plan, f"z{i}", f"xi[{_of_part(m, part)}]")
        exact = f"vadd(sorted_sums({total(0, 0)}, {total(0, 1)}), {start})"
    else:
        exact, before = "", 0
        for shift, d, e in plan.terms:
            if plan.shorts and e + 1 < form.vectors:
                continue  # part of the last one's sum
            exact = f"vadd(shl<{before - shift}>({exact}), {total(d, e)})" if exact else total(d, e)
            before = shift
    once, scale = plan.scaled_once, f"fset1(xs[{m}])"
    if plan.group_chunks > 1 and not plan.carried:
        t = f"fadd(t{i}_{m}, cvt({exact}))" if once else f"fma_(cvt({exact}), {scale}, t{i}_{m})"
        return [f"t{i}_{m} = {t};"]
    sum_ = f"cvt({exact})" if once else f"fmul(cvt({exact}), {scale})"
    shifted = f"y{i}_{m} = fma_(fset1(xo[{_of_part(m, part)}]), o{i}, y{i}_{m});"
    return [
        f"y{i}_{m} = fma_({sum_}, s{i}, y{i}_{m});",
        *([shifted] if plan.shifts and plan.group_chunks == 1 else []),
    ]


def _finish(plan: Plan, width: int, height: int) -> list[str]:
    def result(i: int, m: int) -> str:
        return f"fmul(y{i}_{m}, fset1(a.xs[t + {m}]))" if plan.scaled_once else f"y{i}_{m}"

    lines, half = [], width // 2 if plan.silu else width
    for i in range(half):
        for m in range(height):
            up = f", {result(i + half, m)}" if plan.silu else ""
            lines.append(f"finish(a, {panel_of(plan, width, i)}, t + {m}, {result(i, m)}{up});")
    return lines


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
