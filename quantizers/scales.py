"""Scales and offsets as a format stores them: rounding, ranges, and the second scale per tensor."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from lowbit.quantizers.formats import Element, Format

__all__ = ["largest_level", "power_of_two", "stored_offset", "stored_scale", "tensor_scale_of"]

_MIN_EXPONENT = -126  # a smaller power of two, which e8m0 has, would be a subnormal float32


@cache
def largest_level(element: Element) -> float:
    """The largest magnitude that both signs reach, of elements with both: 127 for symmetric int8."""
    levels = element.levels()
    levels = levels[levels.isfinite()]
    low, high = -float(levels.min()), float(levels.max())
    return min(low, high) if min(low, high) > 0 else max(low, high)


def power_of_two(largest: Tensor, element: Element) -> Tensor:
    """2**(floor(log2(largest)) - floor(log2(largest level))): the scale that the OCP MX specification asks for.

    largest: the magnitude that is to fit, float32. What lies above the largest level's multiple of the scale, at most
    half of the top binade, is clipped. Zeros get the smallest scale.
    """
    top = math.frexp(largest_level(element))[1]
    exponent = torch.frexp(largest.abs())[1] - top
    exponent = torch.where(largest == 0, torch.full_like(exponent, _MIN_EXPONENT), exponent)
    return torch.ldexp(torch.ones(exponent.shape), exponent.clamp(_MIN_EXPONENT, 127))


def tensor_scale_of(weight: Tensor, fmt: Format) -> Tensor | None:
    """The float32 scale [1] of a whole matrix: the largest weight (with zero points the whole range) gets the largest
    scale of its type. 1 for matrices of zeros.

    None for formats without one. After "Pretraining Large Language Models with NVFP4" (NVIDIA).
    """
    if not fmt.tensor:
        return None
    span = weight.amax().clamp(min=0) - weight.amin().clamp(max=0) if fmt.zero else weight.abs().amax()
    scale = span.float() / (largest_level(fmt.element) * torch.finfo(fmt.scale_dtype).max)
    scale = 1 / (1 / scale)  # other programs store the reciprocal: a number that comes back from there
    return torch.where(scale > 0, scale.clamp(min=2.0**-100), torch.ones(())).reshape(1)


def stored_scale(scale: Tensor, fmt: Format, tensor: Tensor | None = None) -> Tensor:
    """float32 scales as `fmt` will store them. Nonzero ones never round to zero: they stop at the smallest number.

    tensor: the second scale of formats that have one; results include it. Powers of two are never zero or negative, and
    round as in `power_of_two`.
    """
    dtype = fmt.scale_dtype
    if fmt.scale == "e8m0":
        exact = power_of_two(scale.double() * largest_level(fmt.element), fmt.element)
        return torch.where(_is_power(scale), scale.clamp(2.0**_MIN_EXPONENT, 2.0**127), exact.float())
    info = torch.finfo(dtype)
    subnormal = dtype in (torch.float16, torch.float8_e4m3fn)  # the others have range enough without
    floor = info.smallest_normal * (info.eps if subnormal else 1.0)
    wanted = scale if tensor is None else scale / tensor
    rounded = wanted.abs().clamp(floor, info.max).to(dtype).float()
    rounded = torch.where(scale == 0, torch.zeros_like(scale), torch.copysign(rounded, scale))
    return rounded if tensor is None else rounded * tensor


def _is_power(scale: Tensor) -> Tensor:
    return (scale > 0) & (torch.frexp(scale)[0] == 0.5)


def stored_offset(offset: Tensor, fmt: Format) -> Tensor:
    """float32 offsets as `fmt` will store them."""
    largest = torch.finfo(fmt.scale_dtype).max
    return offset.clamp(-largest, largest).to(fmt.scale_dtype).float()
