"""Weighted stream-K: work of unequal steps, cut into equal shares.

A kernel's work is a line of steps: all steps along K of the first output tile, then of the second, and so on. Where the
first blocks of K are int8 and the rest int4 ("COMET: Towards Practical W4A4KV4 LLMs Serving") steps differ in cost, so
equal numbers of them would leave workers idle. Every worker takes a contiguous range of the line whose cost is that of
the others. A tile that several workers share is finished by the one with its first step, its owner, which adds the
others' partial sums in the order of K: the result does not depend on timing. After "Stream-K: Work-centric Parallel
Decomposition for Dense Matrix-Matrix Multiplication on the GPU".
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.codegen.schedule import Schedule
from lowbit.compiler.errors import KernelError

__all__ = ["Line", "Piece", "line_of", "pieces", "start"]


@dataclass(frozen=True)
class Line:
    """tiles: output tiles. wide, narrow: steps of a tile with int8 and int4 activations, in this order. cost_wide,
    cost_narrow: of one step, in any unit of integers. workers: shares the line is cut into."""

    tiles: int
    wide: int
    narrow: int
    cost_wide: int
    cost_narrow: int
    workers: int

    def __post_init__(self) -> None:
        if min(self.tiles, self.workers, self.cost_wide, self.cost_narrow, self.wide + self.narrow) < 1:
            raise KernelError("LB0418", f"no work can be cut this way: {self}")

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.wide + self.narrow

    @property
    def tile_cost(self) -> int:
        """Cost of a tile."""
        return self.wide * self.cost_wide + self.narrow * self.cost_narrow

    def cost(self, first: int, last: int) -> int:
        """Cost of steps [first, last) of one tile."""
        wide = max(0, min(last, self.wide) - min(first, self.wide))
        return wide * self.cost_wide + (last - first - wide) * self.cost_narrow


@dataclass(frozen=True)
class Piece:
    """Steps [first, last) of an output tile, done by `worker`; the owner of the tile has its first step."""

    worker: int
    tile: int
    first: int
    last: int

    @property
    def owner(self) -> bool:
        """Whether this worker finishes the tile."""
        return self.first == 0


def line_of(schedule: Schedule, tiles: int, wide: int, narrow: int) -> Line:
    """The line of a schedule, whose extras are `workers` (1), `cost_wide` (2) and `cost_narrow` (1)."""
    costs = schedule.get("cost_wide", 2), schedule.get("cost_narrow", 1)
    return Line(tiles, wide, narrow, *costs, schedule.get("workers", 1))


def start(line: Line, worker: int) -> int:
    """The step, counted along the whole line, where `worker` starts: the first one whose end lies beyond its share of
    the cost. A closed form, so that kernels can compute it."""
    cost = line.tiles * line.tile_cost * worker // line.workers
    tile, rest = divmod(cost, line.tile_cost)
    boundary = line.wide * line.cost_wide
    if rest < boundary:
        return tile * line.steps + rest // line.cost_wide
    return tile * line.steps + line.wide + (rest - boundary) // line.cost_narrow


def pieces(line: Line) -> list[Piece]:
    """All pieces, by worker and then along the line: every step of every tile exactly once."""
    found = []
    for worker in range(line.workers):
        at, end = start(line, worker), start(line, worker + 1)
        while at < end:
            tile, first = divmod(at, line.steps)
            last = min(line.steps, first + end - at)
            found.append(Piece(worker, tile, first, last))
            at += last - first
    return found
