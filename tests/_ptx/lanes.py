"""Which threads of a block an instruction is for."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from _ptx.values import Array

__all__ = ["WARP", "Lanes"]

WARP = 32


class Lanes:
    """A set of threads of one block. mask: a truth value for each; full: all of them."""

    def __init__(self, mask: Array, full: bool | None = None) -> None:
        self.mask = mask
        self.full = bool(mask.all()) if full is None else full

    @cached_property
    def index(self) -> Array:
        """Their numbers in the block, ascending."""
        return np.flatnonzero(self.mask)

    @cached_property
    def warps(self) -> Array:
        """Numbers of warps that have any of them."""
        return np.flatnonzero(self.mask.reshape(-1, WARP).any(axis=1))

    @property
    def empty(self) -> bool:
        """No thread."""
        return not self.full and not self.mask.any()

    def also(self, mask: Array) -> Lanes:
        """Those for which `mask` holds."""
        return Lanes(mask.copy() if self.full else self.mask & mask)
