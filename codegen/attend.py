"""`AttendSpec`: attention of a few query tokens over a packed key-value cache, and how that cache is laid out.

Both products of attention are of the form (packed matrix) x (vector): scores are keys [tokens, head_dim] times a query,
outputs are values [head_dim, tokens] times probabilities. So both use the layout and the byte dot products of weights:
keys with tokens as rows, values with head dimensions as rows. 32 tokens are a block in either.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property

import torch

from lowbit.codegen.decode import extract_program
from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import LAYOUTS, Layout, plane_bits
from lowbit.compiler.ir.program import Program, program
from lowbit.quantizers.formats.kv import KV_BLOCK, KVFormat, KVSide, parse_kv_format

__all__ = ["LANES", "MAX_QUERIES", "WINDOWS", "AttendSpec", "parse_attend_spec", "side_program"]

LANES = 16
"""Rows of a panel."""

WINDOWS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
"""Types of what is not quantized."""

MAX_QUERIES = 8
"""Query tokens of a call that kernels serve; more of them are a prefill."""


@cache
def side_program(bits: int) -> Program:
    """The number behind a code of keys or values: `value(extract(words)) * scale + offset`, a group's minimum being the
    offset. Kernels that multiply codes as integers stop after the first step."""
    extract = extract_program(*plane_bits(bits))
    p = program(*extract.args, "scale", "offset")
    code = p.inline(extract, {name: p.arg(name) for name in extract.args})
    value = p.inline(KVSide(bits).element.decode(), {"code": code})
    p.result(p.fma(value, p.arg("scale"), p.arg("offset")))
    return p.done()


@dataclass(frozen=True)
class AttendSpec:
    """format: of the cache. head_dim: a multiple of 16. window: type of what is not quantized, float16 beside codes.

    The cache of `batch` sequences of `heads` key-value heads is a list of tensors named by `operands`, all of them
    [batch, heads, ...]: `k_plane0` (packed codes), `k_scale` and `k_minimum` (per channel [groups, head_dim], per token
    [groups, tokens]), `k_window` ([window, head_dim], token t in row t % window), the same for `v`, and
    GEAR's factors and outliers by block.
    """

    format: str
    head_dim: int
    window: str = "f16"

    def __post_init__(self) -> None:
        if self.head_dim % LANES or self.head_dim < LANES:
            raise FormatError("LB0254", f"heads of {self.head_dim} dimensions", hint="only multiples of 16 are packed")
        if self.window not in WINDOWS or (self.window != "f16" and any(side.quantized for _, side in self.sides)):
            raise FormatError("LB0254", f"tokens of {self.format} beside codes are float16, not {self.window}")

    @cached_property
    def fmt(self) -> KVFormat:
        """The cache format, parsed."""
        return parse_kv_format(self.format)

    @property
    def layout(self) -> Layout:
        """Of the codes, as matrices of 16-row panels and blocks of 32 columns."""
        return LAYOUTS["panel16"]

    @property
    def sides(self) -> tuple[tuple[str, KVSide], ...]:
        """Keys and values by the first letter of their operands."""
        return (("k", self.fmt.key), ("v", self.fmt.value))

    @property
    def span(self) -> int:
        """Capacities are multiples of so many tokens."""
        return math.lcm(2 * KV_BLOCK, self.fmt.key.token_group, self.fmt.value.token_group, self.fmt.window or 1)

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the cache's tensors, in order."""
        return tuple(self.shapes(1, 1, self.span))

    def shapes(self, batch: int, heads: int, capacity: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every operand of a cache for `capacity` tokens, a multiple of `span`."""
        out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for letter, side in self.sides:
            if side.quantized:
                out |= self._packed(letter, side, capacity)
            if rows := self.window_rows(side, capacity):
                out[f"{letter}_window"] = (WINDOWS[self.window], (rows, self.head_dim))
        return {name: (dtype, (batch, heads, *shape)) for name, (dtype, shape) in out.items()}

    def window_rows(self, side: KVSide, capacity: int) -> int:
        """Tokens of the part that is not quantized: all of them where nothing is quantized."""
        return self.fmt.window if side.quantized else capacity

    def panel_bytes(self, letter: str) -> int:
        """Bytes per bit of code of one 16-token panel of keys, or one 32-token block of values."""
        tiles = math.ceil(self.head_dim / KV_BLOCK) if letter == "k" else self.head_dim // LANES
        return 64 * tiles

    def _packed(self, letter: str, side: KVSide, capacity: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows = capacity // (LANES if letter == "k" else KV_BLOCK)
        out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            f"{letter}_plane{i}": (torch.uint8, (rows, self.panel_bytes(letter) * width))
            for i, width in enumerate(plane_bits(side.bits))
        }
        groups = side.dim_groups(self.head_dim)
        per_channel = (capacity // side.token_group, self.head_dim)
        sides = per_channel if side.along == "channel" else (groups, capacity)
        out |= {f"{letter}_{name}": (torch.float16, sides) for name in ("scale", "minimum")}
        return out | (self._gear(letter, capacity) if self.fmt.gear else {})

    def _gear(self, letter: str, capacity: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        gear, block = self.fmt.gear, self.fmt.window
        assert gear is not None
        blocks, dims = capacity // block, self.head_dim
        along_tokens = dict(self.sides)[letter].along == "channel"
        length = block if along_tokens else dims
        kept = (2 * gear.outliers(length), dims) if along_tokens else (block, 2 * gear.outliers(length))
        return {
            f"{letter}_left": (torch.float16, (blocks, block, gear.rank)),
            f"{letter}_right": (torch.float16, (blocks, dims, gear.rank)),
            f"{letter}_value": (torch.float16, (blocks, *kept)),
            f"{letter}_place": (torch.uint8 if length <= 256 else torch.int16, (blocks, *kept)),
        }

    @property
    def unrotated(self) -> AttendSpec:
        """The same for keys and queries that somebody else has rotated: what a kernel computes."""
        return replace(self, format=str(replace(self.fmt, rotate=False)))

    def key(self) -> str:
        """Canonical JSON: equal specs, equal text."""
        values = {name: value for name, value in asdict(self).items() if (name, value) != ("window", "f16")}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """16 hex digits that name the kernel in generated source."""
        return hashlib.sha256(self.key().encode()).hexdigest()[:16]


@cache
def parse_attend_spec(key: str) -> AttendSpec:
    """The spec written as canonical JSON by `AttendSpec.key`."""
    return AttendSpec(**json.loads(key))
