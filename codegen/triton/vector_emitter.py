"""Triton source of a kernel for a vector format.

A step loads a tile of indices [vectors, columns] once and gathers from the codebook, which the caches hold, a
[vectors, columns, lanes] tile: the elements of a centroid lie side by side, so a vector is one wide load. `dot` turns
it into a [columns, tile_n] operand of matrix instructions; `gemv` multiplies and adds it as it is. Outlier columns, few
by design, follow element by element in a loop of their own. Vectors along the input are gathered as [tile_n, positions,
lanes], which is [tile_n, columns] as it stands.

The order of columns and norms concern activations and sums only. `gemv` applies them as it reads activations; `dot`
reads activations that a small kernel has put in order, scaled and summed.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.codegen.decode import outlier_program, vector_program
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.frame import BODY, LOOP, TRITON_TYPES, finish, loop, module, order, output_args, split
from lowbit.codegen.triton.table import Expr, Printer
from lowbit.codegen.triton.vector_tiles import PIECE, VectorTiles, power_of_two
from lowbit.compiler.ir.program import Program

__all__ = ["emit_vector_source", "prepare_args", "vector_kernel_args"]

_DOT_TYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def _operand_type(spec: KernelSpec, name: str) -> str:
    fmt = spec.vector
    assert fmt is not None
    if name.endswith("index"):
        outliers = fmt.outliers.centroids if fmt.outliers else 0
        size = {"index": fmt.centroids, "residual_index": fmt.residual, "outlier_index": outliers}[name]
        return "*u8" if size <= 256 else "*i16"
    if name.endswith("book"):
        return f"*{TRITON_TYPES[spec.scale_dtype]}"
    return "*i32" if name == "columns" else "*fp32"


def vector_kernel_args(spec: KernelSpec, schedule: Schedule) -> dict[str, str]:
    """Parameter name -> Triton type of the main kernel, in order."""
    t = VectorTiles(spec, schedule)
    args = {"x_ptr": f"*{TRITON_TYPES[spec.x_dtype]}"}
    if t.prepared and t.fmt.norm != "none":
        args["x_sum_ptr"] = "*fp32"
    args |= {f"{name}_ptr": _operand_type(spec, name) for name in spec.operands}
    return {**args, **output_args(spec, schedule)}


def prepare_args(spec: KernelSpec) -> dict[str, str]:
    """Parameter name -> Triton type of the kernel that prepares activations; operands among them keep their order."""
    fmt = spec.vector
    assert fmt is not None
    kind = f"*{TRITON_TYPES[spec.x_dtype]}"
    args = {"x_ptr": kind, "ready_ptr": kind}
    if fmt.norm != "none":
        args["x_sum_ptr"] = "*fp32"
    names = ["columns"] * fmt.ordered + ["norm_scale", "norm_bias"] * (fmt.norm == "col")
    return {**args, **{f"{name}_ptr": _operand_type(spec, name) for name in names}, "tokens": "i32"}


def emit_vector_source(spec: KernelSpec, schedule: Schedule) -> str:
    """The module's source: see `frame.module`."""
    t = VectorTiles(spec, schedule)
    body = [*order(t), *_rows(t), *split(t), *(_gemv(t) if t.gemv else _dot(t)), *_row_norms(t), *finish(t)]
    extra, before = (prepare_args(spec), _prepare(t)) if t.prepared else ({}, [])
    return module(t, vector_kernel_args(spec, schedule), body, extra, before)


def _pick(values: tuple[int, ...]) -> str:
    """The value of this tile's segment."""
    text = str(values[-1])
    for i in range(len(values) - 2, -1, -1):
        text = f"tl.where(segment == {i}, {values[i]}, {text})"
    return text


def _rows(t: VectorTiles) -> list[str]:
    """Output columns `n_<a>` of the accumulator's rows, rows of vectors `j` in the segment, codebooks `<book>_<a>`."""
    lanes, dim, starts = (1, 1, t.first_tiles[:-1]) if t.rowwise else (t.lanes, t.fmt.dim, t.first_tiles[:-1])
    later = " + ".join(f"(n_tile >= {s}).to(tl.int32)" for s in starts[1:])
    lines = [f"segment = {later}"] if later else []
    lines += [
        f"tile = n_tile - {_pick(starts)}",
        f"j = tile * {t.vectors} + tl.arange(0, {t.vectors})",
        f"j_ok = j < {_pick(tuple(-(-n // dim) for n in t.tiled))}",
        f"lane = tl.arange(0, {t.lanes})",
        f"row = tl.arange(0, {t.schedule.tile_n})",
    ]
    local = "row" if lanes == dim else f"row // {lanes} * {dim} + row % {lanes}"
    own = "" if lanes == dim else f" & (row % {lanes} < {dim})"
    outs = tuple(sum(t.tiled[:i]) for i in range(len(t.tiled)))
    lines += [
        f"local = tile * {t.outputs} + {local}",
        f"n_0_ok = (local < {_pick(t.tiled)}){own}",
        f"n_0 = local + {_pick(outs)}",
    ]
    if len(t.accumulators) > 1:
        lines += [f"n_1 = n_0 + {t.n_acc}", "n_1_ok = n_0_ok"]
    books = [name for name in t.spec.operands if name.endswith("book")]
    for a in t.accumulators:
        for name in books:
            size = t.book_size(name) * (1 if name == "outlier_book" else t.fmt.groups)
            lines.append(f"{name}_{a} = {name}_ptr + {_segment(t, a, tuple(size * s for s in _segments(t)))}")
    return [BODY + line for line in lines]


def _segments(t: VectorTiles) -> range:
    return range(len(t.spec.segments))


def _segment(t: VectorTiles, a: int, values: tuple[int, ...]) -> str:
    """The value of the segment that accumulator `a` belongs to: one of `values`, which has one per segment."""
    return str(values[a]) if len(t.accumulators) > 1 else _pick(values)


def _load_index(name: str, kind: str, where: str, mask: str) -> str:
    load = f"tl.load({name}_ptr + {where}, mask={mask}, other=0)"
    # Indices of 16 bits are unsigned; int16 is what holds them.
    return f"{load}.to(tl.uint16, bitcast=True).to(tl.int32)" if kind == "*i16" else f"{load}.to(tl.int32)"


def _decode(program: Program, books: Mapping[str, str], dim: int, args: dict[str, str], mask: str) -> tuple[str, ...]:
    """The statements and the result of a decode program; `books` maps codebooks to pointers."""

    def gather(index: Expr, lane: Expr, book: str) -> Expr:
        return Expr(f"tl.load({books[book]} + {index} * {dim} + {lane}{mask}).to(tl.float32)")

    lines: list[str] = []
    result = Printer(lines, "", gather).run(program, args)
    return (*lines, f"w = {result}")


def _main_weights(t: VectorTiles, a: int) -> list[str]:
    """`w` float32 [vectors, columns, lanes] of the current step's columns `col`, or [vectors, columns] of vectors along
    the input at its columns of indices `place`."""
    starts, place = t.first_vectors(t.height), "place" if t.rowwise else "col"
    lines = [f"at = {place}[None, :] * {starts[-1]} + (j + {_segment(t, a, starts[:-1])})[:, None]"]
    mask = "j_ok[:, None]" + (f" & {place}_ok[None, :]" if t.column_mask else "")
    names = ["index"] + ["residual_index"] * bool(t.fmt.residual)
    for name in names:
        lines.append(f"{name} = {_load_index(name, _operand_type(t.spec, name), 'at', mask)}")
    books = {}
    for name in ("book", "residual_book"):
        base = f" + (group * {t.book_size(name)})[None, :, None]" if t.fmt.groups > 1 else ""
        books[name] = f"{name}_{a}{base}"
    args = {name: f"{name}[:, :, None]" for name in names} | {"lane": "lane[None, None, :]"}
    live = "" if t.lanes == t.fmt.dim else f", mask=lane[None, None, :] < {t.fmt.dim}, other=0.0"
    lines += _decode(vector_program(t.fmt), books, t.fmt.dim, args, live)
    return [*lines, f"w = tl.reshape(w, ({t.vectors}, {t.schedule.tile_k}))"] if t.rowwise else lines


def _outlier_weights(t: VectorTiles, a: int) -> list[str]:
    """`w` float32 [tile_n, outlier columns] of the current step's outlier columns `col`."""
    assert t.fmt.outliers is not None
    dim = t.fmt.outliers.dim
    starts = t.first_vectors(dim)
    where = f"col[None, :] * {starts[-1]} + (local // {dim} + {_segment(t, a, starts[:-1])})[:, None]"
    kind = _operand_type(t.spec, "outlier_index")
    lines = [f"index = {_load_index('outlier_index', kind, where, 'n_0_ok[:, None] & col_ok[None, :]')}"]
    args = {"index": "index", "lane": f"(local % {dim})[:, None]"}
    return [*lines, *_decode(outlier_program(), {"outlier_book": f"outlier_book_{a}"}, dim, args, "")]


def _columns(t: VectorTiles) -> list[str]:
    """The step's main columns, and which exist and in which column group they are where that is a question."""
    if t.rowwise:
        return _row_columns(t)
    lines = [f"col = step * {t.schedule.tile_k} + tl.arange(0, {t.schedule.tile_k})"]
    if t.column_mask:
        lines.append(f"col_ok = col < {t.columns}")
    if t.fmt.groups > 1:
        group = f"col // {t.group_columns}"
        lines.append(f"group = {f'tl.minimum({group}, {t.fmt.groups - 1})' if t.column_mask else group}")
    return lines


def _row_columns(t: VectorTiles) -> list[str]:
    """The same for vectors along the input: columns of indices `place`, and the columns `col` of their elements, padded
    lanes included."""
    count = t.columns // t.fmt.dim
    lines = [f"place = step * {t.positions} + tl.arange(0, {t.positions})", f"at_k = tl.arange(0, {t.schedule.tile_k})"]
    lines.append(f"col = (step * {t.positions} + at_k // {t.lanes}) * {t.fmt.dim} + at_k % {t.lanes}")
    if t.column_mask:
        lines += [f"place_ok = place < {count}", f"col_ok = (col < {t.columns}) & (at_k % {t.lanes} < {t.fmt.dim})"]
    return lines


def _outlier_columns(t: VectorTiles) -> list[str]:
    return [f"col = step * {t.outlier_step} + tl.arange(0, {t.outlier_step})", f"col_ok = col < {t.outliers}"]


def _outlier_loop(t: VectorTiles) -> str:
    """The second loop's head: of a split only the first part adds outlier columns."""
    steps = -(-t.outliers // t.outlier_step)
    bound = f"tl.where(part == 0, {steps}, 0)" if t.schedule.split_k > 1 else str(steps)
    return f"{BODY}for step in range(0, {bound}):"


def _dot(t: VectorTiles) -> list[str]:
    s, swap = t.schedule, bool(t.schedule.get("swap", 0))
    shape = f"({s.tile_n}, {s.tile_m})" if swap else f"({s.tile_m}, {s.tile_n})"
    lines = [f"{BODY}m = m_tile * {s.tile_m} + tl.arange(0, {s.tile_m})", f"{BODY}m_ok = m < tokens"]
    lines += [f"{BODY}acc_{a} = tl.zeros({shape}, tl.float32)" for a in t.accumulators]
    lines += [loop(t), *[LOOP + line for line in [*_columns(t), *_load_tile(t, t.outliers, t.column_mask)]]]
    flat = f"w = tl.reshape(tl.permute(w.to(tl.{_DOT_TYPES[t.spec.x_dtype]}), (1, 0, 2)), ({s.tile_k}, {s.tile_n}))"
    if t.rowwise:
        flat = f"w = tl.trans(w.to(tl.{_DOT_TYPES[t.spec.x_dtype]}))"
    for a in t.accumulators:
        lines += [LOOP + line for line in [*_main_weights(t, a), flat, _product(t, a, swap)]]
    if t.outliers:
        lines += [_outlier_loop(t), *[LOOP + line for line in [*_outlier_columns(t), *_load_tile(t, 0, True)]]]
        for a in t.accumulators:
            flat = f"w = tl.trans(w.to(tl.{_DOT_TYPES[t.spec.x_dtype]}))"
            lines += [LOOP + line for line in [*_outlier_weights(t, a), flat, _product(t, a, swap)]]
    if swap:
        lines += [f"{BODY}acc_{a} = tl.trans(acc_{a})" for a in t.accumulators]
    return lines + [BODY + line for line in _token_sums(t)]


def _load_tile(t: VectorTiles, start: int, column_mask: bool) -> list[str]:
    """`x` [tile_m, columns]: activations in stored order, from column `start` on."""
    where = f"m.to(tl.int64)[:, None] * {t.spec.k} + (col + {start})[None, :]"
    mask = "m_ok[:, None]" + (" & col_ok[None, :]" if column_mask else "")
    return [f"x = tl.load(x_ptr + {where}, mask={mask}, other=0.0)"]


def _product(t: VectorTiles, a: int, swap: bool) -> str:
    left, right = ("tl.trans(w)", "tl.trans(x)") if swap else ("x", "w")
    precision = ', input_precision="tf32x3"' if t.spec.x_dtype == "f32" else ""
    return f"acc_{a} = tl.dot({left}, {right}, acc_{a}{precision}, out_dtype=tl.float32)"


def _token_sums(t: VectorTiles) -> list[str]:
    """`total` [tile_m, 1]: the sums of activations that norms ask for; of a split only the first part has them."""
    if t.fmt.norm == "none":
        return []
    piece = f"tl.arange(0, {power_of_two(t.pieces)})[None, :]"
    mask = f"m_ok[:, None] & ({piece} < {t.pieces})" + (" & (part == 0)" if t.schedule.split_k > 1 else "")
    load = f"tl.load(x_sum_ptr + m[:, None] * {t.pieces} + {piece}, mask={mask}, other=0.0)"
    return [f"total = tl.sum({load}, axis=1)[:, None]"]


def _gemv(t: VectorTiles) -> list[str]:
    """Per token a [vectors, columns, lanes] tile of sums, and one [tile_n, columns] of outlier columns."""
    s, tokens = t.schedule, range(t.schedule.tile_m)
    pairs = [(a, i) for a in t.accumulators for i in tokens]
    lines = [f"m_{i} = m_tile * {s.tile_m} + {i}" for i in tokens]
    lines += [f"x_{i} = x_ptr + m_{i}.to(tl.int64) * {t.spec.k}" for i in tokens]
    sums, wide = f"({t.vectors}, {s.tile_k}, {t.lanes})", "None, :, None"
    if t.rowwise:
        sums, wide = f"({t.vectors}, {s.tile_k})", "None, :"
    lines += [f"sum_{a}_{i} = tl.zeros({sums}, tl.float32)" for a, i in pairs]
    lines += _zero_totals(t, "total", s.tile_k)
    lines = [BODY + line for line in lines]
    lines += [loop(t), *[LOOP + line for line in [*_columns(t), *_load_tokens(t, t.outliers, t.column_mask, "total")]]]
    for a in t.accumulators:
        lines += [LOOP + line for line in _main_weights(t, a)]
        lines += [f"{LOOP}sum_{a}_{i} += w * v_{i}[{wide}]" for i in tokens]
    lines += [f"{BODY}acc_{a}_{i} = tl.reshape(tl.sum(sum_{a}_{i}, axis=1), ({s.tile_n},))[None, :]" for a, i in pairs]
    if t.fmt.norm != "none":
        lines += [f"{BODY}total_{i} = tl.sum(total_{i}, axis=0)" for i in tokens]
    return lines + _gemv_outliers(t)


def _gemv_outliers(t: VectorTiles) -> list[str]:
    if not t.outliers:
        return []
    tokens = range(t.schedule.tile_m)
    pairs = [(a, i) for a in t.accumulators for i in tokens]
    shape = f"({t.schedule.tile_n}, {t.outlier_step})"
    lines = [f"rest_{a}_{i} = tl.zeros({shape}, tl.float32)" for a, i in pairs]
    lines = [BODY + line for line in [*lines, *_zero_totals(t, "some", t.outlier_step)]]
    inside = [*_outlier_columns(t), *_load_tokens(t, 0, True, "some")]
    for a in t.accumulators:
        inside += [*_outlier_weights(t, a), *[f"rest_{a}_{i} += w * v_{i}[None, :]" for i in tokens]]
    lines += [_outlier_loop(t), *[LOOP + line for line in inside]]
    lines += [f"{BODY}acc_{a}_{i} += tl.sum(rest_{a}_{i}, axis=1)[None, :]" for a, i in pairs]
    if t.fmt.norm != "none":
        lines += [f"{BODY}total_{i} += tl.sum(some_{i}, axis=0)" for i in tokens]
    return lines


def _zero_totals(t: VectorTiles, name: str, columns: int) -> list[str]:
    if t.fmt.norm == "none":
        return []
    return [f"{name}_{i} = tl.zeros(({columns},), tl.float32)" for i in range(t.schedule.tile_m)]


def _load_tokens(t: VectorTiles, start: int, column_mask: bool, total: str) -> list[str]:
    """`v_<i>` float32 [columns]: activations of token i in stored order, scaled; adds what norms want to `total`."""
    place = f"col + {start}"
    live = ["col_ok"] if column_mask else []
    guard = f", mask={live[0]}, other=0" if live else ""
    lines = [f"source = {f'tl.load(columns_ptr + {place}{guard})' if t.fmt.ordered else place}"]
    if t.fmt.norm == "col":
        lines += [f"{name} = tl.load({name}_ptr + {place}{guard})" for name in ("norm_scale", "norm_bias")]
    for i in range(t.schedule.tile_m):
        parts = live + ([f"(m_{i} + col * 0 < tokens)"] if t.schedule.tile_m > 1 else [])
        mask = f", mask={' & '.join(parts)}, other=0.0" if parts else ""
        lines.append(f"v_{i} = tl.load(x_{i} + source{mask}).to(tl.float32)")
        if t.fmt.norm != "none":
            lines.append(f"{total}_{i} += v_{i}{' * norm_bias' if t.fmt.norm == 'col' else ''}")
        if t.fmt.norm == "col":
            lines.append(f"v_{i} = v_{i} * norm_scale")
    return lines


def _row_norms(t: VectorTiles) -> list[str]:
    """What norms do to the sums: linear, so each part of a split does it to its own."""
    if t.fmt.norm == "none":
        return []
    suffixes = [f"_{i}" for i in range(t.schedule.tile_m)] if t.gemv else [""]
    lines = []
    for a in t.accumulators:
        for name in ("scale", "bias") if t.fmt.norm == "row" else ():
            lines.append(f"{name} = tl.load(norm_{name}_ptr + n_{a}, mask=n_0_ok, other=0.0)[None, :]")
        for end in suffixes:
            change = f" = acc_{a}{end} * scale + total{end} * bias" if t.fmt.norm == "row" else f" += total{end}"
            lines.append(f"acc_{a}{end}{change}")
    return [BODY + line for line in lines]


def _prepare(t: VectorTiles) -> list[str]:
    """Activations of one token and `PIECE` places in stored order, scaled, and their sum with the norms' biases."""
    k, norm = t.spec.k, t.fmt.norm
    lines = [
        "token = tl.program_id(0).to(tl.int64)",
        f"place = tl.program_id(1) * {PIECE} + tl.arange(0, {PIECE})",
        f"ok = place < {k}",
        f"source = {'tl.load(columns_ptr + place, mask=ok, other=0)' if t.fmt.ordered else 'place'}",
        f"x = tl.load(x_ptr + token * {k} + source, mask=ok, other=0.0)",
    ]
    total = "x.to(tl.float32)"
    if norm == "col":
        total += " * tl.load(norm_bias_ptr + place, mask=ok, other=0.0)"
    if norm != "none":
        lines.append(f"tl.store(x_sum_ptr + token * {t.pieces} + tl.program_id(1), tl.sum({total}, axis=0))")
    if norm == "col":
        lines.append("x = x.to(tl.float32) * tl.load(norm_scale_ptr + place, mask=ok, other=0.0)")
    cast = _DOT_TYPES[t.spec.x_dtype]
    lines.append(f"tl.store(ready_ptr + token * {k} + place, x.to(tl.{cast}), mask=ok)")
    return [BODY + line for line in lines]
