"""Stream-K for what whole waves leave: output tiles as work for a fixed number of thread blocks that all end together.

First every block takes whole tiles, one a wave. If the tiles do not divide into waves, those of the last full wave and
what is left form one line of units (steps along K, tile after tile), of which every block takes an equal contiguous
share: between one and two tiles, so that most tiles of the line belong to one or two blocks. A tile that several
share is finished by the one that comes last, which adds all parts up in the order of K: the result does not depend on
timing. After "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on the GPU" (Osama
et al.), its hybrid of waves and line. `codegen/cuda/text/pipeline.cuh` computes the same.

Where a token's result must not depend on how many others there are, a tile's cuts must not depend on how many tiles
there are: every tile is cut into the same shares (`FixedLine`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowbit.compiler.errors import KernelError

__all__ = ["FixedLine", "Line", "Piece"]


@dataclass(frozen=True)
class Piece:
    """Units [first, last) of an output tile, done by `block`."""

    block: int
    tile: int
    first: int
    last: int


@dataclass(frozen=True)
class Line:
    """tiles: output tiles. units: steps of a tile. blocks: thread blocks, all of which run at once,
    not more than units."""

    tiles: int
    units: int
    blocks: int

    def __post_init__(self) -> None:
        if min(self.tiles, self.units, self.blocks) < 1 or self.blocks > self.tiles * self.units:
            raise KernelError("LB0418", f"no work can be cut this way: {self}")

    @property
    def waves(self) -> int:
        """Whole tiles that every block takes first."""
        full, rest = divmod(self.tiles, self.blocks)
        return max(full - 1, 0) if rest else full

    @property
    def rest(self) -> int:
        """Tiles of the line."""
        return self.tiles - self.waves * self.blocks

    @property
    def parts(self) -> int:
        """Partial tiles that wait in memory: two for every block, if any."""
        return 2 * self.blocks if self.rest else 0

    @property
    def longest(self) -> int:
        """Units of the block that has most to do."""
        return self.waves * self.units + math.ceil(self.rest * self.units / self.blocks)

    def start(self, block: int) -> int:
        """Unit of the line where a block's share begins."""
        return self.rest * self.units * block // self.blocks

    def owner(self, unit: int) -> int:
        """The block in whose share a unit of the line is."""
        return ((unit + 1) * self.blocks - 1) // (self.rest * self.units)

    def pieces(self, block: int) -> list[Piece]:
        """What a block does, in order."""
        found = [Piece(block, wave * self.blocks + block, 0, self.units) for wave in range(self.waves)]
        at, end, first = self.start(block), self.start(block + 1), self.waves * self.blocks
        while at < end:
            tile, begin = divmod(at, self.units)
            stop = min(self.units, begin + end - at)
            found.append(Piece(block, first + tile, begin, stop))
            at += stop - begin
        return found


@dataclass(frozen=True)
class FixedLine:
    """tiles, units, blocks: as for `Line`. split: shares of every tile, which go to blocks wave by wave."""

    tiles: int
    units: int
    blocks: int
    split: int = 1

    def __post_init__(self) -> None:
        if min(self.tiles, self.blocks, self.split) < 1 or self.split > self.units:
            raise KernelError("LB0418", f"no work can be cut this way: {self}")

    @property
    def rest(self) -> int:
        """Tiles that several blocks may share."""
        return self.tiles if self.split > 1 else 0

    @property
    def parts(self) -> int:
        """Partial tiles that wait in memory."""
        return self.rest * self.split

    @property
    def longest(self) -> int:
        """Units of the block that has most to do."""
        return math.ceil(self.tiles * self.split / self.blocks) * math.ceil(self.units / self.split)

    def pieces(self, block: int) -> list[Piece]:
        """What a block does, in order."""
        shares = [divmod(i, self.split) for i in range(block, self.tiles * self.split, self.blocks)]
        cuts = [self.units * s // self.split for s in range(self.split + 1)]
        return [Piece(block, tile, cuts[s], cuts[s + 1]) for tile, s in shares]
