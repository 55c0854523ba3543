"""Where a lane finds its codes and side values, read off the packed layout.

Kernels address both by strides. Those are found in the layout's own tables of addresses and compared with them in full,
so that nothing here says a second time where a bit lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from lowbit.codegen.cuda.fragments import BLOCK, TILE
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import Layout

__all__ = ["SidePlaces", "WordPlaces", "side_places", "word_places"]

_LANES = 32


@dataclass(frozen=True)
class WordPlaces:
    """A lane's `count` words of 16 rows x 64 columns begin at block * `block` + part * `part` + lane * `lane`, in words
    from the tile's first one; a tile has `block` words for every block."""

    count: int
    block: int
    part: int
    lane: int


@dataclass(frozen=True)
class SidePlaces:
    """The side value of row 16 * part + 8 * half + g of a tile is number part * `part` + half * `half` + g * `g`."""

    part: int
    half: int
    g: int


@cache
def word_places(layout: Layout, width: int) -> WordPlaces:
    """The strides of a plane of `width` bits; raises KernelError (LB0490) for layouts without such strides."""
    at = layout.address(width, 2 * TILE, 2 * BLOCK)[0].reshape(2, 4, 16, 2, BLOCK).permute(0, 3, 1, 2, 4)
    # [tile, block, part, lane, codes]: row 8 h + g and column 16 q + 8 c + 2 t + e belong to lane 4 g + t.
    codes = at.reshape(2, 2, 4, 2, 8, 4, 2, 4, 2).permute(0, 1, 2, 4, 7, 3, 5, 6, 8).reshape(2, 2, 4, _LANES, -1)
    first, last = codes.amin(-1), codes.amax(-1)
    found = WordPlaces(width, int(first[0, 1, 0, 0]), int(first[0, 0, 1, 0]), int(first[0, 0, 0, 1]))
    tile, block, part, lane = (torch.arange(n) for n in (2, 2, 4, _LANES))
    want = (tile[:, None, None, None] * 2 + block[:, None, None]) * found.block
    want = want + part[:, None] * found.part + lane * found.lane
    if not torch.equal(first, want) or not torch.equal(last, want + width - 1):
        raise KernelError("LB0490", f"lanes of matrix instructions do not find their codes side by side in {layout}")
    return found


@cache
def side_places(layout: Layout) -> SidePlaces:
    """The strides of side values; raises KernelError (LB0490) for layouts without such strides."""
    at = torch.argsort(layout.side_order).reshape(-1, 2, 8)
    found = SidePlaces(int(at[1, 0, 0]), int(at[0, 1, 0]), int(at[0, 0, 1]))
    part, half, g = (torch.arange(n) for n in at.shape)
    want = part[:, None, None] * found.part + half[:, None] * found.half + g * found.g
    if layout.row_tile != TILE or not torch.equal(at, want) or found.half != 1:
        raise KernelError("LB0490", f"side values of two rows do not lie side by side in {layout}")
    return found
