"""Triton source of one kernel: dequantize-and-multiply with prologue and epilogue. Scalar formats are printed here.

Three main loops share loads, decode, split-K and epilogue. `dot` decodes a [tile_n, tile_k] weight tile and uses
matrix instructions, with the weights as right operand or (`swap`) as left one, so that few tokens waste little of it.
`gemv` multiplies and adds without matrix instructions, for a handful of tokens. Integer products round activations to
int8 in a small kernel of their own first.
"""

from __future__ import annotations

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.frame import BODY, LOOP, TRITON_TYPES, finish, loop, module, order, output_args, split
from lowbit.codegen.triton.prepare import needs_preparing, prepare_args, prepare_body
from lowbit.codegen.triton.table import Printer, magic_definitions
from lowbit.codegen.triton.tiles import Tiles
from lowbit.codegen.triton.vector_emitter import emit_vector_source, vector_kernel_args
from lowbit.compiler.ir.layout import plane_bits
from lowbit.quantizers.formats import K_ALIGN

__all__ = ["emit_source", "kernel_args"]


def kernel_args(spec: KernelSpec, schedule: Schedule) -> dict[str, str]:
    """Parameter name -> Triton type of the main kernel, in order."""
    if spec.vector:
        return vector_kernel_args(spec, schedule)
    x_type = "i8" if spec.compute == "int8" else TRITON_TYPES[spec.x_dtype]
    args = {"x_ptr": f"*{x_type}"}
    if spec.compute == "int8":
        args |= {"x_scale_ptr": "*fp32", "x_sum_ptr": "*i32"}
    args |= {f"w{p}_ptr": "*i32" for p in range(len(plane_bits(spec.fmt.bits)))}
    args["scale_ptr"] = f"*{TRITON_TYPES[spec.scale_dtype]}"
    if spec.fmt.zero:
        args["zero_ptr"] = "*u8"
    if spec.fmt.offset:
        args["offset_ptr"] = args["scale_ptr"]
    if spec.fmt.tensor:
        args["tensor_scale_ptr"] = "*fp32"  # part of the scales already
    if spec.fmt.channel:
        args["channel_scale_ptr"] = "*fp16"  # likewise
    if spec.fmt.ordered:
        args["columns_ptr"] = "*i32"  # for `prepare`, like what follows
    if "input_scale" in spec.operands:
        args["input_scale_ptr"] = "*fp32"
    return {**args, **output_args(spec, schedule)}


def emit_source(spec: KernelSpec, schedule: Schedule) -> str:
    """The module's source: see `frame.module`."""
    if spec.vector:
        return emit_vector_source(spec, schedule)
    tiles = Tiles(spec, schedule)
    body = [*_indices(tiles), *split(tiles)]
    body += _gemv(tiles) if schedule.get("gemv", 0) else _dot(tiles)
    body += finish(tiles)
    body = [BODY + line for line in magic_definitions("\n".join(body))] + body
    extra, before = (prepare_args(tiles), prepare_body(tiles)) if needs_preparing(tiles) else ({}, [])
    return module(tiles, kernel_args(spec, schedule), body, extra, before)


def _indices(t: Tiles) -> list[str]:
    lines = [f"n_0 = n_tile * {t.schedule.tile_n} + tl.arange(0, {t.schedule.tile_n})", f"n_0_ok = n_0 < {t.n_acc}"]
    if 1 in t.accumulators:
        lines += [f"n_1 = n_0 + {t.n_acc}", "n_1_ok = n_0_ok"]
    return [*order(t), *[BODY + line for line in lines]]


def _dot(t: Tiles) -> list[str]:
    s, swap = t.schedule, bool(t.schedule.get("swap", 0))
    shape = f"({s.tile_n}, {s.tile_m})" if swap else f"({s.tile_m}, {s.tile_n})"
    lines = [f"{BODY}m = m_tile * {s.tile_m} + tl.arange(0, {s.tile_m})", f"{BODY}m_ok = m < tokens"]
    name, kind = ("sums", "int32") if t.whole else ("acc", "float32")
    lines += [f"{BODY}{name}_{a} = tl.zeros({shape}, tl.{kind})" for a in t.accumulators]
    if t.whole and t.needs_sums:
        lines.append(f"{BODY}x_sum = tl.zeros(({s.tile_m},), tl.int32)")
    lines.append(loop(t))
    lines += [LOOP + line for line in [*t.blocks(), *_load_x(t)]]
    for a in t.accumulators:
        lines += [LOOP + line for line in [*t.load_words(a), *([] if t.whole else t.load_sides(a))]]
        lines += [*_weight_tile(t), *[LOOP + line for line in _product(t, a, swap)]]
    if t.whole:
        lines += [BODY + line for line in _scale_whole(t, swap)]
    if swap:
        lines += [f"{BODY}acc_{a} = tl.trans(acc_{a})" for a in t.accumulators]
    return lines


def _load_x(t: Tiles) -> list[str]:
    """The activation tile `x` [tile_m, step columns], zero where a padded column has no source."""
    if t.integer:
        stride = t.steps * t.step_columns
        total = f"tl.load(x_sum_ptr + m * {t.steps} + step, mask=m_ok, other=0)"
        tile = [
            f"col = step * {t.step_columns} + tl.arange(0, {t.step_columns})",
            f"x = tl.load(x_ptr + m.to(tl.int64)[:, None] * {stride} + col[None, :], mask=m_ok[:, None], other=0)",
        ]
        if t.whole:
            return [*tile, *([f"x_sum += {total}"] if t.needs_sums else [])]
        scale = f"x_scale = tl.load(x_scale_ptr + m * {t.steps} + step, mask=m_ok, other=0.0)"
        return [*tile, scale, f"x_sum = {total}"]
    mask = "m_ok[:, None]" + (" & col_ok[None, :]" if t.column_mask else "")
    where = f"m.to(tl.int64)[:, None] * {t.spec.k} + col[None, :]"
    return [*t.columns(), f"x = tl.load(x_ptr + {where}, mask={mask}, other=0.0)"]


def _weight_tile(t: Tiles) -> list[str]:
    """`w` [tile_n, step columns]: 32 decoded tiles, joined so that columns run in order along the last axis."""
    lines: list[str] = []
    printer = Printer(lines, LOOP)
    lines += [f"{LOOP}c{c} = {text}" for c in range(K_ALIGN) if (text := t.decode(printer, c))]
    stride = K_ALIGN
    while stride > 1:
        stride //= 2
        lines += [f"{LOOP}c{c} = tl.join(c{c}, c{c + stride})" for c in range(stride)]
    # Narrowed here and not column by column: the conversion packs neighbours, and keeps Triton 3.6 from turning the
    # reshape into a view of shared memory, which it rejects for some tiles.
    kind = "int8" if t.integer else _dot_type(t)
    lines.append(f"{LOOP}w = tl.reshape(c0, ({t.schedule.tile_n}, {t.step_columns})).to(tl.{kind})")
    return lines


def _dot_type(t: Tiles) -> str:
    return {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[t.spec.x_dtype]


def _product(t: Tiles, a: int, swap: bool) -> list[str]:
    left, right = ("w", "tl.trans(x)") if swap else ("x", "tl.trans(w)")
    if t.integer:
        return _integer_product(t, a, left, right, swap)
    precision = ', input_precision="tf32x3"' if t.spec.x_dtype == "f32" else ""
    if not t.scale_after:
        return [f"acc_{a} = tl.dot({left}, {right}, acc_{a}{precision}, out_dtype=tl.float32)"]
    scale = "scale" if swap else "tl.trans(scale)"
    return [f"acc_{a} += tl.dot({left}, {right}{precision}, out_dtype=tl.float32) * {scale}"]


def _integer_product(t: Tiles, a: int, left: str, right: str, swap: bool) -> list[str]:
    """Codes are multiplied as code - 2**(b-1); what the zero point differs from that, and an offset, meet the chunk's
    sum of the rounded x."""
    if t.whole:
        return [f"sums_{a} = tl.dot({left}, {right}, sums_{a}, out_dtype=tl.int32)"]
    return [f"sums = tl.dot({left}, {right}, out_dtype=tl.int32)", *_scaled(t, a, "sums", "+=", swap)]


def _scale_whole(t: Tiles, swap: bool) -> list[str]:
    """The end of sums of integers that run over all columns: one scale a row and one a token."""
    lines = [f"x_scale = tl.load(x_scale_ptr + m * {t.steps}, mask=m_ok, other=0.0)"]
    for a in t.accumulators:
        lines += [*t.load_sides(a), *_scaled(t, a, f"sums_{a}", "=", swap)]
    return lines


def _scaled(t: Tiles, a: int, sums: str, sign: str, swap: bool) -> list[str]:
    """`acc_<a>` from sums of integers."""
    fmt, lines = t.spec.fmt, list[str]()
    side, token = ("{}", "[None, :]") if swap else ("tl.trans({})", "[:, None]")
    middle = 2 ** (fmt.bits - 1)
    total = f"{sums}.to(tl.float32)"
    if fmt.zero:
        total = f"({total} + x_sum{token}.to(tl.float32) * {side.format(f'({middle}.0 - zero)')})"
    elif fmt.element.bias != middle:
        total = f"({total} + x_sum{token}.to(tl.float32) * {float(middle - fmt.element.bias)!r})"
    lines.append(f"acc_{a} {sign} {total} * (x_scale{token} * {side.format('scale')})")
    if fmt.offset:
        lines.append(f"acc_{a} += (x_scale * x_sum.to(tl.float32)){token} * {side.format('offset')}")
    return lines


def _gemv(t: Tiles) -> list[str]:
    """Per token a [tile_n, blocks] tile of sums; a column of x is read as one value per block."""
    s = t.schedule
    tokens = range(s.tile_m)
    zeros = f"tl.zeros(({s.tile_n}, {t.step_blocks}), tl.float32)"
    lines = [f"{BODY}m_{i} = m_tile * {s.tile_m} + {i}" for i in tokens]
    lines += [f"{BODY}x_{i} = x_ptr + m_{i}.to(tl.int64) * {t.spec.k}" for i in tokens]
    lines += [f"{BODY}sum_{a}_{i} = {zeros}" for a in t.accumulators for i in tokens]
    lines += [loop(t), *[LOOP + line for line in [*t.blocks(), *_block_columns(t)]]]
    for a in t.accumulators:
        lines += [LOOP + line for line in [*t.load_words(a), *t.load_sides(a)]]
        lines += _gemv_columns(t, a)
    for a in t.accumulators:
        lines += [f"{BODY}acc_{a}_{i} = tl.sum(sum_{a}_{i}, axis=1)[None, :]" for i in tokens]
    return lines


def _block_columns(t: Tiles) -> list[str]:
    """`start`: the column of x where each block starts, and how many columns of it exist (`live`)."""
    spec = t.spec
    padded = spec.group_blocks
    if spec.groups > 1 and spec.parts == 1 and spec.group != padded * K_ALIGN:
        first = f"(block % {padded}) * {K_ALIGN}"
        return [
            f"start = block // {padded} * {spec.group} + {first}",
            f"live = tl.minimum({spec.group} - {first}, {spec.k} - start)",
        ]
    return [f"start = block * {K_ALIGN}", f"live = {spec.k} - start"]


def _gemv_columns(t: Tiles, a: int) -> list[str]:
    spec, tokens = t.spec, range(t.schedule.tile_m)
    whole_columns = spec.k % K_ALIGN == 0 and (spec.groups == 1 or spec.parts > 1 or spec.group % K_ALIGN == 0)
    whole_tokens = t.schedule.tile_m == 1
    lines: list[str] = []
    printer = Printer(lines, LOOP)
    dots = {i: f"dot_{i}" for i in tokens} if t.scale_after else {i: f"sum_{a}_{i}" for i in tokens}
    for c in range(K_ALIGN):
        text = t.decode(printer, c)
        lines.append(f"{LOOP}c = {text}")
        for i in tokens:
            mask = ([] if whole_columns and not t.block_mask else [f"(live > {c})"]) + (
                [] if whole_tokens else [f"(m_{i} < tokens)"]
            )
            guard = f", mask={' & '.join(mask)}, other=0.0" if mask else ""
            guard = guard if not mask or "live" in guard else guard.replace("mask=", "mask=(block >= 0) & ")
            first = t.scale_after and c == 0
            lines.append(f"{LOOP}v = tl.load(x_{i} + start + {c}{guard}).to(tl.float32)")
            lines.append(f"{LOOP}{dots[i]} {'=' if first else '+='} c * v[None, :]")
            if t.offset_after:
                lines.append(f"{LOOP}total_{i} {'=' if first else '+='} v")
    if t.offset_after:
        lines += [f"{LOOP}sum_{a}_{i} += total_{i}[None, :] * offset" for i in tokens]
    if t.scale_after:
        lines += [f"{LOOP}sum_{a}_{i} += dot_{i} * scale" for i in tokens]
    return lines
