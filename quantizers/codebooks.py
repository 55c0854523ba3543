"""Codebooks as they are stored: floats of the format's type, or signed bytes under one float32 scale (`s8`)."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quantizers.formats import VectorFormat

__all__ = ["TOP_LEVEL", "store_book", "to_levels"]

TOP_LEVEL = 127
"""The largest level that is chosen; -128 may be stored, and stands for what it says."""
_SHARES = tuple(1 - 0.03 * i for i in range(12))  # of the largest magnitude that the largest level stands for
_SCALE_BITS = 16  # of a scale: then level * scale is exact in float32, and storing a stored book changes nothing


def to_levels(book: Tensor, use: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 levels and float32 scales [...] of books [..., centroids, dim]: value = level * scale.

    The scale is that of a few, from the one that the largest magnitude needs down, with the smallest squared error.
    use: what the error of each element counts, broadcast with the book; all count the same without it.
    """
    book = book.detach().float()
    largest = book.abs().amax((-1, -2), keepdim=True)
    weight = torch.ones(()) if use is None else use.float()
    best = torch.full_like(largest, torch.inf)
    scale = torch.ones_like(largest)
    for share in _SHARES:
        tried = torch.where(largest > 0, _round_up(largest * share / TOP_LEVEL), 1.0)
        error = ((_levels(book, tried) * tried - book).square() * weight).sum((-1, -2), keepdim=True)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    return _levels(book, scale).to(torch.int8), scale[..., 0, 0].contiguous()


def store_book(fmt: VectorFormat, book: Tensor, use: Tensor | None = None) -> Tensor:
    """float32: `book` [..., centroids, dim] rounded to values that `fmt` can store. use: as in `to_levels`."""
    if not fmt.scaled:
        return book.to(fmt.scale_dtype).float()
    levels, scale = to_levels(book, use)
    return levels.float() * scale[..., None, None]


def _levels(book: Tensor, scale: Tensor) -> Tensor:
    return (book / scale).round().clamp(-TOP_LEVEL, TOP_LEVEL)


def _round_up(scale: Tensor) -> Tensor:
    """The next number of `_SCALE_BITS` significant bits: no level is pushed beyond the largest one."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**_SCALE_BITS).ceil() * 2.0**-_SCALE_BITS, exponent)
