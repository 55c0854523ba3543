"""Choosing the scale and zero point of every group, and rounding to the nearest code.

Everything works on scales as they will be stored: a candidate is rounded to the format's scale type first, then codes
are chosen for it. Elements are known by their `levels()` only, so a new family of elements works here unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.compiler.errors import RunError
from lowbit.quantizers.formats import Element, Format
from lowbit.quantizers.qtensor import QTensor

__all__ = ["Codec", "Grid", "codec_of", "search_grid", "stored_scale"]

_CHUNK = 1 << 18  # elements handled at a time: what stays in the second-level cache
_REFITS = 2


@dataclass(frozen=True, eq=False)
class Codec:
    """An element's levels in ascending order, and the code of each. Of levels that occur twice the lowest code wins.

    step: the distance between neighbours when all are equal, else 0; `edges` are then the midpoints.
    """

    values: Tensor
    codes: Tensor
    edges: Tensor
    step: float
    low: float
    high: float
    top: int

    @property
    def has_zero(self) -> bool:
        """True when zero is a level."""
        return bool((self.values == 0).any())

    def index(self, x: Tensor) -> Tensor:
        """Position of the nearest level of every x, as a float tensor (uniform levels) or int64."""
        if self.step:
            return x.sub(self.low).div_(self.step).round_().clamp_(0, self.top)
        return torch.bucketize(x, self.edges)

    def level(self, index: Tensor) -> Tensor:
        """The level at each position."""
        if self.step:
            return index * self.step + self.low
        return self.values[index]

    def code(self, index: Tensor) -> Tensor:
        """uint8 code at each position."""
        return self.codes[index.long()]


@cache
def codec_of(element: Element) -> Codec:
    """The codec of an element (kept: elements are few)."""
    levels = element.levels().float()
    order = torch.argsort(levels, stable=True)
    ordered = levels[order]
    first = torch.ones(len(ordered), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    values, codes = ordered[first], order[first].to(torch.uint8)
    gaps = values.diff()
    uniform = len(gaps) > 0 and bool((gaps == gaps[0]).all())
    return Codec(
        values,
        codes,
        (values[1:] + values[:-1]) / 2,
        float(gaps[0]) if uniform else 0.0,
        float(values[0]),
        float(values[-1]),
        len(values) - 1,
    )


def stored_scale(scale: Tensor, fmt: Format) -> Tensor:
    """float32 scales as `fmt` will store them. Nonzero ones never round to zero: they stop at the smallest number."""
    dtype = fmt.scale_dtype
    info = torch.finfo(dtype)
    floor = info.smallest_normal * (info.eps if dtype == torch.float16 else 1.0)  # only float16 needs subnormals
    magnitude = scale.abs().clamp(max=info.max)
    rounded = magnitude.clamp(min=floor).to(dtype).float()
    return torch.where(scale == 0, torch.zeros_like(scale), torch.copysign(rounded, scale))


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales float32 [rows, groups] (values the format can store) and zero points float32 of that shape, or None."""

    fmt: Format
    scale: Tensor
    zero: Tensor | None

    def column(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point per weight, [rows, k]."""
        size = self.fmt.granularity.group_size(k)
        wide = [s.repeat_interleave(size, dim=1)[:, :k] if s is not None else None for s in (self.scale, self.zero)]
        assert wide[0] is not None
        return wide[0], wide[1]

    def encode(self, weight: Tensor) -> QTensor:
        """Round [N, K] to the nearest code of this grid."""
        codec = codec_of(self.fmt.element)
        scale, zero = self.column(weight.shape[1])
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        for rows in _row_chunks(weight):
            side = slice(None) if scale.shape[0] == 1 else rows
            x = weight[rows] * _inverse(scale[side])
            if zero is not None:
                x += zero[side]
            codes[rows] = codec.code(codec.index(x))
        return self.qtensor(codes)

    def qtensor(self, codes: Tensor) -> QTensor:
        """These codes with this grid's scales and zero points."""
        zero = self.zero.to(torch.uint8) if self.zero is not None else None
        return QTensor(self.fmt, codes, self.scale.to(self.fmt.scale_dtype), zero)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale).nan_to_num_(posinf=3e38, neginf=-3e38)


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def search_grid(
    weight: Tensor, fmt: Format, importance: Tensor | None = None, *, clip: bool = True, signed: bool = False
) -> Grid:
    """Scales (and zero points) of float32 [N, K] that minimise the squared rounding error of each group.

    importance: weight of each column's squared error, [K], such as the diagonal of the Hessian. clip: try ranges
    smaller than the largest weight, then re-fit the scale to the codes in closed form; otherwise cover the range
    exactly (min-max). signed: also try negative scales, which put the longer half of a symmetric integer's levels on
    the other side. Raises RunError (LB0512) when the range overflows the scale type.
    """
    _, k = weight.shape
    kind = fmt.granularity.kind
    if kind == "t":
        wide = None if importance is None else importance.expand_as(weight).reshape(1, -1)
        units = weight.reshape(1, 1, -1)
        scale, zero = _search_units(units, None if wide is None else wide[None], fmt, clip, signed)
        return Grid(fmt, scale, zero)
    size, groups = fmt.granularity.group_size(k), fmt.granularity.groups(k)
    ragged = groups * size - k
    weights = importance if importance is not None else (torch.ones(k) if ragged else None)
    if weights is not None:
        weights = torch.nn.functional.pad(weights.float(), (0, ragged)).reshape(1, groups, size)
    scales, zeros = [], []
    for rows in _row_chunks(weight):
        part = torch.nn.functional.pad(weight[rows], (0, ragged)) if ragged else weight[rows]
        scale, zero = _search_units(part.reshape(-1, groups, size), weights, fmt, clip, signed)
        scales.append(scale)
        zeros.append(zero)
    zero_points = [z for z in zeros if z is not None]
    return Grid(fmt, torch.cat(scales), torch.cat(zero_points) if zero_points else None)


def _shrinks(fmt: Format) -> Tensor:
    """Fractions of the full range to try, largest first. Fewer levels gain from more clipping."""
    lowest = {1: 0.2, 2: 0.3, 3: 0.45, 4: 0.55, 5: 0.7}.get(fmt.bits, 0.8)
    return torch.linspace(1.0, lowest, 16 if fmt.bits < 6 else 9)


def _search_units(
    w: Tensor, importance: Tensor | None, fmt: Format, clip: bool, signed: bool
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point [R, G] of units [R, G, E]."""
    codec = codec_of(fmt.element)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    best = _Best(w, importance, fmt, codec)
    if fmt.zero:
        full = (high / (codec.high - codec.low)) - (low / (codec.high - codec.low))
        _check_range(full, fmt)
        ratio = torch.where(full > 0, codec.low - low / full.clamp(min=1e-45), torch.zeros_like(full)).nan_to_num_(0)
        limit = 2**fmt.bits - 1
        offsets = [ratio.round().clamp(0, limit)]
        if clip:
            offsets = [ratio.floor().clamp(0, limit), ratio.ceil().clamp(0, limit)]
        for shrink in _shrinks(fmt) if clip else torch.ones(1):
            for zero in offsets:
                best.offer(full * shrink, zero)
    else:
        reach = torch.maximum(high, -low)
        full = reach / max(abs(codec.high), 1e-30)
        if not clip:  # the longer half of the levels can serve the side it lies on
            full = torch.maximum(high / codec.high, -low / -codec.low) if codec.low < 0 < codec.high else full
        _check_range(full, fmt)
        for shrink in _shrinks(fmt) if clip else torch.ones(1):
            best.offer(full * shrink, None)
            if signed and clip and codec.low != -codec.high:
                best.offer(-full * shrink, None)
    if clip:
        best.refine()
    return best.result(codec)


def _check_range(full: Tensor, fmt: Format) -> None:
    largest = torch.finfo(fmt.scale_dtype).max
    if bool((full > largest).any()):
        raise RunError(
            "LB0512",
            f"a scale of {float(full.max()):.3g} does not fit {fmt.scale} (at most {largest:.3g})",
            hint=f"use f32 scales: {fmt.element.name}.{fmt.granularity}.{'sym' if not fmt.zero else 'asym'}.f32",
        )


class _Best:
    """The best scale and zero point so far of each unit; strict improvement only, so that ties keep the first."""

    def __init__(self, w: Tensor, importance: Tensor | None, fmt: Format, codec: Codec) -> None:
        self.w, self.h, self.fmt, self.codec = w, importance, fmt, codec
        self.scale = torch.zeros(w.shape[:2])
        self.zero = torch.zeros(w.shape[:2]) if fmt.zero else None
        self.error = torch.full(w.shape[:2], torch.inf)
        self.untried = torch.ones(w.shape[:2], dtype=torch.bool)

    def levels(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Levels minus zero point nearest to w / scale."""
        x = self.w * _inverse(scale)[..., None]
        if zero is not None:
            x += zero[..., None]
        value = self.codec.level(self.codec.index(x))
        return value.sub_(zero[..., None]) if zero is not None else value

    def offer(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Try scales (rounded to storage here) and zero points; returns the levels they lead to."""
        scale = stored_scale(scale, self.fmt)
        levels = self.levels(scale, zero)
        error = torch.addcmul(-self.w, levels, scale[..., None]).square_()
        total = (error * self.h if self.h is not None else error).sum(-1)
        better = (total < self.error) | (self.untried & ~total.isfinite())  # squares of huge weights overflow
        self.untried &= ~better
        self.error = torch.where(better, total, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(better, zero, self.zero)
        return levels

    def refine(self) -> None:
        """Scales re-fitted to the codes by least squares, and zero points moved by one, while that helps."""
        limit = 2**self.fmt.bits - 1
        for _ in range(_REFITS):
            shifts = (0,) if self.zero is None else (0, -1, 1)
            for shift in shifts:
                zero = (self.zero + shift).clamp_(0, limit) if self.zero is not None else None
                levels = self.levels(self.scale, zero)
                weighted = levels * self.h if self.h is not None else levels
                scale = (weighted * self.w).sum(-1) / (weighted * levels).sum(-1)
                self.offer(torch.where(scale.isfinite(), scale, self.scale), zero)

    def result(self, codec: Codec) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point; units of zeros get a scale that represents them exactly."""
        empty = self.w.abs().amax(-1) == 0
        neutral = 1.0 if codec.has_zero or self.zero is not None else 0.0
        return torch.where(empty, torch.full_like(self.scale, neutral), self.scale), self.zero
