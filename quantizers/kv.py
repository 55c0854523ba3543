"""Keys and values to codes and back: minimum and range per group, and GEAR's correction.

Numbers are rounded to float16 first, as a cache keeps them until they are quantized. A group's minimum is then exact,
its scale is (maximum - minimum) / (2**bits - 1) rounded to float16; a constant group has scale 0 and no error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quantizers.formats.kv import Gear, KVSide

__all__ = ["Correction", "Groups", "correct", "corrected", "dequantize_groups", "fake_quantize", "quantize_groups"]

_SMALLEST = 2.0**-24  # of float16: a scale that is not zero must not become zero
_LARGEST = 65504.0


@dataclass(frozen=True)
class Groups:
    """codes: uint8 [..., tokens, head_dim]. scale, minimum: float16 [..., tokens / group, head_dim] per channel,
    [..., tokens, dim_groups] per token."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor


def quantize_groups(x: Tensor, side: KVSide) -> Groups:
    """x [..., tokens, head_dim], tokens a multiple of the side's token group."""
    exact = x.clamp(-_LARGEST, _LARGEST).half()
    wide = _grouped(exact, side)
    low, high = wide.amin(_axis(side)), wide.amax(_axis(side))
    span = (high.float() - low.float()) / (2**side.bits - 1)
    scale = torch.where(span > 0, span.clamp(min=_SMALLEST), span).half()
    step = _spread(scale, side, x.shape)
    codes = (exact.float() - _spread(low, side, x.shape)) / torch.where(step > 0, step, 1.0)
    return Groups(codes.round().clamp(0, 2**side.bits - 1).to(torch.uint8), scale, low)


def dequantize_groups(groups: Groups, side: KVSide) -> Tensor:
    """float32 [..., tokens, head_dim]: what the codes stand for."""
    shape, element = groups.codes.shape, side.element
    values = groups.codes.float() - element.bias if element.integer else element.levels()[groups.codes.long()]
    return values * _spread(groups.scale, side, shape) + _spread(groups.minimum, side, shape)


def fake_quantize(x: Tensor, side: KVSide, gear: Gear | None = None, block: int = 0) -> Tensor:
    """x [..., tokens, head_dim] as a cache would give it back, in float32. block: tokens that `gear` corrects together,
    a divisor of tokens. Sides of 16 bits are rounded to float16."""
    if not side.quantized:
        return x.clamp(-_LARGEST, _LARGEST).half().float()
    if gear is None:
        return dequantize_groups(quantize_groups(x, side), side)
    blocks = x.unflatten(-2, (-1, block))
    found, correction = correct(blocks, side, gear)
    return corrected(dequantize_groups(found, side), side, correction).flatten(-3, -2)


def _axis(side: KVSide) -> int:
    return -2 if side.along == "channel" else -1


def _grouped(x: Tensor, side: KVSide) -> Tensor:
    """[..., groups, group, head_dim] or [..., tokens, groups, group]."""
    if side.along == "channel":
        return x.reshape(*x.shape[:-2], -1, side.group, x.shape[-1])
    size, dims = side.dim_group(x.shape[-1]), x.shape[-1]
    missing = math.ceil(dims / size) * size - dims
    if missing:  # the last number again: extremes stay what they are
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)
    return x.reshape(*x.shape[:-1], -1, size)


def _spread(side_values: Tensor, side: KVSide, shape: torch.Size) -> Tensor:
    """Side values as float32 at every number."""
    if side.along == "channel":
        return side_values.float().repeat_interleave(side.group, -2)
    return side_values.float().repeat_interleave(side.dim_group(shape[-1]), -1)[..., : shape[-1]]


@dataclass(frozen=True)
class Correction:
    """What GEAR adds to one block. left [..., tokens, rank] and right [..., head_dim, rank]: float16 factors of the
    error. value float16 and place int64 [..., 2 * outliers, head_dim] (keys) or [..., tokens, 2 * outliers]."""

    left: Tensor
    right: Tensor
    value: Tensor
    place: Tensor


def correct(x: Tensor, side: KVSide, gear: Gear) -> tuple[Groups, Correction]:
    """Quantize blocks x [..., tokens, head_dim] without their outliers, and describe what is lost."""
    axis = _axis(side)
    exact = x.clamp(-_LARGEST, _LARGEST).half().float()
    count = gear.outliers(x.shape[axis])
    if count:
        ends = (exact.topk(count, axis, largest=large).indices for large in (True, False))
        place = torch.cat(list(ends), axis)
        value, outlier = exact.gather(axis, place), torch.zeros_like(exact).scatter(axis, place, 1.0)
        kept = exact.shape[axis] - outlier.sum(axis, keepdim=True)
        mean = (exact * (1 - outlier)).sum(axis, keepdim=True) / kept.clamp(min=1)
        rest = torch.where(outlier > 0, mean, exact)
    else:
        outlier, rest = torch.zeros_like(exact), exact
        place = torch.zeros_like(exact, dtype=torch.int64).narrow(axis, 0, 0)
        value = exact.gather(axis, place)
    groups = quantize_groups(rest, side)
    error = (rest - dequantize_groups(groups, side)) * (1 - outlier)
    left, right = _factors(error, gear.rank)
    return groups, Correction(left.half(), right.half(), value.half(), place)


def corrected(plain: Tensor, side: KVSide, c: Correction) -> Tensor:
    """The dequantized blocks `plain`, float32 [..., tokens, head_dim], with their correction applied."""
    return (plain + c.left.float() @ c.right.float().mT).scatter(_axis(side), c.place.long(), c.value.float())


def _factors(error: Tensor, rank: int, rounds: int = 3) -> tuple[Tensor, Tensor]:
    """(left, right) with left right^T close to `error` [..., tokens, head_dim]: power iteration from a fixed start."""
    rng = torch.Generator().manual_seed(0)
    right = torch.randn(error.shape[-1], rank, generator=rng).to(error.device).expand(*error.shape[:-2], -1, -1)
    for _ in range(rounds):
        left = torch.linalg.qr(error @ right).Q
        right = torch.linalg.qr(error.mT @ left).Q
    return error @ right, right
