"""Products of bfloat16 numbers: what can be multiplied so, and how weights become such numbers.

One instruction multiplies 32 pairs and adds them to 16 float32 sums. Codes of few bits stand for bfloat16 numbers
exactly, and activations that arrive as such need no rounding: nothing is lost but what float32 sums lose, and what is
below 2**-126, which counts as 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from lowbit.codegen.spec import KernelSpec
from lowbit.quantizers.formats.base import Element

__all__ = ["BF16_CHUNKS", "Lookup", "bf16_lookup", "bf16_problem", "folds"]

_WORDS, _BYTES = (32, 64), 128  # entries of what one instruction looks up: words, of one register or two, and bytes
_SIGN, _INFINITY = 0x8000, 0x7F80
BF16_CHUNKS = 4
"""Chunks of one block that buffered kernels multiply before sums leave registers, where no scale meets them."""
_SIGNIFICANT = 8  # bits of a bfloat16 number's significand, the hidden one included


@dataclass(frozen=True)
class Lookup:
    """How codes become bfloat16 numbers: the bits of all of them, `words`, are looked up at once (32 or 64 entries), or
    as high and low bytes (128). signed: bit 7 of a code is the number's sign, and the table is of those below."""

    words: tuple[int, ...]
    signed: bool

    @property
    def bytewise(self) -> bool:
        """True for tables of bytes."""
        return len(self.words) == _BYTES


@cache
def bf16_lookup(element: Element) -> Lookup | None:
    """The tables of an element, or None where some value is no bfloat16 number, or where codes of eight bits have no
    sign on top, and so need larger tables."""
    if element.window > 1:
        return None
    levels = element.levels()
    rounded = levels.to(torch.bfloat16)
    if not torch.equal(rounded.float().nan_to_num(), levels.nan_to_num()):
        return None
    words = tuple(bits & 0xFFFF for bits in rounded.view(torch.int16).tolist())
    for size in (*_WORDS, _BYTES):
        if len(words) <= size:
            return Lookup(words * (size // len(words)), False)
    low, high = words[:_BYTES], words[_BYTES:]
    pairs = [(a ^ _SIGN, b) for a, b in zip(low, high, strict=True)]
    mirrored = all(a == b or (_nan(a) and _nan(b)) for a, b in pairs)
    return Lookup(low, True) if mirrored else None


def _nan(word: int) -> bool:
    return word & ~_SIGN > _INFINITY


@cache
def _significant(element: Element) -> int:
    """The most significant bits that a finite value of the element has."""
    levels = element.levels()
    parts = torch.frexp(levels[levels.isfinite()]).mantissa.abs().tolist()
    return max(next(n for n in range(25) if (part * 2**n).is_integer()) for part in parts)


def folds(spec: KernelSpec) -> bool:
    """Whether a value times its group's scale is a bfloat16 number, so that scales need not meet sums: powers of two,
    and e4m3, which has four significant bits, of short values."""
    most = {"e8m0": _SIGNIFICANT, "e4m3": _SIGNIFICANT - 4}.get(spec.scale_dtype, -1)
    return _significant(spec.fmt.element) <= most


def bf16_problem(spec: KernelSpec) -> str | None:
    """Why a spec's products cannot be of bfloat16 numbers, or None."""
    if spec.vector:
        return "codebooks hold float16 numbers"
    if spec.x_dtype != "bf16" or spec.rounding or spec.rotate or spec.norm_eps:
        return "activations are bfloat16 numbers only where they arrive so and stay so"
    if spec.fmt.zero or spec.fmt.offset:
        return "weights without their scales are no levels where there are zero points or offsets"
    if bf16_lookup(spec.fmt.element) is None:
        return f"no table of bfloat16 numbers holds the values of {spec.fmt.element.name}"
    return None
