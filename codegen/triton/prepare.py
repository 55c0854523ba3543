"""The kernel that makes activations ready: in the weight's order of columns, and rounded.

One program per token and group of activations that share a scale; it goes over the group in tiles, first for the
scale, then to round. For integer products it leaves int8 levels in packed columns, a scale and a sum per step of the
main kernel; for products of floats, numbers in x's own type. Rounding is to nearest, ties to even, as in
`ActivationFormat`: adding and taking away 1.5 * 2**23 spacings does that.
"""

from __future__ import annotations

from lowbit.codegen.triton.frame import BODY, LOOP, TRITON_TYPES
from lowbit.codegen.triton.tiles import Tiles
from lowbit.quantizers.formats import FloatElement
from lowbit.quantizers.formats.activation import WIDE_TOPS

__all__ = ["needs_preparing", "prepare_args", "prepare_body"]

_MAGIC = 12582912.0
_TILE = 4096
"""Columns of a tile at most."""


def needs_preparing(t: Tiles) -> bool:
    """Whether the main kernel reads what this one leaves, instead of x itself."""
    return t.integer or t.spec.fmt.ordered or t.spec.rounding is not None


def prepare_args(t: Tiles) -> dict[str, str]:
    """Parameter name -> Triton type, in order."""
    x_type = f"*{TRITON_TYPES[t.spec.x_dtype]}"
    made = {"q_ptr": "*i8", "x_scale_ptr": "*fp32", "x_sum_ptr": "*i32"} if t.integer else {"ordered_ptr": x_type}
    args = {"x_ptr": x_type, **made}
    if t.spec.fmt.ordered:
        args["columns_ptr"] = "*i32"
    if "input_scale" in t.spec.operands:
        args["input_scale_ptr"] = "*fp32"
    return {**args, "tokens": "i32"}


def prepare_body(t: Tiles) -> list[str]:
    """Statements of the kernel."""
    lines = ["row = tl.program_id(0).to(tl.int64)", "group = tl.program_id(1)"]
    lines += _integers(t) if t.integer else _floats(t)
    return [BODY + line for line in lines]


def _load(t: Tiles) -> list[str]:
    """`x` from the columns `col` where `ok`."""
    source = ["source = tl.load(columns_ptr + col, mask=ok, other=0)"] if t.spec.fmt.ordered else ["source = col"]
    return [*source, f"x = tl.load(x_ptr + row * {t.spec.k} + source, mask=ok, other=0.0).to(tl.float32)"]


def _step(t: Tiles, tile: list[str], bounds: str, shape: str) -> list[str]:
    """`scale` and `inverse`, the scale of the group and its reciprocal, from the largest magnitude or the range of all
    tiles; `top` and, for levels that cover a range, `least`, the ends of the levels."""
    rounding = t.spec.rounding
    top, clip, wide = (127.0, 1.0, 0) if rounding is None else (rounding.top, rounding.clip, rounding.wide)
    wide_top = WIDE_TOPS[rounding.wide_bits] if rounding is not None else top
    lines = [f"top = tl.where(group < {wide}, {wide_top!r}, {top!r})" if wide else f"top = {top!r}"]
    if rounding is not None and rounding.static:
        return [
            *lines,
            "scale = tl.load(input_scale_ptr + group)",
            "inverse = tl.where(scale > 0.0, tl.div_rn(1.0, scale), 0.0)",
        ]
    asym = rounding is not None and rounding.asym
    lines += _extremes(t, tile, bounds, shape, asym)
    if asym:
        lines.append(f"largest = tl.where(group < {wide}, largest, high - low)")
    lines += [
        f"largest = largest * {clip!r}",
        "scale = tl.div_rn(largest, top)",
        "scale = tl.where(largest > 1e-30, scale, 0.0)",
        'counts = (largest > 1e-30) & (largest < float("inf"))',
        "inverse = tl.where(counts, tl.div_rn(1.0, scale), 0.0)",
        'scale = tl.where(largest < float("inf"), scale, float("nan"))',
    ]
    if asym:
        lines += [
            f"least = (low * inverse * {clip!r} + {_MAGIC!r}) - {_MAGIC!r}",
            f"least = tl.where(group < {wide}, -top - 1.0, least)",
            f"top = tl.where(group < {wide}, top, least + top)",
        ]
    return lines


def _extremes(t: Tiles, tile: list[str], bounds: str, shape: str, asym: bool) -> list[str]:
    """`largest`, the largest magnitude of all tiles, with `asym` also `low` and `high`, the ends of their range.

    Magnitudes are compared as integers, which puts infinities and NaN above all numbers; the ends as integers in the
    order of the floats, where the bits of negative ones count down.
    """
    ends = ["low", "high"] if asym else []
    lines = [f"{name} = tl.zeros({shape}, tl.int32)" for name in ("most", *ends)]
    lines.append(f"for part in range({bounds}):")
    lines += [LOOP[len(BODY) :] + line for line in [*tile, *_load(t)]]
    lines += ["    bits = x.to(tl.int32, bitcast=True)", "    most = tl.maximum(most, bits & 0x7fffffff)"]
    if asym:
        lines += ["    bits = bits ^ ((bits >> 31) & 0x7fffffff)"]
        lines += ["    low = tl.minimum(low, bits)", "    high = tl.maximum(high, bits)"]
    axes = 2 if shape.count(",") == 1 and t.integer else 1
    lines += [f"{name} = tl.{'min' if name == 'low' else 'max'}({name}, axis=0)" for name in ("most", *ends)] * axes
    lines += [f"{e} = ({e} ^ (({e} >> 31) & 0x7fffffff)).to(tl.float32, bitcast=True)" for e in ends]
    return [*lines, "largest = most.to(tl.float32, bitcast=True)"]


def _levels(t: Tiles) -> list[str]:
    """`v`: the level of every x."""
    rounding = t.spec.rounding
    lines = ["v = x * inverse", 'v = tl.where(tl.abs(v) < float("inf"), v, 0.0)']
    element = rounding.element if rounding is not None else None
    least = "-top" if isinstance(element, FloatElement) else "-top - 1.0"
    if rounding is not None and rounding.saturates:
        lines.append(f"v = tl.minimum(tl.maximum(v, {'least' if rounding.asym else least}), top)")
    if not isinstance(element, FloatElement):
        return [*lines, f"v = (v + {_MAGIC!r}) - {_MAGIC!r}"]
    smallest = (1 - element.exponent_bias + 127) << 23
    return [
        *lines,
        f"power = tl.maximum(v.to(tl.int32, bitcast=True) & 0x7f800000, {smallest})",
        f"magic = (power - {element.mantissa << 23}).to(tl.float32, bitcast=True) * {_MAGIC!r}",
        "v = (v + magic) - magic",
    ]


def _integers(t: Tiles) -> list[str]:
    """A tile is some of the group's steps by the columns of a step."""
    spec, own = t.spec, t.stride_blocks * 32
    span = min(spec.span_chunks, t.steps)
    height = 1 << (min(span, max(_TILE // t.step_columns, 1)) - 1).bit_length()
    padded, size = spec.group_blocks * 32, spec.group
    tile = [
        f"chunk = group * {span} + part * {height} + tl.arange(0, {height})",
        f"live = (part * {height} + tl.arange(0, {height}) < {span}) & (chunk < {t.steps})",
        f"inside = tl.arange(0, {t.step_columns})",
        f"col = (chunk * {own})[:, None] + inside[None, :]",
        f"ok = live[:, None] & (inside < {own})[None, :]",
    ]
    if spec.groups > 1 and size != padded and spec.parts == 1:
        tile += [
            f"in_group = col % {padded}",
            f"col = col // {padded} * {size} + in_group",
            f"ok = ok & (in_group < {size})",
        ]
    tile.append(f"ok = ok & (col < {spec.k})")
    bounds = str(-(-span // height))
    lines = _step(t, tile, bounds, f"({height}, {t.step_columns})")
    lines.append(f"for part in range({bounds}):")
    body = [
        *tile,
        *_load(t),
        *_levels(t),
        "q = v.to(tl.int8)",
        f"at = row * {t.steps * t.step_columns} + (chunk * {t.step_columns})[:, None] + inside[None, :]",
        "tl.store(q_ptr + at, q, mask=live[:, None])",
        f"tl.store(x_scale_ptr + row * {t.steps} + chunk, tl.zeros(({height},), tl.float32) + scale, mask=live)",
        f"tl.store(x_sum_ptr + row * {t.steps} + chunk, tl.sum(q.to(tl.int32), axis=1), mask=live)",
    ]
    return lines + [f"    {line}" for line in body]


def _floats(t: Tiles) -> list[str]:
    """A tile is some columns, in stored order, of the group."""
    spec, rounding = t.spec, t.spec.rounding
    size = t.prepared_columns
    width = min(_TILE, 1 << (size - 1).bit_length())
    tile = [
        f"inside = part * {width} + tl.arange(0, {width})",
        f"col = group * {size} + inside",
        f"ok = (inside < {size}) & (col < {spec.k})",
    ]
    bounds = str(-(-size // width))
    lines = [] if rounding is None else _step(t, tile, bounds, f"({width},)")
    lines.append(f"for part in range({bounds}):")
    body = [*tile, *_load(t)]
    body += ["v = x"] if rounding is None else [*_levels(t), "v = v * scale"]
    kind = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[spec.x_dtype]
    body.append(f"tl.store(ordered_ptr + row * {spec.k} + col, v.to(tl.{kind}), mask=ok)")
    return lines + [f"    {line}" for line in body]
