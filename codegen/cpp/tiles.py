"""Register tiles of kernels for many tokens: tokens x panels of 16 rows, over a decoded chunk in a buffer."""

from __future__ import annotations

from lowbit.codegen.cpp.plan import KernelPlan
from lowbit.codegen.cpp.products import Products
from lowbit.codegen.cpp.sides import indent

__all__ = ["float_tile", "pieces_of_work", "tile_pass"]


def tile_pass(
    form: Products,
    width: int,
    height: int,
    stride: int,
    token_stride: int,
    digit_at: int = 0,
    weights_at: int = 0,
    shorts: int = 0,
    together: int = 1,
) -> list[str]:
    """All steps of a chunk: `a<token>_<panel> += weights * activations`, panels side by side in rows of `stride`.

    token_stride: elements from one token's activations to the next; digit_at, weights_at: from the first activation
    and from the first weight to those used here; shorts: steps whose pairs of products are added up as 16-bit numbers,
    `h<token>_<panel>`, before they are added to the sums; 0 for none. together: steps taken at a time, of which there
    is a multiple, so that counting them costs less.
    """
    items, per_step = 16 if form.item == "float" else 64, 32 // form.steps
    cells = [f"{m}_{i}" for m in range(height) for i in range(width)]
    together = shorts or together
    lines = ["#pragma GCC unroll 1", f"for (int64_t k = 0; k < steps;{'' if together > 1 else ' ++k'}) {{"]
    lines += [f"V h{cell} = vzero();" for cell in cells if shorts]
    if together > 1:
        lines += [f"#pragma GCC unroll {together}", f"for (int i = 0; i < {together}; ++i, ++k) {{"]
    lines += [
        f"const {form.vector} w{i} = kept({form.load}(buffer + (k * {stride} + {i}) * {items} + {weights_at}));"
        for i in range(width)
    ]
    for m in range(height):
        x = form.activation("x", f"{m * token_stride + digit_at} + k * {per_step}")
        lines += ["{", f"const {form.vector} v = {x};"]
        sums = [f"{form.sums if shorts else 'a'}{m}_{i}" for i in range(width)]
        lines += [f"{sum_} = {form.multiply(sum_, f'w{i}', 'v')};" for i, sum_ in enumerate(sums)]
        lines.append("}")
    lines += ["}"] if together > 1 else []
    lines += [f"a{cell} = add_pairs(a{cell}, h{cell});" for cell in cells if shorts]
    return [*lines, "}"]


def float_tile(plan: KernelPlan, form: Products, width: int, height: int, stride: int) -> str:
    """`tile_<width>_<height>(buffer, steps, x, y)`: adds the chunk's products to the partial sums at `y`."""
    cells = [(m, i) for m in range(height) for i in range(width)]
    lines = [f"static void tile_{width}_{height}(const float* buffer, int64_t steps, const float* x, float* y) {{"]
    lines += [f"F a{m}_{i} = fzero();" for m, i in cells]
    lines += tile_pass(form, width, height, stride, plan.token_stride)
    for m, i in cells:
        at = f"y + {(m * stride + i) * 16}"
        lines.append(f"fstore({at}, fadd(a{m}_{i}, fload({at})));")
    return indent([*lines, "}"])


def pieces_of_work(plan: KernelPlan, body: list[str]) -> list[str]:
    """`work`: units x token blocks, split evenly; the token blocks of a unit are neighbours, so its weights stay in
    cache. `body` runs unit `n / pieces` for tokens [t0, t1)."""
    return [
        "static void work(const Args& a, int part, int parts, uint8_t* room) {",
        f"const int64_t pieces = (a.m + {plan.tokens - 1}) / {plan.tokens}, items = kUnits * pieces;",
        f"const int64_t each = ((a.m + pieces - 1) / pieces + {plan.tile_m - 1}) / {plan.tile_m} * {plan.tile_m};",
        "for (int64_t n = items * part / parts; n < items * (part + 1) / parts; ++n) {",
        "const int64_t t0 = n % pieces * each, t1 = t0 + each < a.m ? t0 + each : a.m;",
        "if (t0 >= t1) continue;",
        *body,
        "}",
        "}",
    ]
