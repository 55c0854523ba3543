"""Triton source of attention over a packed key-value cache, printed from the format and the layout that C++ reads too.

A program takes 16 query rows of one key-value head and a share of the tokens, a tile at a time: codes become numbers by
the side's own program, two matrix products frame an online softmax, and a second kernel joins the shares. A byte holds
codes of several columns (keys: head dimensions; values: tokens), so a tile is worked on in as many *strides* as there
are codes in a byte, each of them the columns that stand at one place of their bytes: a byte is loaded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from lowbit.codegen.attend import LANES, AttendSpec, side_program
from lowbit.codegen.backend import Source
from lowbit.codegen.triton.table import Printer, magic_definitions
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.formats.kv import KV_BLOCK, KVSide

__all__ = ["ROWS", "TritonAttend", "attend_source"]

ROWS = 16
"""Query rows of a program: what the smallest matrix instruction takes."""

_NEVER = "-3.0e38"  # a score that no probability comes from
_JOINED = 16  # shares that are joined at once
_FEWEST = 16  # columns of a product that tensor cores take
_SCALARS = (
    "rows", "queries", "tokens", "k_stored", "v_stored", "capacity", "heads", "splits", "masked", "mask_batch",
    "mask_query",
)  # fmt: skip


@dataclass(frozen=True)
class TritonAttend:
    """One kernel's numbers. Raises KernelError (LB0425) for formats with a correction and other layouts."""

    spec: AttendSpec

    def __post_init__(self) -> None:
        if self.spec.fmt.gear is not None:
            raise KernelError(
                "LB0425", f"no kernel reads {self.spec.format}", hint="leave gear out, or let torch attend"
            )
        for letter, side in self.spec.sides:
            if side.quantized and not _as_printed(self.spec, letter, side):
                raise KernelError("LB0425", f"no kernel reads codes laid out as {self.spec.layout}")

    @cached_property
    def strides(self) -> dict[str, int]:
        """Codes in a byte, by side; 1 for numbers."""
        return {letter: 8 // side.bits if side.quantized else 1 for letter, side in self.spec.sides}

    @property
    def stride_tokens(self) -> int:
        """Tokens of one stride of a tile: fewer of large heads, of which registers hold fewer."""
        blocks = 2 if self.dims <= 64 else 1
        return max(blocks * KV_BLOCK // self.strides["v"], 16)

    @property
    def tile(self) -> int:
        """Tokens of a tile, whole blocks."""
        return self.stride_tokens * self.strides["v"]

    @property
    def columns(self) -> int:
        """Columns of one stride of keys, with those of padding."""
        padded = math.ceil(self.spec.head_dim / KV_BLOCK) * KV_BLOCK
        return (padded if self.spec.fmt.key.quantized else self.spec.head_dim) // self.strides["k"]

    @property
    def warps(self) -> int:
        """Enough that a tile of values, and the parts that its products are made of, stay in registers."""
        return 8 if self.dims > 64 else 4

    @property
    def dims(self) -> int:
        """Head dimensions of an output tile: a power of two."""
        return _power(self.spec.head_dim)

    @cached_property
    def args(self) -> dict[str, str]:
        """Parameter name -> Triton type of the main kernel."""
        kinds = {torch.uint8: "*u8", torch.float16: "*fp16"}
        state = {f"{n}_ptr": kinds[d] for n, (d, _) in self.spec.shapes(1, 1, self.spec.span).items()}
        return {"q_ptr": "*fp32", **state, "mask_ptr": "*u8", "part_ptr": "*fp32", **dict.fromkeys(_SCALARS, "i32"),
                "scale": "fp32"}  # fmt: skip

    @cached_property
    def join_args(self) -> dict[str, str]:
        """The same of the kernel that joins shares."""
        return {"part_ptr": "*fp32", "out_ptr": "*fp32", "rows": "i32", "row_tiles": "i32", "splits": "i32"}


def attend_source(spec: AttendSpec) -> Source:
    """The module with `kernel` and `join`; raises KernelError (LB0425) for formats it does not read."""
    a = TritonAttend(spec)
    body = _body(a)
    body = [*magic_definitions("\n".join(body)), *body]
    text = [
        f'"""Generated kernel {spec.digest()}: attention over {spec.format}."""',
        "import triton",
        "import triton.language as tl",
        f"ARGS = {a.args!r}",
        f"JOIN_ARGS = {a.join_args!r}",
        "PREPARE_ARGS = {}",
        f"OPTIONS = {{'num_warps': {a.warps}, 'num_stages': 2}}",
        "JOIN_OPTIONS = {'num_warps': 2}",
        *_function("kernel", a.args, body),
        *_function("join", a.join_args, _join(a)),
    ]
    return Source("\n".join(text) + "\n", ".py")


def _function(name: str, args: dict[str, str], body: list[str]) -> list[str]:
    fixed = [n for n, kind in args.items() if not kind.startswith("*")]
    # One compilation serves every length, batch and mask: nothing is specialised on them.
    return ["", "", f"@triton.jit(do_not_specialize={fixed!r})", f"def {name}({', '.join(args)}):", *_indent(body)]


def _indent(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _stride(index: str, codes: int, at: int) -> str:
    """The column, or token, at place `at` of the byte number `index`, counted from a whole block."""
    per = KV_BLOCK // codes
    return f"({index} // {per} * {KV_BLOCK} + {index} % {per} // 4 * {4 * codes} + {4 * at} + {index} % 4)"


def _inside(index: str, bits: int, block: int) -> str:
    """Where byte number `index` of a row lies; a block of 32 columns takes `block` bytes."""
    per = KV_BLOCK * bits // 8
    return f"({index} // {per} * {block} + {index} % {per} // 4 * 64 + {index} % 4)"


def _as_printed(spec: AttendSpec, letter: str, side: KVSide) -> bool:
    """Whether the layout puts codes where `_stride` and `_inside` look for them."""
    rows = 2 * LANES
    columns = 2 * KV_BLOCK if letter == "k" else KV_BLOCK
    index, shift = spec.layout.address(side.bits, rows, columns)
    panel = 64 * side.bits * (columns // KV_BLOCK)
    row, byte = torch.arange(rows)[:, None], torch.arange(columns * side.bits // 8)
    found, codes = torch.zeros_like(index), 8 // side.bits
    places = torch.zeros_like(shift)
    for at in range(codes):
        column = eval(_stride("byte", codes, at), {"byte": byte})  # noqa: S307 - the text that is printed, nothing else
        inside = eval(_inside("byte", side.bits, 64 * side.bits), {"byte": byte})  # noqa: S307
        found[:, column] = row // LANES * panel + row % LANES * 4 + inside
        places[:, column] = at * side.bits
    return torch.equal(found, index) and torch.equal(places, shift.expand_as(places))


def _body(a: TritonAttend) -> list[str]:
    stored = [f"{letter}_stored" for letter, side in a.spec.sides if side.quantized]
    least = f"tl.minimum({', '.join(stored)})" if len(stored) == 2 else stored[0] if stored else "tokens"
    lines = [
        "head, row_tile, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)",
        f"row = row_tile * {ROWS} + tl.arange(0, {ROWS})",
        "row_ok = row < rows",
        "query = row % queries",
        "newest = tokens - queries + query",
        f"u = tl.arange(0, {a.stride_tokens})",
        f"d = tl.arange(0, {a.dims})",
        f"d_ok = d < {a.spec.head_dim}",
        f"c = tl.arange(0, {max(_power(a.columns), _FEWEST)})",
    ]
    for at in range(a.strides["k"]):
        column = _stride("c", a.strides["k"], at) if a.spec.fmt.key.quantized else "c"
        lines += [
            f"c_{at} = {column}",
            f"c_ok_{at} = (c < {a.columns}) & (c_{at} < {a.spec.head_dim})",
            f"where_q = (head * rows + row)[:, None] * {a.spec.head_dim} + c_{at}[None, :]",
            f"q_{at} = tl.load(q_ptr + where_q, mask=row_ok[:, None] & c_ok_{at}[None, :], other=0.0) * scale",
        ]
    lines += [
        f"most = tl.full(({ROWS},), {_NEVER}, tl.float32)",
        f"total = tl.zeros(({ROWS},), tl.float32)",
        f"out = tl.zeros(({ROWS}, {a.dims}), tl.float32)",
        f"tiles = tl.cdiv(tokens, {a.tile})",
        "first = tiles * split // splits",
        "end = tiles * (split + 1) // splits",
        f"whole = tl.minimum({least}, tokens) // {a.tile}",  # tiles without a number of the window
        "for tile in range(first, tl.minimum(end, whole)):",
        *_indent(_tile(a, mixed=False)),
        "for tile in range(tl.maximum(first, whole), end):",
        *_indent(_tile(a, mixed=True)),
        f"to = ((head * tl.num_programs(1) + row_tile) * splits + split) * {ROWS} + tl.arange(0, {ROWS})",
        f"tl.store(part_ptr + to[:, None] * {a.dims + 2} + d[None, :], out)",
        f"tl.store(part_ptr + to * {a.dims + 2} + {a.dims}, most)",
        f"tl.store(part_ptr + to * {a.dims + 2} + {a.dims + 1}, total)",
    ]
    return lines


def _tile(a: TritonAttend, mixed: bool) -> list[str]:
    """One tile; `mixed`: with tokens of the float16 window, or behind the last."""
    strides = range(a.strides["v"])
    lines: list[str] = []
    for s in strides:
        lines += [f"t = tile * {a.tile} + {_stride('u', a.strides['v'], s)}", *_scores(a, s, mixed)]
    top = "most"
    for s in strides:
        top = f"tl.maximum({top}, tl.max(s_{s}, axis=1))"
    lines += [f"top = {top}", "fade = tl.exp(most - top)", "most = top", "total *= fade", "out *= fade[:, None]"]
    lines += _value_bytes(a, mixed)
    for s in strides:
        lines += [
            f"p = tl.where(s_{s} > {_NEVER}, tl.exp(s_{s} - top[:, None]), 0.0)",
            "total += tl.sum(p, axis=1)",
            f"t = tile * {a.tile} + {_stride('u', a.strides['v'], s)}",
            *_numbers(a, "v", s, mixed),
            'out = tl.dot(p, x, out, input_precision="tf32x3")',
        ]
    return lines


def _scores(a: TritonAttend, s: int, mixed: bool) -> list[str]:
    """`s_<s>` [rows, tokens]: scores, where a query may look."""
    lines = [f"s_{s} = tl.zeros(({ROWS}, {a.stride_tokens}), tl.float32)"]
    side = a.spec.fmt.key
    if side.quantized:
        panel = a.spec.panel_bytes("k") * side.bits
        where = (
            f"(t // {LANES} * {panel} + t % {LANES} * 4)[:, None] + {_inside('c', side.bits, 64 * side.bits)}[None, :]"
        )
        live = f"(c < {a.columns})[None, :]" + (" & (t < k_stored)[:, None]" if mixed else "")
        plane = f"k_plane0_ptr + head * (capacity // {LANES} * {panel})"
        lines.append(f"bytes = tl.load({plane} + {where}, mask={live}, other=0).to(tl.uint32)")
    for at in range(a.strides["k"]):
        lines += _numbers(a, "k", at, mixed)
        lines.append(f's_{s} = tl.dot(q_{at}, tl.trans(x), s_{s}, input_precision="tf32x3")')
    return [
        *lines,
        "seen = t[None, :] <= newest[:, None]",
        "where_m = head // heads * mask_batch + query[:, None] * mask_query + t[None, :]",
        "keep = tl.load(mask_ptr + where_m, mask=seen & (masked != 0) & row_ok[:, None], other=1)",
        f"s_{s} = tl.where(seen & (keep != 0), s_{s}, {_NEVER})",
    ]


def _value_bytes(a: TritonAttend, mixed: bool) -> list[str]:
    """`bytes` [stride tokens, dims]: all codes of the tile, loaded once."""
    side, per = a.spec.fmt.value, KV_BLOCK // a.strides["v"]
    if not side.quantized:
        return []
    block = a.spec.panel_bytes("v") * side.bits
    first = f"tile * {a.tile // KV_BLOCK} + u // {per}"
    row = f"(({first}) * {block} + u % {per} // 4 * 64 + u % 4)[:, None]"
    # A block that is stored in part holds old codes behind: they are not used.
    live = "d_ok[None, :]" + (f" & (({first}) * {KV_BLOCK} < v_stored)[:, None]" if mixed else "")
    where = f"v_plane0_ptr + head * (capacity // {KV_BLOCK} * {block}) + {row}"
    inside = f"(d // {LANES} * {64 * side.bits} + d % {LANES} * 4)[None, :]"
    return [f"bytes = tl.load({where} + {inside}, mask={live}, other=0).to(tl.uint32)"]


def _numbers(a: TritonAttend, letter: str, at: int, mixed: bool) -> list[str]:
    """`x` float32 [tokens, columns]: keys or values of the tokens `t`, from `bytes` and from the window."""
    side = dict(a.spec.sides)[letter]
    dim, ok = (f"c_{at}", f"c_ok_{at}") if letter == "k" else ("d", "d_ok")
    rows = f"{letter}_rows"
    lines = []
    if side.quantized:
        lines += _sides(a, letter, side, dim, ok, mixed)
        names = {"w0": "bytes", "s0": str(at * side.bits), "scale": "scales", "offset": "minima"}
        lines.append(f"x = {Printer(lines, '').run(side_program(side.bits), names)}")
    window = f"{letter}_window" in a.spec.operands
    if window and (mixed or not side.quantized):
        lines.append(f"{rows} = {a.spec.fmt.window if side.quantized else 'capacity'}")
        where = f"head * ({rows} * {a.spec.head_dim}) + (t % {rows})[:, None] * {a.spec.head_dim} + {dim}[None, :]"
        live = f"{ok}[None, :]" + (" & (t < tokens)[:, None]" if mixed else "")
        live += f" & (t >= {letter}_stored)[:, None]" if side.quantized else ""
        lines.append(f"half = tl.load({letter}_window_ptr + {where}, mask={live}, other=0.0).to(tl.float32)")
        lines.append(f"x = tl.where((t < {letter}_stored)[:, None], x, half)" if side.quantized else "x = half")
    elif mixed:  # whatever the last block holds behind the last token must not meet a probability of zero as NaN
        lines.append("x = tl.where((t < tokens)[:, None], x, 0.0)")
    return lines


def _sides(a: TritonAttend, letter: str, side: KVSide, dim: str, ok: str, mixed: bool) -> list[str]:
    """`scales`, `minima`: float32, of a shape that goes with [tokens, columns]."""
    live, groups, dims = f"(t < {letter}_stored)", side.dim_groups(a.spec.head_dim), a.spec.head_dim
    own = f"head * (capacity // {max(side.group, 1)} * {dims})"
    if side.along == "channel" and side.group % a.tile == 0:
        where, mask = f"({own} + tile * {a.tile} // {side.group} * {dims} + {dim})[None, :]", f"{ok}[None, :]"
        mask += f" & (tile * {a.tile} < {letter}_stored)" if mixed else ""
    elif side.along == "channel":
        where = (
            f"head * (capacity // {side.group} * {a.spec.head_dim}) + (t // {side.group} * {a.spec.head_dim})[:, None]"
        )
        where, mask = f"{where} + {dim}[None, :]", f"{ok}[None, :]" + (f" & {live}[:, None]" if mixed else "")
    elif groups == 1:
        where, mask = "(head * capacity + t)[:, None]", f"{live}[:, None]" if mixed else ""
    else:
        group = f"({dim} // {side.dim_group(a.spec.head_dim)} * capacity)[None, :]"
        where = f"head * ({groups} * capacity) + t[:, None] + {group}"
        mask = f"{ok}[None, :]" + (f" & {live}[:, None]" if mixed else "")
    guard = f", mask={mask}, other=0.0" if mask else ""
    return [
        f"{name} = tl.load({letter}_{operand}_ptr + {where}{guard}).to(tl.float32)"
        for name, operand in (("scales", "scale"), ("minima", "minimum"))
    ]


def _join(a: TritonAttend) -> list[str]:
    """The shares of one row, some at a time. A row whose every token is masked gives zeros."""
    wide = a.dims + 2
    return [
        "head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)",
        f"d = tl.arange(0, {a.dims})",
        f"start = (head * row_tiles + row // {ROWS}) * splits * {ROWS} + row % {ROWS}",
        f"most = {_NEVER} + tl.zeros((1,), tl.float32)",
        "total = tl.zeros((1,), tl.float32)",
        f"out = tl.zeros(({a.dims},), tl.float32)",
        f"for part in range(tl.cdiv(splits, {_JOINED})):",
        *_indent([
            f"i = part * {_JOINED} + tl.arange(0, {_JOINED})",
            "live = i < splits",
            f"at = (start + i * {ROWS}) * {wide}",
            f"m = tl.load(part_ptr + at + {a.dims}, mask=live, other={_NEVER})",
            f"n = tl.load(part_ptr + at + {a.dims + 1}, mask=live, other=0.0)",
            "x = tl.load(part_ptr + at[:, None] + d[None, :], mask=live[:, None], other=0.0)",
            "top = tl.maximum(most, tl.max(m, axis=0))",
            "fade, share = tl.exp(most - top), tl.exp(m - top)",
            "total = total * fade + tl.sum(n * share, axis=0)",
            "out = out * fade + tl.sum(x * share[:, None], axis=0)",
            "most = top",
        ]),
        "out = tl.where(total == 0.0, 0.0, out / total)",
        f"tl.store(out_ptr + (head * rows + row) * {a.spec.head_dim} + d, out, mask=d < {a.spec.head_dim})",
    ]  # fmt: skip
