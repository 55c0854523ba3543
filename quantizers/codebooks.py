"""Codebooks as they are stored: floats of the format's type, or signed bytes under one float32 scale (`s8`).

Books whose centroids are added, main and residual, share the scale, and sums of their levels are bytes again: kernels
add bytes and multiply once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.quantizers.formats import VectorFormat

__all__ = ["TOP_LEVEL", "store_books", "to_levels"]

TOP_LEVEL = 127
"""The largest sum of levels that is chosen; -128 may be stored, and stands for what it says."""
_SHARES = tuple(1 - 0.03 * i for i in range(12))  # of the largest magnitude that the largest level stands for
_SCALE_BITS = 16  # of a scale: then level * scale is exact in float32, and storing a stored book changes nothing


def to_levels(books: Sequence[Tensor], uses: Sequence[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
    """int8 levels of every book [..., centroids, dim], whose centroids are added up, and float32 scales [...] that they
    share: value = level * scale.

    The scale is that of a few, from the one that the largest magnitudes need down, with the smallest squared error.
    Each book has the part of the levels that its largest magnitude has of theirs. uses: what the error of each element
    of a book counts, broadcast with it; all count the same without it.
    """
    books = [book.detach().float() for book in books]
    each = [book.abs().amax((-1, -2), keepdim=True) for book in books]
    largest = torch.stack(each).sum(0)
    tops, left = [], torch.full_like(largest, TOP_LEVEL)
    for top in each[1:]:
        tops.append((top * (TOP_LEVEL / largest)).nan_to_num_(0.0).round())
        left = left - tops[-1]
    tops.insert(0, left)
    best, scale = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for share in _SHARES:
        tried = torch.where(largest > 0, _round_up(largest * share / TOP_LEVEL), 1.0)
        error = torch.zeros_like(largest)
        for i, (book, top) in enumerate(zip(books, tops, strict=True)):
            square = (_levels(book, tried, top) * tried - book).square()
            error += (square if uses is None else square * uses[i].float()).sum((-1, -2), keepdim=True)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    levels = [_levels(book, scale, top).to(torch.int8) for book, top in zip(books, tops, strict=True)]
    return levels, scale[..., 0, 0].contiguous()


def store_books(fmt: VectorFormat, books: Sequence[Tensor], uses: Sequence[Tensor] | None = None) -> list[Tensor]:
    """float32: books [..., centroids, dim], whose centroids are added up, rounded to values that `fmt` can store.
    uses: as in `to_levels`."""
    if not fmt.scaled:
        return [book.to(fmt.scale_dtype).float() for book in books]
    levels, scale = to_levels(books, uses)
    return [level.float() * scale[..., None, None] for level in levels]


def _levels(book: Tensor, scale: Tensor, top: Tensor) -> Tensor:
    return (book / scale).round().clamp(-top, top)


def _round_up(scale: Tensor) -> Tensor:
    """The next number of `_SCALE_BITS` significant bits: no level is pushed beyond the largest one."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**_SCALE_BITS).ceil() * 2.0**-_SCALE_BITS, exponent)
