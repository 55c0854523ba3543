"""A thread block: its threads' registers, where each thread is, and who waits for whom.

All threads at one place run together. Of several places the first in the text goes first, so that threads which went
different ways meet again. With `apart`, warps run one after another instead, each until it has to wait: what only
happens to work when warps go in step fails then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from _ptx.build import Op
from _ptx.errors import PtxError
from _ptx.lanes import WARP, Lanes
from _ptx.memory import SHARED_START, Memory
from _ptx.parse import Instruction
from _ptx.special import special_register
from _ptx.values import Array, unsigned

__all__ = ["Copy", "Gate", "Mbarrier", "Place", "Program", "ThreadBlock"]

Gate = Callable[["ThreadBlock", Lanes, int], "Lanes | None"]
"""Who may go on at a place of the program; the others are kept until something happens."""
End = Callable[["ThreadBlock", Lanes, int], "list[tuple[int, Lanes]]"]
"""Where threads go."""


@dataclass
class Place:
    """Instructions without a branch between them. gate: what threads wait for before. end: None goes on."""

    ops: list[tuple[Op, Instruction]] = field(default_factory=list)
    gate: Gate | None = None
    guard: Callable[[ThreadBlock], Array] | None = None
    end: End | None = None
    first: Instruction | None = None
    last: Instruction | None = None


@dataclass
class Program:
    """A kernel, ready to run. widths: of registers. shared_bytes: of variables with a size of their own."""

    name: str
    places: list[Place]
    widths: list[int]
    local_bytes: int


@dataclass
class Mbarrier:
    """A barrier in shared memory: `phase` is how many are complete; left: arrivals; bytes: of copies under way."""

    count: int
    left: int
    phase: int = 0
    bytes: int = 0


@dataclass
class Copy:
    """An asynchronous copy. land: makes its bytes visible. group: of cp.async's groups, or none yet."""

    land: Callable[[], None]
    barrier: int = 0


class ThreadBlock:
    """State of one thread block. shape: threads along x, y, z; place: of the block in its grid."""

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        shape: Sequence[int],
        place: Sequence[int],
        memories: dict[str, Memory],
        apart: Sequence[int] | None,
    ) -> None:
        self.program, self.grid, self.shape, self.place, self.memories = program, grid, shape, place, memories
        self.real = int(np.prod(shape))
        self.threads = -(-self.real // WARP) * WARP
        self.alive = np.arange(self.threads) < self.real
        self.r: list[Array] = [_poison(self.threads, w) for w in program.widths]
        self.specials: dict[str, Array] = {}
        warp = np.arange(self.threads) // WARP
        self.cohorts = [self.alive.copy()] if apart is None else [(warp == w) & self.alive for w in apart]
        self.ready: list[dict[int, Array]] = [{} for _ in self.cohorts]
        self.parked: dict[int, Array] = {}  # at a place, for the rest of their warp
        self.polling: dict[int, Array] = {}  # at a place, for a barrier in memory
        self.barriers: dict[int, list[tuple[int, Array]]] = {}  # number -> who waits and goes on where
        self.arrived: dict[int, int] = {}
        self.expected: dict[int, int] = {}  # threads of a barrier; 0: all
        self.mbarriers: dict[int, Mbarrier] = {}
        self.flights: list[Copy] = []  # bulk copies
        self.copies: dict[str, Any] = {}  # what the modules of asynchronous instructions remember
        self.unfenced = np.zeros(0, dtype=np.int16)  # by byte of shared memory: who wrote it and fenced nothing since
        self.now: Instruction | None = None

    def run(self) -> None:
        """Until all threads have ended; raises PtxError."""
        self.add(0, self.alive)
        with np.errstate(all="ignore"):
            while self._turn():
                pass
        if self.alive.any():
            raise PtxError(self._stuck())

    def add(self, place: int, mask: Array) -> None:
        """Let threads go on at a place."""
        for ready, cohort in zip(self.ready, self.cohorts, strict=True):
            some = mask if len(self.ready) == 1 else mask & cohort
            if some is mask or some.any():
                ready[place] = ready[place] | some if place in ready else some

    def wake(self) -> None:
        """Let those look again who wait for barriers in memory."""
        waiting, self.polling = self.polling, {}
        for place, mask in waiting.items():
            self.add(place, mask)

    def leave(self, lanes: Lanes) -> None:
        """Threads that end. Whoever waits for their warp need not any more."""
        self.alive = self.alive & ~lanes.mask
        waiting, self.parked = self.parked, {}
        for place, mask in waiting.items():
            self.add(place, mask)
        for number in list(self.barriers):
            self.open(number)

    def open(self, number: int) -> None:
        """Release a barrier if enough have arrived: as many as its instruction says, or all that have not ended."""
        needed = self.expected.get(number, 0) or max(1, int(self.alive.sum()))
        if self.arrived.get(number, 0) >= needed:
            self.arrived[number] = 0
            for place, mask in self.barriers.pop(number, []):
                self.add(place, mask)

    def _turn(self) -> bool:
        """Run every cohort as far as it goes; whether any could."""
        moved = False
        for ready in self.ready:
            while ready:
                moved = True
                place = min(ready)
                self._run_from(place, Lanes(ready.pop(place)), ready)
        return moved

    def _run_from(self, at: int, lanes: Lanes, ready: dict[int, Array]) -> None:
        places = self.program.places
        while True:
            place = places[at]
            passed = self._through(place, at, lanes)
            if passed is None:
                return
            if passed is not lanes and len(self.ready) > 1 and not place.end:
                self._execute(place, passed)
                return self.add(at + 1, passed.mask)
            lanes = passed
            self._execute(place, lanes)
            if place.end is None:
                at += 1
            else:
                self.now = place.last
                ways = place.end(self, lanes, at)
                for other, some in ways[1:]:
                    self.add(other, some.mask)
                if not ways:
                    return
                at, lanes = ways[0]
            if ready and min(ready) <= at:
                return self.add(at, lanes.mask)

    def _through(self, place: Place, at: int, lanes: Lanes) -> Lanes | None:
        """Who may run a place's instructions now."""
        if place.gate is None:
            return lanes
        self.now = place.first
        if place.guard is not None:
            wanted = np.asarray(place.guard(self))
            others = lanes.also(~wanted)
            if not others.empty:
                self.add(at + 1, others.mask)
                lanes = lanes.also(wanted)
                if lanes.empty:
                    return None
        try:
            return place.gate(self, lanes, at)
        except PtxError as e:
            raise self.located(e, lanes) from e

    def _execute(self, place: Place, lanes: Lanes) -> None:
        done = 0
        try:
            for op, _ in place.ops:
                op(self, lanes)
                done += 1
        except PtxError as e:
            self.now = place.ops[done][1]
            raise self.located(e, lanes) from e
        except (IndexError, ValueError, TypeError, AttributeError, KeyError) as e:
            self.now = place.ops[done][1]
            raise self.located(PtxError(f"{type(e).__name__}: {e}"), lanes) from e

    def located(self, e: PtxError, lanes: Lanes) -> PtxError:
        """The error with instruction, thread block and thread."""
        who = f"block {tuple(self.place)}"
        lane = getattr(e, "lane", None)
        if lane is not None:
            who += f", thread {int(getattr(e, 'threads', lanes.index)[lane])}"
        where = f"line {self.now.line}: {self.now.text}" if self.now else "?"
        return PtxError(f"{self.program.name}, {who}, {where}: {e}")

    def _stuck(self) -> str:
        lines = []
        kinds = (("for the rest of their warp", self.parked), ("for a barrier in memory", self.polling))
        for what, found in kinds:
            for at, mask in found.items():
                lines.append(f"{_range(mask)} {what} at {_text(self.program.places[at].first)}")
        for number, held in self.barriers.items():
            for at, mask in held:
                text = _text(self.program.places[at - 1].first)
                lines.append(f"{_range(mask)} at barrier {number} ({self.arrived[number]} arrived), {text}")
        return f"{self.program.name}, block {tuple(self.place)}: deadlock; threads wait: " + "; ".join(lines)

    def wrote(self, at: Array, size: int, threads: Array) -> None:
        """Threads have written to shared memory, as threads do: for the copy engine a fence is missing."""
        if not self.unfenced.size:
            self.unfenced = np.full(self.memories["shared"].buffers[0].data.size, -1, dtype=np.int16)
        offset = at.astype(np.int64) - SHARED_START
        self.unfenced[offset[:, None] + np.arange(size)] = threads[:, None]

    def fenced(self, lanes: Lanes) -> None:
        """What these threads have written may be read by the copy engine and the matrix units."""
        if self.unfenced.size:
            mask = np.append(lanes.mask, False)  # -1: nobody
            self.unfenced[mask[self.unfenced]] = -1

    def check_fenced(self, offset: Array) -> None:
        """Raises PtxError where bytes of shared memory lack a fence."""
        if self.unfenced.size and (wrong := self.unfenced[offset] >= 0).any():
            who = int(self.unfenced[offset][wrong][0])
            raise PtxError(f"thread {who} wrote what is read here without fence.proxy.async after it")

    def special(self, name: str) -> Array:
        """A special register's values."""
        if name not in self.specials:
            self.specials[name] = special_register(name, self.threads, self.shape, self.place, self.grid)
        return self.specials[name]


def _poison(threads: int, width: int) -> Array:
    """What nobody has written: no number as a float, no sensible one as an integer."""
    if width == 0:
        return np.zeros(threads, dtype=bool)
    return np.full(threads, (1 << 8 * min(width, 8)) - 1, dtype=unsigned(min(width, 8)))


def _range(mask: Array) -> str:
    index = np.flatnonzero(mask)
    return f"{len(index)} from {index[0]} to {index[-1]}"


def _text(i: Instruction | None) -> str:
    return f"line {i.line} ({i.text})" if i else "the end"
