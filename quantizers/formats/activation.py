"""How activations are rounded at run time: `ActivationFormat`, with a text form like that of weight formats.

`int8.token` has one scale per token; `int8.g64` one per token and 64 columns; `int4.g64.w2` keeps the first two
groups at 8 bits (the mixed blocks of "COMET: Towards Practical W4A4KV4 LLMs Serving", whose permutation brings the
channels with outliers there); `e4m3.token` rounds to FP8. `c90` takes 90 % of the largest magnitude as the range (the
clipping of "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"), `static` scales fixed by calibration.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats.base import Element
from lowbit.quantizers.formats.integer import IntElement
from lowbit.quantizers.formats.minifloat import FloatElement

__all__ = ["WIDE_BITS", "ActivationFormat", "parse_activation"]

WIDE_BITS = 8
"""Bits of the leading groups of a mixed format."""

_TINY = 1e-30
"""A group all below this counts as zero: the reciprocal of its scale would overflow."""


@dataclass(frozen=True)
class ActivationFormat:
    """Symmetric rounding of [tokens, K] to `element`, with a float32 scale per token and group of columns.

    group: columns that share a scale, 0 for all. wide: leading groups that are int8 instead. clip: share of the
    largest magnitude that becomes the largest level; what lies beyond saturates. static: scales are the same for all
    tokens, fixed beforehand.
    """

    element: Element
    group: int = 0
    wide: int = 0
    clip: float = 1.0
    static: bool = False

    def __post_init__(self) -> None:
        if self.wide and not (isinstance(self.element, IntElement) and self.group):
            raise FormatError("LB0240", f"{self.element.name} cannot have wide groups", hint="write int4.g64.w2")
        if isinstance(self.element, IntElement) and self.element.bits == 1:
            raise FormatError("LB0240", "activations of one bit have no zero", hint="use int2 or more")

    def __str__(self) -> str:
        parts = [self.element.name, f"g{self.group}" if self.group else "token"]
        parts += [f"w{self.wide}"] if self.wide else []
        parts += [f"c{round(self.clip * 100)}"] if self.clip != 1.0 else []
        return ".".join([*parts, *(["static"] if self.static else [])])

    @property
    def integer(self) -> bool:
        """True when values are small integers times the scale."""
        return isinstance(self.element, IntElement)

    @cached_property
    def top(self) -> float:
        """The largest level."""
        levels = self.element.levels()
        return float(levels[levels.isfinite()].max())

    def group_size(self, k: int) -> int:
        """Columns that share a scale in `k` columns."""
        return min(self.group, k) if self.group else k

    def groups(self, k: int) -> int:
        """Scales per token; the last group is ragged when the group size does not divide `k`."""
        return math.ceil(k / self.group_size(k))

    def tops(self, k: int) -> Tensor:
        """float32 [groups]: the largest level of every group."""
        tops = torch.full((self.groups(k),), self.top)
        tops[: self.wide] = 2.0 ** (WIDE_BITS - 1) - 1
        return tops

    def bits_per_value(self, k: int) -> float:
        """Bits per activation of `k` columns, scales of float32 included unless they are static."""
        groups, size = self.groups(k), self.group_size(k)
        wide = min(self.wide * size, k)
        codes = wide * WIDE_BITS + (k - wide) * self.element.bits
        return (codes + (0 if self.static else 32 * groups)) / k

    def scales(self, x: Tensor) -> Tensor:
        """float32 [..., groups]: the dynamic scales of x [..., K]; 0 for groups of zeros, NaN for ones with inf or NaN.

        Groups smaller than 1e-30 throughout count as zeros.
        """
        largest = self._grouped(x.float()).abs().amax(-1) * self.clip
        step = largest / self.tops(x.shape[-1]).to(x.device)
        step = torch.where(largest > _TINY, step, torch.zeros_like(step))
        return torch.where(largest.isfinite(), step, torch.full_like(step, torch.nan))

    def round(self, x: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(levels float32 [..., K], scales float32 [..., groups]) of x [..., K].

        scales: [groups], for static formats. Levels are rounded to nearest, ties to even, and saturate: integers at
        [-top - 1, top]. Where a scale is zero or NaN, levels are zero. Raises FormatError (LB0241) without the scales
        of a static format.
        """
        k = x.shape[-1]
        if self.static and scales is None:
            raise FormatError("LB0241", f"{self} needs the scales that calibration found")
        steps = self.scales(x) if scales is None else scales.float().expand(*x.shape[:-1], -1)
        inverse = torch.where(steps > 0, 1.0 / steps, torch.zeros_like(steps))
        scaled = self._grouped(x.float()) * inverse[..., None]
        scaled = torch.where(scaled.isfinite(), scaled, torch.zeros_like(scaled))
        tops = self.tops(k).to(x.device)[:, None]
        if self.integer:
            levels = torch.minimum(torch.maximum(scaled.round(), -tops - 1), tops)
        else:
            levels = self._nearest(scaled)
        return levels.flatten(-2)[..., :k], steps

    def apply(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """x rounded to this format and back, in x's dtype: what a model with such activations computes with."""
        levels, steps = self.round(x, scales)
        wide = steps.repeat_interleave(self.group_size(x.shape[-1]), dim=-1)[..., : x.shape[-1]]
        return (levels * wide).to(x.dtype)

    def _grouped(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., groups, columns], zeros in the last group's missing columns."""
        k, size = x.shape[-1], self.group_size(x.shape[-1])
        padded = torch.nn.functional.pad(x, (0, self.groups(k) * size - k))
        grouped: Tensor = padded.unflatten(-1, (self.groups(k), size))
        return grouped

    def _nearest(self, x: Tensor) -> Tensor:
        assert isinstance(self.element, FloatElement)
        levels: Tensor = self.element.levels().to(x.device)
        return levels[self.element.encode(x).long()]


@cache
def parse_activation(text: str) -> ActivationFormat:
    """The activation format written as `text`; raises FormatError (LB0240) saying what one looks like.

    >>> str(parse_activation("int4.g64.w2")), str(parse_activation("e4m3.token"))
    ('int4.g64.w2', 'e4m3.token')
    """
    head, *rest = text.strip().split(".")
    element = IntElement.parse(head, True) or FloatElement.parse(head, True)
    values: dict[str, int] = {}
    for part in rest:
        m = re.fullmatch(r"([gwc])([1-9]\d{0,6})|token|static", part)
        key = m[1] or m[0] if m else part
        if m is None or key in values:
            raise _unknown(text, f"{part!r} is not understood" if m is None else f"{part!r} is said twice")
        values[key] = int(m[2] or 1)
    if element is None or ("g" in values) == ("token" in values) or values.get("c", 100) > 100:
        raise _unknown(text, "an element and either `token` or a group are needed" if element else f"no {head!r}")
    clip = values.get("c", 100) / 100
    return ActivationFormat(element, values.get("g", 0), values.get("w", 0), clip, "static" in values)


def _unknown(text: str, why: str) -> FormatError:
    return FormatError(
        "LB0240",
        f"cannot read activation format {text!r}: {why}",
        hint="write int8.token, int8.g64, int4.g64.w2 (two groups of 8 bits), int4.token.c90 or e4m3.token",
    )
