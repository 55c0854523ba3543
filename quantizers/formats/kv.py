"""Formats of a quantized key-value cache.

Keys and values have a `KVSide` each: how many bits, and which numbers share a scale and a minimum. Value of a code:
`code * scale + minimum`, both float16. Per *channel*, `kc64`: 64 consecutive tokens of one head dimension, as in "KIVI:
A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (Liu et al.) and "COMET: Towards Practical W4A4KV4 LLMs
Serving" (Liu et al.). Per *token*, `vt32`: 32 head dimensions of one token, `vt` all of them, as KIVI does for values.

Text form, which round-trips: `kv4.kc64.vt.w64`, `k4v2.kc32.vt32.w128`, `k16v4.vt.w64`, `kv4.kt.vt.rot`. `w64` keeps the
newest tokens as float16; `rot` rotates keys and queries by a Hadamard matrix ("QuaRot: Outlier-Free 4-Bit Inference in
Rotated LLMs", Ashkboos et al.); `gear2r4` corrects the error by 2 % exact outliers and factors of rank 4 ("GEAR: An
Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM", Kang et al.).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats.integer import IntElement

__all__ = ["KV_BITS", "KV_BLOCK", "Gear", "KVFormat", "KVSide", "parse_kv_format"]

KV_BITS = (2, 4, 8, 16)
"""Widths of keys and values; 16 stays float16."""

KV_BLOCK = 32
"""Groups are multiples of this, in either direction: packed codes come in blocks of 32."""

_SIDE_BYTES = 4  # one float16 scale and one float16 minimum


@dataclass(frozen=True)
class KVSide:
    """Keys or values. bits: of a code, 16 for float16. along: groups run along tokens of a `channel`, or along head
    dimensions of a `token`. group: numbers per group; 0 for all head dimensions of a token."""

    bits: int
    along: Literal["channel", "token"] = "token"
    group: int = 0

    def __post_init__(self) -> None:
        if self.bits not in KV_BITS:
            raise FormatError("LB0250", f"keys and values have {KV_BITS} bits, not {self.bits}")
        if self.group % KV_BLOCK or self.group < 0 or (self.along == "channel" and self.quantized and not self.group):
            raise FormatError("LB0251", f"a group of {self.group} keys or values", hint="use a multiple of 32")

    @property
    def quantized(self) -> bool:
        """False for float16."""
        return self.bits < 16

    @property
    def element(self) -> IntElement:
        """The codec of one code."""
        return IntElement(self.bits, symmetric=False)

    @property
    def token_group(self) -> int:
        """Tokens that share a scale: 1 unless groups run along tokens."""
        return self.group if self.quantized and self.along == "channel" else 1

    def dim_group(self, head_dim: int) -> int:
        """Head dimensions that share a scale."""
        return 1 if self.along == "channel" else min(self.group or head_dim, head_dim)

    def dim_groups(self, head_dim: int) -> int:
        """Scales of one token of one head (per channel: of one group of tokens); the last group may be smaller."""
        return math.ceil(head_dim / self.dim_group(head_dim))

    def text(self, letter: str) -> str:
        """`kc64`, `vt`: this side's part of the text form."""
        return f"{letter}{self.along[0]}{self.group or ''}" if self.quantized else ""

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Bytes of `tokens` stored tokens of one head: codes, scales and minima. Whole groups only."""
        codes = tokens * head_dim * self.bits // 8
        groups = tokens // self.token_group * self.dim_groups(head_dim)
        return codes + (groups * _SIDE_BYTES if self.quantized else 0)


@dataclass(frozen=True)
class Gear:
    """GEAR's correction of one block of tokens. percent: of the entries of each vector (keys: a channel of the block,
    values: a token) that are kept exactly, half of them the largest, half the smallest. rank: of the two factors."""

    percent: int
    rank: int

    def __post_init__(self) -> None:
        if not (0 <= self.percent <= 50 and 1 <= self.rank <= 64):
            raise FormatError("LB0252", f"gear{self.percent}r{self.rank} is out of range", hint="use gear2r4")

    def outliers(self, length: int) -> int:
        """Entries kept at each end of a vector of `length`."""
        return math.ceil(self.percent / 200 * length)

    def nbytes(self, tokens: int, head_dim: int, vectors: int) -> int:
        """Bytes of one block of one head: factors, outliers and their places. vectors: how many have outliers."""
        length = tokens * head_dim // vectors
        place = 1 if length <= 256 else 2
        return 2 * self.rank * (tokens + head_dim) + vectors * 2 * self.outliers(length) * (2 + place)


@dataclass(frozen=True)
class KVFormat:
    """What a cache stores. window: newest tokens kept as float16.

    A side with groups along tokens, and both sides with `gear`, are quantized `window` tokens at once, as soon as
    there are so many: tokens % window of them are float16. Otherwise exactly the newest `window` tokens are.
    """

    key: KVSide
    value: KVSide
    window: int = 0
    rotate: bool = False
    gear: Gear | None = None

    def __post_init__(self) -> None:
        for side in (self.key, self.value):
            if self.window % side.token_group or (side.token_group > 1 and not self.window):
                raise FormatError(
                    "LB0253",
                    f"{self} quantizes {side.token_group} tokens at once, but keeps {self.window}",
                    hint="let the window be a multiple of the token group, such as kc64 with w64",
                )
        if self.gear and (not self.window or not self.key.quantized or not self.value.quantized):
            raise FormatError(
                "LB0253", f"{self} has nothing to correct", hint="quantize keys and values, with a window"
            )

    def __str__(self) -> str:
        k, v = self.key, self.value
        parts = [f"kv{k.bits}" if k.bits == v.bits else f"k{k.bits}v{v.bits}", k.text("k"), v.text("v")]
        parts += [f"w{self.window}" if self.window else "", "rot" if self.rotate else ""]
        parts += [f"gear{self.gear.percent}r{self.gear.rank}" if self.gear else ""]
        return ".".join(part for part in parts if part)

    def in_blocks(self, side: KVSide) -> bool:
        """True when this side is quantized `window` tokens at a time."""
        return side.quantized and (side.token_group > 1 or self.gear is not None)

    def stored(self, side: KVSide, tokens: int) -> int:
        """How many of `tokens` tokens are quantized; the others are float16."""
        if not side.quantized:
            return 0
        return tokens - tokens % self.window if self.in_blocks(side) else max(0, tokens - self.window)

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Exact bytes of `tokens` tokens of one key and value head, everything included."""
        total = 0
        for side, vectors in ((self.key, head_dim), (self.value, self.window)):
            stored = self.stored(side, tokens)
            total += side.nbytes(stored, head_dim) + (tokens - stored) * head_dim * 2
            if self.gear:
                total += stored // self.window * self.gear.nbytes(self.window, head_dim, vectors)
        return total

    def bits_per_number(self, head_dim: int) -> float:
        """Bits per number of a long cache, scales included, the window's share left out."""
        span = math.lcm(self.key.token_group, self.value.token_group, self.window or 1)
        longer = self.nbytes(4 * span, head_dim) - self.nbytes(3 * span, head_dim)
        return 8 * longer / (2 * span * head_dim)


_ALIASES = {f"kv{bits}": f"kv{bits}.kc{group}.vt.w64" for bits, group in ((8, 64), (4, 64), (2, 32))}


@cache
def parse_kv_format(text: str) -> KVFormat:
    """The format written as `text`; raises FormatError (LB0250 to LB0253). `kv4` alone means `kv4.kc64.vt.w64`.

    >>> str(parse_kv_format("k4v2.w64.kc64.vt64"))
    'k4v2.kc64.vt64.w64'
    """
    head, *rest = _ALIASES.get(text.strip(), text.strip()).split(".")
    if not (m := re.fullmatch(r"(?:kv(\d{1,2})|k(\d{1,2})v(\d{1,2}))", head)):
        raise _unknown(text, f"{head!r} is not a number of bits")
    bits = {"k": int(m[1] or m[2]), "v": int(m[1] or m[3])}
    sides: dict[str, tuple[Literal["channel", "token"], int]] = {"k": ("token", 0), "v": ("token", 0)}
    window, rotate, gear = 0, False, None
    for part in rest:
        if m := re.fullmatch(r"([kv])([ct])(\d{0,6})", part):
            sides[m[1]] = ("channel" if m[2] == "c" else "token", int(m[3] or 0))
        elif m := re.fullmatch(r"w(\d{1,6})", part):
            window = int(m[1])
        elif part == "rot":
            rotate = True
        elif m := re.fullmatch(r"gear(\d{1,2})r(\d{1,2})", part):
            gear = Gear(int(m[1]), int(m[2]))
        else:
            raise _unknown(text, f"{part!r} is neither a group, a window nor an option")
    side = {name: KVSide(bits[name], *(sides[name] if bits[name] < 16 else ())) for name in "kv"}
    return KVFormat(side["k"], side["v"], window, rotate, gear)


def _unknown(text: str, why: str) -> FormatError:
    return FormatError(
        "LB0250",
        f"cannot read the cache format {text!r}: {why}",
        hint="write kv4.kc64.vt.w64 or k4v2.kc32.vt32.w128.rot",
    )
