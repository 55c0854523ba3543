"""Choosing the scale and zero point or offset of every group, and rounding to the nearest code.

Everything works on scales as they will be stored: a candidate is rounded to the format's scale type first, then codes
are chosen for it. Elements are known by their `levels()` only, so a new family of elements works here unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from lowbit.compiler.errors import RunError
from lowbit.quantizers.formats import Element, Format
from lowbit.quantizers.methods.sums import SumTable, search_sums
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.scales import power_of_two, stored_offset, stored_scale, tensor_scale_of

__all__ = ["Codec", "Grid", "codec_of", "search_grid", "stored_offset", "stored_scale"]

_CHUNK = 1 << 18  # elements handled at a time: what stays in the second-level cache
_REFITS = 2
_OFFSET_REFITS = 4  # two unknowns settle more slowly than one


@dataclass(frozen=True, eq=False)
class Codec:
    """An element's finite levels in ascending order, and the code of each. Of levels that occur twice the lowest code
    wins.

    step: the distance between neighbours when all are equal, else 0; `edges` are then the midpoints, or the next number
    below one where the level above has the even code: ties go to even codes.
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
        """Position of the nearest level of every x, as a float tensor (uniform levels; ties go up) or int64."""
        if not self.step:
            return torch.bucketize(x, self.edges)
        steps = x.sub(self.low - self.step / 2)
        if self.step != 1:
            steps.div_(self.step)
        return steps.floor_().clamp_(0, self.top)

    def level(self, index: Tensor) -> Tensor:
        """The level at each position."""
        if not self.step:
            return self.values[index]
        return index + self.low if self.step == 1 else index * self.step + self.low

    def code(self, index: Tensor) -> Tensor:
        """uint8 code at each position."""
        return self.codes[index.long()]


@cache
def codec_of(element: Element) -> Codec:
    """The codec of an element (kept: elements are few)."""
    levels = element.levels().float()
    order = torch.argsort(levels, stable=True)
    order = order[levels[order].isfinite()]
    ordered = levels[order]
    first = torch.ones(len(ordered), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    values, codes = ordered[first], order[first].to(torch.uint8)
    gaps = values.diff()
    uniform = len(gaps) > 0 and bool((gaps == gaps[0]).all())
    middle = (values[1:] + values[:-1]) / 2
    upwards = (codes[1:] & 1 == 0) & (codes[:-1] & 1 == 1)
    return Codec(
        values,
        codes,
        torch.where(upwards, torch.nextafter(middle, values[:1]), middle),
        float(gaps[0]) if uniform else 0.0,
        float(values[0]),
        float(values[-1]),
        len(values) - 1,
    )


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales float32 [rows, groups * terms] (values the format can store), and of that shape too, or None where the
    format has none of them: zero points (levels subtracted before scaling) and offsets (numbers added after scaling).
    tensor, channel: the second scales [1] and [rows, 1] of formats that have them; they are part of `scale`."""

    fmt: Format
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None = None
    tensor: Tensor | None = None
    channel: Tensor | None = None

    def column(self, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scale, zero point and offset per weight, [rows, k]."""
        size = self.fmt.granularity.group_size(k)

        def wide(side: Tensor) -> Tensor:
            return side.repeat_interleave(size, dim=1)[:, :k]

        zero, offset = (None if side is None else wide(side) for side in (self.zero, self.offset))
        return wide(self.scale), zero, offset

    def encode(self, weight: Tensor) -> QTensor:
        """Round [N, K] to the nearest code of this grid."""
        if self.fmt.terms > 1:
            return self._encode_sums(weight)
        codec = codec_of(self.fmt.element)
        scale, zero, offset = self.column(weight.shape[1])
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        for rows in _row_chunks(weight):
            side = slice(None) if scale.shape[0] == 1 else rows
            x = (weight[rows] if offset is None else weight[rows] - offset[side]) * _inverse(scale[side])
            if zero is not None:
                x += zero[side]
            codes[rows] = codec.code(codec.index(x))
        return self.qtensor(codes)

    def _encode_sums(self, weight: Tensor) -> QTensor:
        size, codes = self.fmt.granularity.group_size(weight.shape[1]), []
        for rows in _row_chunks(weight):
            table = SumTable.of(self.scale[rows].unflatten(1, (-1, self.fmt.terms)))
            part = weight[rows]
            units = torch.nn.functional.pad(part, (0, -part.shape[1] % size)).unflatten(1, (-1, size))
            codes.append(table.nearest(units).flatten(1)[:, : part.shape[1]])
        return self.qtensor(torch.cat(codes))

    def qtensor(self, codes: Tensor) -> QTensor:
        """These codes with this grid's scales, zero points and offsets."""
        zero = self.zero.to(torch.uint8) if self.zero is not None else None
        dtype = self.fmt.scale_dtype
        offset = self.offset.to(dtype) if self.offset is not None else None
        if self.channel is not None:
            whole = (self.scale / self.channel).round().to(dtype)
            return QTensor(self.fmt, codes, whole, zero, channel_scale=self.channel.half())
        scale = self.scale if self.tensor is None else self.scale / self.tensor  # rounding to `dtype` repairs the rest
        return QTensor(self.fmt, codes, scale.to(dtype), zero, offset, self.tensor)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale).nan_to_num_(posinf=3e38, neginf=-3e38)


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def search_grid(
    weight: Tensor,
    fmt: Format,
    importance: Tensor | None = None,
    *,
    clip: bool = True,
    signed: bool = False,
    shrinks: int | None = None,
    tensor: Tensor | None = None,
) -> Grid:
    """Scales (and zero points or offsets) of float32 [N, K] that minimise the squared rounding error of each group.

    importance: weight of each column's squared error, [K], such as the diagonal of the Hessian. clip: try ranges
    smaller than the largest weight, then re-fit the scale (and offset) to the codes in closed form; otherwise cover
    the range exactly (min-max). signed: also try negative scales, which put the longer half of a symmetric integer's
    levels on the other side. shrinks: how many ranges to try, if not the usual number. tensor: the second scale, where
    the format has one and `weight` is only a part of the matrix.
    Raises RunError (LB0512) when the range overflows the scale type.
    """
    _, k = weight.shape
    tensor = tensor_scale_of(weight, fmt) if tensor is None else tensor
    factors = _shrinks(fmt, shrinks) if clip else torch.ones(1)
    kind = fmt.granularity.kind
    if kind == "t":
        wide = None if importance is None else importance.expand_as(weight).reshape(1, -1)
        units = weight.reshape(1, 1, -1)
        best = _Best(units, None if wide is None else wide[None], fmt, tensor)
        return _search_units(best, factors, clip, signed)
    size, groups = fmt.granularity.group_size(k), fmt.granularity.groups(k)
    ragged = groups * size - k
    weights = importance if importance is not None else (torch.ones(k) if ragged else None)
    if weights is not None:
        weights = torch.nn.functional.pad(weights.float(), (0, ragged)).reshape(1, groups, size)
    parts = []
    for rows in _row_chunks(weight):  # the last weight repeated leaves the range of a ragged group as it is
        part = torch.nn.functional.pad(weight[rows], (0, ragged), mode="replicate") if ragged else weight[rows]
        best = _Best(part.reshape(-1, groups, size), weights, fmt, tensor)
        parts.append(_search_units(best, factors, clip, signed))
    return _stacked(parts)


def _stacked(parts: list[Grid]) -> Grid:
    """Grids of chunks of rows as one."""
    zeros = [p.zero for p in parts if p.zero is not None]
    offsets = [p.offset for p in parts if p.offset is not None]
    scale = torch.cat([p.scale for p in parts])
    zero, offset = (torch.cat(side) if side else None for side in (zeros, offsets))
    return Grid(parts[0].fmt, scale, zero, offset, parts[0].tensor)


def _shrinks(fmt: Format, count: int | None) -> Tensor:
    """Fractions of the full range to try, largest first. Fewer levels gain from more clipping."""
    lowest = {1: 0.2, 2: 0.3, 3: 0.45, 4: 0.55, 5: 0.7}.get(fmt.bits, 0.8)
    return torch.linspace(1.0, lowest, count or (16 if fmt.bits < 6 else 9))


def _search_units(best: _Best, shrinks: Tensor, clip: bool, signed: bool) -> Grid:
    """The grid, [R, G], of units [R, G, E]."""
    fmt = best.fmt
    if fmt.terms > 1:
        _check_range(best.w.abs().amax(-1), fmt, "scale")
        return Grid(fmt, search_sums(best.w, best.h, fmt).flatten(1), None)
    if fmt.offset:
        _offer_ranges(best, shrinks)
    elif fmt.scale == "e8m0" and not fmt.zero:
        _offer_powers(best, clip)
    elif fmt.zero:
        _offer_zero_points(best, shrinks, clip)
    else:
        _offer_scales(best, shrinks, clip, signed)
    if clip:
        best.refine()
    return best.grid()


def _offer_scales(best: _Best, shrinks: Tensor, clip: bool, signed: bool) -> None:
    """Symmetric formats: fractions of the largest weight."""
    codec, fmt = best.codec, best.fmt
    low, high = best.w.amin(-1).clamp(max=0), best.w.amax(-1).clamp(min=0)
    full = torch.maximum(high, -low) / max(abs(codec.high), 1e-30)
    if not clip:  # the longer half of the levels can serve the side it lies on
        full = torch.maximum(high / codec.high, -low / -codec.low) if codec.low < 0 < codec.high else full
    _check_range(full, fmt, "scale", relative=best.tensor is not None)
    for shrink in shrinks:
        best.offer(full * shrink)
        if signed and clip and codec.low != -codec.high:
            best.offer(-full * shrink)


def _offer_powers(best: _Best, clip: bool) -> None:
    """Symmetric formats whose scales are powers of two: the one that MX asks for, and its neighbours."""
    usual = power_of_two(best.w.abs().amax(-1), best.fmt.element)
    for factor in (1.0, 2.0, 0.5, 0.25) if clip else (1.0,):
        best.offer(usual * factor)


def _offer_zero_points(best: _Best, shrinks: Tensor, clip: bool) -> None:
    """Integer zero points: fractions of the range from the smallest to the largest weight, which has zero in it."""
    codec, fmt = best.codec, best.fmt
    low, high = best.w.amin(-1).clamp(max=0), best.w.amax(-1).clamp(min=0)
    full = (high / (codec.high - codec.low)) - (low / (codec.high - codec.low))
    _check_range(full, fmt, "scale", relative=best.tensor is not None)
    ratio = torch.where(full > 0, codec.low - low / full.clamp(min=1e-45), torch.zeros_like(full)).nan_to_num_(0)
    limit = 2**fmt.bits - 1
    zeros = [ratio.round().clamp(0, limit)]
    if clip:
        zeros = [ratio.floor().clamp(0, limit), ratio.ceil().clamp(0, limit)]
    for shrink in shrinks:
        for zero in zeros:
            best.offer(full * shrink, zero)


def _offer_ranges(best: _Best, shrinks: Tensor) -> None:
    """Float offsets: ranges that contract around the mean weight. Zero need not be in them."""
    codec, fmt, span = best.codec, best.fmt, best.codec.high - best.codec.low
    low, high, middle = best.w.amin(-1), best.w.amax(-1), best.mean(best.w)
    full = high / span - low / span
    _check_range(full, fmt, "scale")
    _check_range((low - full * codec.low).abs(), fmt, "offset")
    for shrink in shrinks:
        scale = stored_scale(full * shrink, fmt)
        best.offer(scale, offset=middle + (low - middle) * shrink - scale * codec.low)


def _check_range(full: Tensor, fmt: Format, what: str, *, relative: bool = False) -> None:
    """relative: a second scale makes room, except for weights that grew since it was chosen; theirs stop there."""
    largest = torch.finfo(fmt.scale_dtype).max
    if not relative and bool((full > largest).any()):
        raise RunError(
            "LB0512",
            f"{'an' if what == 'offset' else 'a'} {what} of {float(full.max()):.3g} does not fit {fmt.scale} "
            f"(at most {largest:.3g})",
            hint=f"use f32 scales: {replace(fmt, scale='f32')}",
        )


class _Best:
    """The best scale, zero point and offset so far of each unit; strict improvement only: ties keep the first."""

    def __init__(self, w: Tensor, importance: Tensor | None, fmt: Format, tensor: Tensor | None) -> None:
        self.w, self.h, self.fmt, self.tensor, self.codec = w, importance, fmt, tensor, codec_of(fmt.element)
        self.scale = torch.zeros(w.shape[:2])
        self.zero = torch.zeros(w.shape[:2]) if fmt.zero else None
        self.offset = torch.zeros(w.shape[:2]) if fmt.offset else None
        self.error = torch.full(w.shape[:2], torch.inf)
        self.untried = torch.ones(w.shape[:2], dtype=torch.bool)

    def mean(self, x: Tensor) -> Tensor:
        """Weighted mean of every unit, [R, G, E] -> [R, G]."""
        return x.mean(-1) if self.h is None else (x * self.h).sum(-1) / self.h.sum(-1).clamp(min=1e-45)

    def levels(self, scale: Tensor, zero: Tensor | None, offset: Tensor | None = None) -> Tensor:
        """Levels minus zero point nearest to (w - offset) / scale."""
        x = (self.w if offset is None else self.w - offset[..., None]) * _inverse(scale)[..., None]
        if zero is not None:
            x += zero[..., None]
        value = self.codec.level(self.codec.index(x))
        return value.sub_(zero[..., None]) if zero is not None else value

    def offer(self, scale: Tensor, zero: Tensor | None = None, offset: Tensor | None = None) -> None:
        """Try scales and offsets (rounded to storage here) and zero points."""
        scale = stored_scale(scale, self.fmt, self.tensor)
        offset = None if offset is None else stored_offset(offset, self.fmt)
        error = torch.addcmul(-self.w, self.levels(scale, zero, offset), scale[..., None])
        if offset is not None:
            error += offset[..., None]
        error.square_()
        total = (error * self.h if self.h is not None else error).sum(-1)
        better = (total < self.error) | (self.untried & ~total.isfinite())  # squares of huge weights overflow
        self.untried &= ~better
        self.error = torch.where(better, total, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(better, zero, self.zero)
        if self.offset is not None and offset is not None:
            self.offset = torch.where(better, offset, self.offset)

    def refine(self) -> None:
        """Least squares for fixed codes, and zero points moved by one, while that helps."""
        if self.offset is not None:
            for _ in range(_OFFSET_REFITS):
                self._regress(self.offset)
            return
        limit = 2**self.fmt.bits - 1
        for _ in range(_REFITS):
            shifts = (0,) if self.zero is None else (0, -1, 1)
            for shift in shifts:
                zero = (self.zero + shift).clamp_(0, limit) if self.zero is not None else None
                levels = self.levels(self.scale, zero)
                weighted = levels * self.h if self.h is not None else levels
                scale = (weighted * self.w).sum(-1) / (weighted * levels).sum(-1)
                self.offer(torch.where(scale.isfinite(), scale, self.scale), zero)

    def _regress(self, offset: Tensor) -> None:
        """Offer the line of least squares from levels to weights; where all levels are equal, only its height."""
        levels = self.levels(self.scale, None, offset)
        mean = self.mean(levels)
        centred = levels - mean[..., None]
        weighted = centred * self.h if self.h is not None else centred
        scale = (weighted * self.w).sum(-1) / (weighted * centred).sum(-1)
        scale = stored_scale(torch.where(scale.isfinite() & (scale != 0), scale, self.scale), self.fmt)
        self.offer(scale, offset=self.mean(self.w) - scale * mean)

    def grid(self) -> Grid:
        """What was found; units of zeros get a scale and offset that represent them exactly."""
        empty = self.w.abs().amax(-1) == 0
        neutral = 1.0 if self.codec.has_zero or self.zero is not None else 0.0
        neutral_scale = stored_scale(torch.full_like(self.scale, neutral), self.fmt, self.tensor)
        scale = torch.where(empty, neutral_scale, self.scale)
        offset = None if self.offset is None else self.offset.masked_fill(empty, 0.0)
        return Grid(self.fmt, scale, self.zero, offset, self.tensor)
