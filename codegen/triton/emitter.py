"""Triton source of one kernel: dequantize-and-multiply with prologue and epilogue, for a spec and a schedule.

Three main loops share loads, decode, split-K and epilogue. `dot` decodes a [tile_n, tile_k] weight tile and uses
matrix instructions, with the weights as right operand or (`swap`) as left one, so that few tokens waste little of it.
`gemv` multiplies and adds without matrix instructions, for a handful of tokens. Integer products round activations to
int8 in a small kernel of their own first.

Split-K is finished in the same launch: programs leave partial sums, and the last one to arrive at an output tile adds
them in a fixed order, so results do not depend on timing.
"""

from __future__ import annotations

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.table import Printer, magic_definitions
from lowbit.codegen.triton.tiles import TRITON_TYPES, Tiles
from lowbit.compiler.ir.layout import plane_bits
from lowbit.quantizers.formats import K_ALIGN

__all__ = ["emit_source", "kernel_args", "quantize_args"]

_BODY, _LOOP = "    ", "        "


def kernel_args(spec: KernelSpec, schedule: Schedule) -> dict[str, str]:
    """Parameter name -> Triton type of the main kernel, in order."""
    x_type = "i8" if spec.compute == "int8" else TRITON_TYPES[spec.x_dtype]
    args = {"x_ptr": f"*{x_type}"}
    if spec.compute == "int8":
        args |= {"x_scale_ptr": "*fp32", "x_sum_ptr": "*i32"}
    args |= {f"w{p}_ptr": "*i32" for p in range(len(plane_bits(spec.fmt.bits)))}
    args["scale_ptr"] = f"*{TRITON_TYPES[spec.scale_dtype]}"
    if spec.fmt.zero:
        args["zero_ptr"] = "*u8"
    if "bias" in spec.epilogue:
        args["bias_ptr"] = "*fp32"
    if "residual" in spec.epilogue:
        args["residual_ptr"] = f"*{TRITON_TYPES[spec.out_dtype]}"
    args["out_ptr"] = f"*{TRITON_TYPES[spec.out_dtype]}"
    if schedule.split_k > 1:
        args |= {"part_ptr": "*fp32", "count_ptr": "*i32"}
    return {**args, "tokens": "i32"}


def quantize_args(spec: KernelSpec) -> dict[str, str]:
    """Parameter name -> Triton type of the activation rounding kernel."""
    return {
        "x_ptr": f"*{TRITON_TYPES[spec.x_dtype]}",
        "q_ptr": "*i8",
        "x_scale_ptr": "*fp32",
        "x_sum_ptr": "*i32",
        "tokens": "i32",
    }


def emit_source(spec: KernelSpec, schedule: Schedule) -> str:
    """The module's source: `kernel` (and `quantize`), and for each the types of its parameters and its options."""
    tiles = Tiles(spec, schedule)
    args = kernel_args(spec, schedule)
    body = [*_indices(tiles), *_split(tiles)]
    body += _gemv(tiles) if schedule.get("gemv", 0) else _dot(tiles)
    body += _finish(tiles)
    body = [_BODY + line for line in magic_definitions("\n".join(body))] + body
    extra = quantize_args(spec) if tiles.integer else {}
    head = [
        f'"""Generated kernel {spec.digest()}: {spec.format}, {spec.compute} products."""',
        "import triton",
        "import triton.language as tl",
        f"ARGS = {args!r}",
        f"QUANTIZE_ARGS = {extra!r}",
        f"OPTIONS = {{'num_warps': {schedule.warps}, 'num_stages': {schedule.stages}, 'enable_fp_fusion': True}}",
        "QUANTIZE_OPTIONS = {'num_warps': 1}",
    ]
    text = [*head, *_function("kernel", args, body)]
    if tiles.integer:
        text += _function("quantize", extra, _quantize(tiles))
    return "\n".join(text) + "\n"


def _function(name: str, args: dict[str, str], body: list[str]) -> list[str]:
    # One compilation serves every token count: nothing is specialised on it.
    return ["", "", '@triton.jit(do_not_specialize=["tokens"])', f"def {name}({', '.join(args)}):", *body]


def _indices(t: Tiles) -> list[str]:
    """Which output tile this program computes; neighbouring programs share weights through L2."""
    s = t.schedule
    n_tiles = -(-t.n_acc // s.tile_n)
    lines = [
        "program = tl.program_id(0)",
        f"m_tiles = tl.cdiv(tokens, {s.tile_m})",
        # Groups of 8 token tiles walk the weight tiles together, so a weight tile is read from memory once a group.
        f"band = program // (8 * {n_tiles})",
        "band_m = tl.minimum(m_tiles - band * 8, 8)",
        f"inside = program - band * (8 * {n_tiles})",
        "m_tile = band * 8 + inside % band_m",
        "n_tile = inside // band_m",
        f"n_0 = n_tile * {s.tile_n} + tl.arange(0, {s.tile_n})",
        f"n_0_ok = n_0 < {t.n_acc}",
    ]
    if 1 in t.accumulators:
        lines += [f"n_1 = n_0 + {t.n_acc}", "n_1_ok = n_0_ok"]
    return [_BODY + line for line in lines]


def _split(t: Tiles) -> list[str]:
    if t.schedule.split_k == 1:
        return [f"{_BODY}first, last = 0, {t.steps}"]
    per = -(-t.steps // t.schedule.split_k)
    lines = ["part = tl.program_id(1)", f"first = part * {per}", f"last = tl.minimum(first + {per}, {t.steps})"]
    return [_BODY + line for line in lines]


def _loop(t: Tiles) -> str:
    bounds = "first, last" if t.schedule.split_k > 1 else f"0, {t.steps}"
    return f"{_BODY}for step in range({bounds}):"


def _dot(t: Tiles) -> list[str]:
    s, swap = t.schedule, bool(t.schedule.get("swap", 0))
    shape = f"({s.tile_n}, {s.tile_m})" if swap else f"({s.tile_m}, {s.tile_n})"
    lines = [f"{_BODY}m = m_tile * {s.tile_m} + tl.arange(0, {s.tile_m})", f"{_BODY}m_ok = m < tokens"]
    lines += [f"{_BODY}acc_{a} = tl.zeros({shape}, tl.float32)" for a in t.accumulators]
    lines.append(_loop(t))
    lines += [_LOOP + line for line in [*t.blocks(), *_load_x(t)]]
    for a in t.accumulators:
        lines += [_LOOP + line for line in [*t.load_words(a), *t.load_sides(a)]]
        lines += [*_weight_tile(t), *[_LOOP + line for line in _product(t, a, swap)]]
    if swap:
        lines += [f"{_BODY}acc_{a} = tl.trans(acc_{a})" for a in t.accumulators]
    return lines


def _load_x(t: Tiles) -> list[str]:
    """The activation tile `x` [tile_m, step columns], zero where a padded column has no source."""
    if t.integer:
        stride = t.steps * t.step_columns
        return [
            f"col = step * {t.step_columns} + tl.arange(0, {t.step_columns})",
            f"x = tl.load(x_ptr + m.to(tl.int64)[:, None] * {stride} + col[None, :], mask=m_ok[:, None], other=0)",
            f"x_scale = tl.load(x_scale_ptr + m * {t.steps} + step, mask=m_ok, other=0.0)",
            f"x_sum = tl.load(x_sum_ptr + m * {t.steps} + step, mask=m_ok, other=0)",
        ]
    mask = "m_ok[:, None]" + (" & col_ok[None, :]" if t.column_mask else "")
    where = f"m.to(tl.int64)[:, None] * {t.spec.k} + col[None, :]"
    return [*t.columns(), f"x = tl.load(x_ptr + {where}, mask={mask}, other=0.0)"]


def _weight_tile(t: Tiles) -> list[str]:
    """`w` [tile_n, step columns]: 32 decoded tiles, joined so that columns run in order along the last axis."""
    lines: list[str] = []
    printer = Printer(lines, _LOOP)
    lines += [f"{_LOOP}c{c} = {text}" for c in range(K_ALIGN) if (text := t.decode(printer, c))]
    stride = K_ALIGN
    while stride > 1:
        stride //= 2
        lines += [f"{_LOOP}c{c} = tl.join(c{c}, c{c + stride})" for c in range(stride)]
    # Narrowed here and not column by column: the conversion packs neighbours, and keeps Triton 3.6 from turning the
    # reshape into a view of shared memory, which it rejects for some tiles.
    kind = "int8" if t.integer else _dot_type(t)
    lines.append(f"{_LOOP}w = tl.reshape(c0, ({t.schedule.tile_n}, {t.step_columns})).to(tl.{kind})")
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
    """Codes are multiplied as code - 2**(b-1); what the zero point differs from that meets the chunk's sum of x."""
    fmt = t.spec.fmt
    lines = [f"sums = tl.dot({left}, {right}, out_dtype=tl.int32)"]
    side, token = ("{}", "[None, :]") if swap else ("tl.trans({})", "[:, None]")
    middle = 2 ** (fmt.bits - 1)
    total = "sums.to(tl.float32)"
    if fmt.zero:
        total = f"({total} + x_sum{token}.to(tl.float32) * {side.format(f'({middle}.0 - zero)')})"
    elif fmt.element.bias != middle:
        total = f"({total} + x_sum{token}.to(tl.float32) * {float(middle - fmt.element.bias)!r})"
    return [*lines, f"acc_{a} += {total} * (x_scale{token} * {side.format('scale')})"]


def _gemv(t: Tiles) -> list[str]:
    """Per token a [tile_n, blocks] tile of sums; a column of x is read as one value per block."""
    s = t.schedule
    tokens = range(s.tile_m)
    zeros = f"tl.zeros(({s.tile_n}, {t.step_blocks}), tl.float32)"
    lines = [f"{_BODY}m_{i} = m_tile * {s.tile_m} + {i}" for i in tokens]
    lines += [f"{_BODY}x_{i} = x_ptr + m_{i}.to(tl.int64) * {t.spec.k}" for i in tokens]
    lines += [f"{_BODY}sum_{a}_{i} = {zeros}" for a in t.accumulators for i in tokens]
    lines += [_loop(t), *[_LOOP + line for line in [*t.blocks(), *_block_columns(t)]]]
    for a in t.accumulators:
        lines += [_LOOP + line for line in [*t.load_words(a), *t.load_sides(a)]]
        lines += _gemv_columns(t, a)
    for a in t.accumulators:
        lines += [f"{_BODY}acc_{a}_{i} = tl.sum(sum_{a}_{i}, axis=1)[None, :]" for i in tokens]
    return lines


def _block_columns(t: Tiles) -> list[str]:
    """`start`: the column of x where each block starts, and how many columns of it exist (`live`)."""
    spec = t.spec
    padded = spec.group_blocks
    if spec.groups > 1 and spec.group != padded * K_ALIGN:
        first = f"(block % {padded}) * {K_ALIGN}"
        return [
            f"start = block // {padded} * {spec.group} + {first}",
            f"live = tl.minimum({spec.group} - {first}, {spec.k} - start)",
        ]
    return [f"start = block * {K_ALIGN}", f"live = {spec.k} - start"]


def _gemv_columns(t: Tiles, a: int) -> list[str]:
    spec, tokens = t.spec, range(t.schedule.tile_m)
    whole_columns = spec.k % K_ALIGN == 0 and (spec.groups == 1 or spec.group % K_ALIGN == 0)
    whole_tokens = t.schedule.tile_m == 1
    lines: list[str] = []
    printer = Printer(lines, _LOOP)
    dots = {i: f"dot_{i}" for i in tokens} if t.scale_after else {i: f"sum_{a}_{i}" for i in tokens}
    for c in range(K_ALIGN):
        text = t.decode(printer, c)
        lines.append(f"{_LOOP}c = {text}")
        for i in tokens:
            mask = ([] if whole_columns and not t.block_mask else [f"(live > {c})"]) + (
                [] if whole_tokens else [f"(m_{i} < tokens)"]
            )
            guard = f", mask={' & '.join(mask)}, other=0.0" if mask else ""
            guard = guard if not mask or "live" in guard else guard.replace("mask=", "mask=(block >= 0) & ")
            value = f"tl.load(x_{i} + start + {c}{guard}).to(tl.float32)[None, :]"
            first = t.scale_after and c == 0
            lines.append(f"{_LOOP}{dots[i]} = c * {value}" if first else f"{_LOOP}{dots[i]} += c * {value}")
    if t.scale_after:
        lines += [f"{_LOOP}sum_{a}_{i} += dot_{i} * scale" for i in tokens]
    return lines


def _pieces(t: Tiles) -> list[tuple[str, str]]:
    """(suffix of accumulators, statement that sets row numbers `m` and `m_ok`) of each part of the output tile."""
    if not t.schedule.get("gemv", 0):
        return [("", "")]
    return [(f"_{i}", f"m = m_{i} + tl.arange(0, 1)") for i in range(t.schedule.tile_m)]


def _finish(t: Tiles) -> list[str]:
    lines: list[str] = []
    if t.schedule.split_k == 1:
        for suffix, rows in _pieces(t):
            lines += _epilogue(t, suffix, rows, _BODY)
        return lines
    n, split = t.n_acc, t.schedule.split_k
    for suffix, rows in _pieces(t):
        lines += _rows(rows, _BODY)
        for a in t.accumulators:
            at = f"((part * {len(t.accumulators)} + {a}) * tokens + m).to(tl.int64)[:, None] * {n} + n_0[None, :]"
            lines.append(f"{_BODY}tl.store(part_ptr + {at}, acc_{a}{suffix}, mask={_out_mask()})")
    lines += [
        f"{_BODY}tl.debug_barrier()",  # every thread's stores come before the arrival is counted
        f'{_BODY}arrived = tl.atomic_add(count_ptr + program, 1, sem="acq_rel")',
        f"{_BODY}if arrived == {split - 1}:",
        f"{_LOOP}tl.store(count_ptr + program, 0)",
    ]
    for suffix, rows in _pieces(t):
        lines += _rows(rows, _LOOP)
        for a in t.accumulators:
            lines.append(f"{_LOOP}acc_{a}{suffix} = tl.zeros_like(acc_{a}{suffix})")
        lines.append(f"{_LOOP}for other in range({split}):")
        for a in t.accumulators:
            at = f"((other * {len(t.accumulators)} + {a}) * tokens + m).to(tl.int64)[:, None] * {n} + n_0[None, :]"
            load = f'tl.load(part_ptr + {at}, mask={_out_mask()}, other=0.0, cache_modifier=".cg")'
            lines.append(f"{_LOOP}    acc_{a}{suffix} += {load}")
        lines += _epilogue(t, suffix, rows, _LOOP)
    return lines


def _out_mask() -> str:
    return "m_ok[:, None] & n_0_ok[None, :]"


def _rows(rows: str, pad: str) -> list[str]:
    return [pad + rows, f"{pad}m_ok = m < tokens"] if rows else []


def _epilogue(t: Tiles, suffix: str, rows: str, pad: str) -> list[str]:
    """The spec's epilogue in its order, then the store."""
    live = list(t.accumulators)
    lines = _rows(rows, pad)
    out_at = f"m.to(tl.int64)[:, None] * {t.n_acc} + n_0[None, :]"
    for step in t.spec.epilogue:
        if step == "bias":
            for a in live:
                load = f"tl.load(bias_ptr + n_{a}, mask=n_0_ok, other=0.0)[None, :]"
                lines.append(f"{pad}acc_{a}{suffix} += {load}")
        elif step == "silu_mul":
            gate, up = f"acc_0{suffix}", f"acc_1{suffix}"
            lines.append(f"{pad}{gate} = {gate} / (1.0 + tl.exp(-{gate})) * {up}")
            live = [0]
        else:
            load = f"tl.load(residual_ptr + {out_at}, mask={_out_mask()}, other=0.0).to(tl.float32)"
            lines.append(f"{pad}acc_0{suffix} += {load}")
    cast = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[t.spec.out_dtype]
    lines.append(f"{pad}tl.store(out_ptr + {out_at}, acc_0{suffix}.to(tl.{cast}), mask={_out_mask()})")
    return lines


def _quantize(t: Tiles) -> list[str]:
    """Round one token's chunk to int8: the largest value becomes 127. One program per (token, chunk)."""
    load = "tl.load(x_ptr + row * {k} + col, mask={mask}, other=0.0).to(tl.float32)"
    lines = [
        "row = tl.program_id(0).to(tl.int64)",
        "step = tl.program_id(1)",
        *t.columns(),
        "x = " + load.format(k=t.spec.k, mask="col_ok" if t.column_mask else "col >= 0"),
        "largest = tl.max(tl.abs(x), axis=0)",
        "scale = largest / 127.0",
        "inverse = tl.where(largest > 0.0, 127.0 / largest, 0.0)",
        "q = tl.floor(x * inverse + 0.5)",
        "q = tl.minimum(tl.maximum(q, -127.0), 127.0).to(tl.int8)",
        f"at = row * {t.steps * t.step_columns} + step * {t.step_columns} + tl.arange(0, {t.step_columns})",
        "tl.store(q_ptr + at, q)",
        f"tl.store(x_scale_ptr + row * {t.steps} + step, scale)",
        f"tl.store(x_sum_ptr + row * {t.steps} + step, tl.sum(q.to(tl.int32), axis=0))",
    ]
    return [_BODY + line for line in lines]
