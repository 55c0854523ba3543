"""How activations are rounded at run time: `ActivationFormat`, with a text form like that of weight formats.

`int8.token` has one scale per token; `int8.g64` one per token and 64 columns; `int4.g64.w2` keeps the first two
groups at 8 bits (the mixed blocks of "COMET: Towards Practical W4A4KV4 LLMs Serving", whose permutation brings the
channels with outliers there), `w2x16` at 16. `int8.token.w32x16` has 16 bits and a scale of their own for the leading
32 columns: the outlier channels of "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", which then do
not enter the scale of the others. `e4m3.token` rounds to FP8. `c90` takes 90 % of the largest magnitude as the range
(the clipping of "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"), `static` scales fixed by calibration.

`int4.g64.asym` spends its 16 levels on the range from the group's least value to its largest, zero among them, instead
of on as much below zero as above. No zero point is left to correct for: levels are consecutive signed integers times
the scale, and only which sixteen of them are in use differs from group to group (-15 to 0, ... 0 to 15). All fit int8,
so that kernels multiply them as they do symmetric ones.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats.base import K_ALIGN, Element
from lowbit.quantizers.formats.integer import IntElement
from lowbit.quantizers.formats.minifloat import FloatElement

__all__ = ["WIDE_TOPS", "ActivationFormat", "parse_activation"]

WIDE_TOPS = {8: 127.0, 16: 32639.0}
"""Bits that leading columns may have -> their largest level. 16 bits are two signed digits of 8: 127 * 256 + 127."""

_TINY = 1e-30
"""A group all below this counts as zero: the reciprocal of its scale would overflow."""


@dataclass(frozen=True)
class ActivationFormat:
    """Rounding of [tokens, K] to `element`, with a float32 scale per token and group of columns.

    group: columns that share a scale, 0 for all. wide: leading groups that are integers of `wide_bits` instead; with
    one scale per token, leading columns, which get a scale of their own. clip: share of the largest magnitude that
    becomes the largest level; what lies beyond saturates. static: scales are the same for all tokens, fixed beforehand.
    asym: columns that are not wide use the 2**bits consecutive integers that cover their group's range and zero.
    """

    element: Element
    group: int = 0
    wide: int = 0
    clip: float = 1.0
    static: bool = False
    wide_bits: int = 8
    asym: bool = False

    def __post_init__(self) -> None:
        if self.wide and not isinstance(self.element, IntElement):
            raise FormatError("LB0240", f"{self.element.name} cannot have wide groups", hint="write int4.g64.w2")
        if self.wide_bits not in WIDE_TOPS:
            raise FormatError("LB0240", f"wide groups have 8 or 16 bits, not {self.wide_bits}", hint="write w1x16")
        if self.wide % K_ALIGN and not self.group:
            raise FormatError(
                "LB0240",
                f"{self.wide} wide columns of a token are not a multiple of {K_ALIGN}",
                hint="write int8.token.w32x16, or int4.g64.w2 for groups",
            )
        if isinstance(self.element, IntElement) and self.element.bits == 1:
            raise FormatError("LB0240", "activations of one bit have no zero", hint="use int2 or more")
        if self.asym and (not isinstance(self.element, IntElement) or self.element.bits > 7 or self.static):
            raise FormatError(
                "LB0240",
                f"{self.element.name} cannot be asymmetric" + " with static scales" * self.static,
                hint="int2 to int7 with dynamic scales can: write int4.g64.asym",
            )

    def __str__(self) -> str:
        parts = [self.element.name, f"g{self.group}" if self.group else "token"]
        parts += [f"w{self.wide}" + (f"x{self.wide_bits}" if self.wide_bits != 8 else "")] if self.wide else []
        parts += [f"c{round(self.clip * 100)}"] if self.clip != 1.0 else []
        return ".".join([*parts, *(["asym"] if self.asym else []), *(["static"] if self.static else [])])

    @property
    def integer(self) -> bool:
        """True when values are small integers times the scale."""
        return isinstance(self.element, IntElement)

    @cached_property
    def top(self) -> float:
        """The largest level of columns that are not wide; of asymmetric ones, how many levels lie beside zero."""
        if self.asym:
            return float(2**self.element.bits - 1)
        levels = self.element.levels()
        return float(levels[levels.isfinite()].max())

    @property
    def saturates(self) -> bool:
        """True when rounding to nearest alone can lead beyond the levels."""
        return self.static or self.clip != 1.0 or self.asym or not self.integer

    @property
    def lead(self) -> int:
        """Leading columns with a scale of their own in a format that else has one per token."""
        return 0 if self.group else self.wide

    def group_size(self, k: int) -> int:
        """Columns that share a scale in `k` columns, those of `lead` aside."""
        return min(self.group, k) if self.group else k

    def wide_columns(self, k: int) -> int:
        """How many of `k` columns are wide: the leading ones."""
        return min(self.wide * self.group_size(k) if self.group else self.wide, k)

    def groups(self, k: int) -> int:
        """Scales per token; the last group is ragged when the group size does not divide `k`."""
        return sum(count for _, count, _ in self._parts(k))

    def sizes(self, k: int) -> list[int]:
        """Columns of every group."""
        return [n for columns, _, size in self._parts(k) for n in _cut(columns.stop - columns.start, size)]

    def tops(self, k: int) -> Tensor:
        """float32 [groups]: the largest level of every group, or how many steps its range has if it is asymmetric."""
        wide = self.wide_columns(k)
        return torch.cat([self._top(c.start < wide).expand(n) for c, n, _ in self._parts(k)])

    def bits_per_value(self, k: int) -> float:
        """Bits per activation of `k` columns, scales of float32 included unless they are static; and which level of an
        asymmetric group is the least."""
        wide = self.wide_columns(k)
        codes = wide * self.wide_bits + (k - wide) * self.element.bits
        least = sum(n for c, n, _ in self._parts(k) if c.start >= wide) * self.element.bits if self.asym else 0
        return (codes + least + (0 if self.static else 32 * self.groups(k))) / k

    def scales(self, x: Tensor) -> Tensor:
        """float32 [..., groups]: the dynamic scales of x [..., K]; 0 for groups of zeros, NaN for ones with inf or NaN.

        Groups smaller than 1e-30 throughout count as zeros.
        """
        parts, wide = self._parts(x.shape[-1]), self.wide_columns(x.shape[-1])
        found = [self._range(_grouped(x[..., c].float(), size), c.start < wide) for c, _, size in parts]
        largest = torch.cat([high - low for low, high in found], -1) * self.clip
        step = largest / self.tops(x.shape[-1]).to(x.device)
        step = torch.where(largest > _TINY, step, torch.zeros_like(step))
        return torch.where(largest.isfinite(), step, torch.full_like(step, torch.nan))

    def round(self, x: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(levels float32 [..., K], scales float32 [..., groups]) of x [..., K].

        scales: [groups], for static formats. Levels are rounded to nearest, ties to even, and saturate: integers at
        [-top - 1, top], asymmetric ones where their group's range ends. Where a scale is zero or NaN, levels are zero.
        Raises FormatError (LB0241) without the scales of a static format.
        """
        k = x.shape[-1]
        if self.static and scales is None:
            raise FormatError("LB0241", f"{self} needs the scales that calibration found")
        steps = self.scales(x) if scales is None else scales.float().expand(*x.shape[:-1], -1)
        levels, first, wide = [], 0, self.wide_columns(k)
        for columns, count, size in self._parts(k):
            own, first = steps[..., first : first + count], first + count
            grouped = _grouped(x[..., columns].float(), size)
            found = self._levels(grouped, own[..., None], columns.start < wide).flatten(-2)
            levels.append(found[..., : columns.stop - columns.start])
        return torch.cat(levels, -1) if len(levels) > 1 else levels[0], steps

    def apply(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """x rounded to this format and back, in x's dtype: what a model with such activations computes with."""
        levels, steps = self.round(x, scales)
        sizes = torch.tensor(self.sizes(x.shape[-1]), device=x.device)
        return (levels * steps.repeat_interleave(sizes, dim=-1)).to(x.dtype)

    def _parts(self, k: int) -> list[tuple[slice, int, int]]:
        """(columns, groups, columns of a group) of the wide and of the other columns of `k`, where there are any."""
        wide, size = self.wide_columns(k), self.group_size(k)
        parts = [(slice(0, wide), min(size, wide)), (slice(wide, k), size if self.group else k - wide)]
        return [(c, math.ceil((c.stop - c.start) / n), n) for c, n in parts if c.stop > c.start]

    def _top(self, wide: bool) -> Tensor:
        return torch.tensor(WIDE_TOPS[self.wide_bits] if wide else self.top)

    def _levels(self, grouped: Tensor, steps: Tensor, wide: bool) -> Tensor:
        """Of x [..., groups, columns] under steps [..., groups, 1]."""
        scaled = grouped * torch.where(steps > 0, 1.0 / steps, torch.zeros_like(steps))
        scaled = torch.where(scaled.isfinite(), scaled, torch.zeros_like(scaled))
        if not self.integer:
            return self._nearest(scaled)
        low, high = -float(self._top(wide)) - 1, float(self._top(wide))
        if not self.asym or wide:
            return scaled.round().clamp(low, high)
        least = (scaled.amin(-1, keepdim=True).clamp(max=0) * self.clip).round()
        return scaled.round().clamp(least, least + high)

    def _range(self, grouped: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
        """Where the levels of x [..., groups, columns] begin and end; symmetric ones are taken to begin at zero."""
        if self.asym and not wide:
            return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        high = grouped.abs().amax(-1)
        return torch.zeros_like(high), high

    def _nearest(self, x: Tensor) -> Tensor:
        assert isinstance(self.element, FloatElement)
        levels: Tensor = self.element.levels().to(x.device)
        return levels[self.element.encode(x).long()]


def _grouped(x: Tensor, size: int) -> Tensor:
    """[..., K] -> [..., groups, columns], zeros in the last group's missing columns."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    grouped: Tensor = padded.unflatten(-1, (-1, size))
    return grouped


def _cut(columns: int, size: int) -> list[int]:
    return [min(size, columns - start) for start in range(0, columns, size)]


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
        m = re.fullmatch(r"([gc])([1-9]\d{0,6})|(w)([1-9]\d{0,6})(?:x(8|16))?|token|asym|static", part)
        key = m[1] or m[3] or m[0] if m else part
        if m is None or key in values:
            raise _unknown(text, f"{part!r} is not understood" if m is None else f"{part!r} is said twice")
        values[key] = int(m[2] or m[4] or 1)
        values |= {"x": int(m[5] or 8)} if m[3] else {}
    if element is None or ("g" in values) == ("token" in values) or values.get("c", 100) > 100:
        raise _unknown(text, "an element and either `token` or a group are needed" if element else f"no {head!r}")
    clip = values.get("c", 100) / 100
    return ActivationFormat(
        element, values.get("g", 0), values.get("w", 0), clip, "static" in values, values.get("x", 8), "asym" in values
    )


def _unknown(text: str, why: str) -> FormatError:
    return FormatError(
        "LB0240",
        f"cannot read activation format {text!r}: {why}",
        hint="write int8.token, int8.g64, int4.g64.w2 (two groups of 8 bits), int8.token.w32x16 (32 columns of 16), "
        "int4.g64.asym, int4.token.c90 or e4m3.token",
    )
