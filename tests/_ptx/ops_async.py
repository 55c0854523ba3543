"""cp.async and mbarriers. What a copy brings is there when somebody has waited for it, and not before: until then its
place holds nonsense."""

from __future__ import annotations

from typing import Any

import numpy as np

from _ptx.block import Gate, Mbarrier, ThreadBlock
from _ptx.build import Builder, Get, Op, operation
from _ptx.errors import PtxError
from _ptx.lanes import Lanes
from _ptx.memory import SHARED
from _ptx.ops_bulk import bulk
from _ptx.parse import Address, Immediate, Instruction, Name
from _ptx.program import gate
from _ptx.values import Array

__all__: list[str] = []


class Groups:
    """One thread block's copies by cp.async, each (group, threads, addresses, bytes). A thread counts its groups."""

    def __init__(self, threads: int) -> None:
        self.made = np.zeros(threads, dtype=np.int64)  # groups that are committed
        self.copies: list[tuple[Array, Array, Array, Array]] = []

    def land(self, c: ThreadBlock, before: Array) -> None:
        """Make copies visible whose group comes before a number, given for each thread (0 for those not asked)."""
        left = []
        for group, index, at, data in self.copies:
            done = group < before[index]
            if done.any():
                c.memories["shared"].store(at[done], data[done])
                # Compilers take it that the matrix units see such copies without a fence.
                c.wrote(at[done], 4 * data.shape[1], np.full_like(index[done], -1))
            if not done.all():
                left.append((group[~done], index[~done], at[~done], data[~done]))
        self.copies = left


def _groups(c: ThreadBlock) -> Groups:
    found: Groups = c.copies.setdefault("groups", Groups(c.threads))
    return found


@operation("cp")
def _cp(b: Builder, i: Instruction) -> Op:
    if i.parts[1:3] == ("async", "bulk"):
        return bulk(b, i)
    if i.parts[1] != "async":
        raise ValueError("a copy that is not asynchronous")
    if i.has("commit_group"):
        return _commit
    if i.has("wait_group", "wait_all"):
        return _wait(int(i.operands[0].value) if i.operands and isinstance(i.operands[0], Immediate) else None)
    if i.has("mbarrier"):
        return _arrive_later(b, i)
    return _copy(b, i)


def _copy(b: Builder, i: Instruction) -> Op:
    to, source = b.address(i.operands[0]), b.address(i.operands[1])
    assert isinstance(i.operands[2], Immediate)
    size = int(i.operands[2].value)
    rest = list(i.operands[3:])
    if i.has("L2::cache_hint"):
        rest.pop()
    given: Get | None = b.get(rest[0], "u32") if rest else None

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        index = lanes.index
        read = np.full(len(index), size, dtype=np.int64)
        if given is not None:
            read = np.broadcast_to(np.asarray(given(c)), c.threads)[index].astype(np.int64)
        if (read > size).any():
            raise PtxError(f"a copy of {size} bytes reads {int(read.max())}")
        data = _read(c, source(c)[index], read, size)
        at = to(c)[index]
        c.memories["shared"].store(at, np.full_like(data, 0xFFFFFFFF))
        groups = _groups(c)
        groups.copies.append((groups.made[index].copy(), index, at, data))

    return op


def _read(c: ThreadBlock, at: Array, count: Array, size: int) -> Array:
    """[lanes, words]: `count` bytes from each address, then zeros."""
    data = np.zeros((len(at), size // 4), dtype=np.uint32)
    whole = count == size
    if whole.any():
        data[whole] = c.memories["global"].load(at[whole], 4, size // 4)
    for j in np.flatnonzero((count > 0) & ~whole).tolist():
        if int(at[j]) % size:
            raise PtxError(f"a copy of {size} bytes from {int(at[j]):#x} is not aligned")
        data[j].view(np.uint8)[: count[j]] = c.memories["global"].bytes_at(int(at[j]), int(count[j]))
    return data


def _commit(c: ThreadBlock, lanes: Lanes) -> None:
    groups = _groups(c)
    groups.made = groups.made + lanes.mask


def _wait(left: int | None) -> Op:
    def op(c: ThreadBlock, lanes: Lanes) -> None:
        groups = _groups(c)
        before = groups.made + 1 if left is None else groups.made - left
        groups.land(c, np.where(lanes.mask, before, 0))

    return op


def _arrive_later(b: Builder, i: Instruction) -> Op:
    """cp.async.mbarrier.arrive: a barrier hears of this thread when its copies are there, which is now."""
    address, quiet = b.address(i.operands[0]), i.has("noinc")

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        groups = _groups(c)
        groups.land(c, np.where(lanes.mask, groups.made + 1, 0))
        for at in address(c)[lanes.index].tolist():
            if quiet:
                arrive(c, at, 1)
            # Without `noinc` the barrier expects one arrival more and gets it.

    return op


def barrier_at(c: ThreadBlock, at: int) -> Mbarrier:
    """The barrier at a shared or generic address; raises PtxError where none was made."""
    at -= SHARED if at >= SHARED else 0
    if at not in c.mbarriers:
        raise PtxError(f"no mbarrier was initialized at {at:#x}")
    return c.mbarriers[at]


def arrive(c: ThreadBlock, at: int, count: int) -> None:
    """So many arrivals; phases end as they become complete."""
    barrier = barrier_at(c, at)
    if count > barrier.left:
        raise PtxError(f"{count} arrivals at a barrier that expects {barrier.left} more of {barrier.count}")
    barrier.left -= count
    settle(c, barrier)


def settle(c: ThreadBlock, barrier: Mbarrier) -> None:
    """End the phase if nothing is missing."""
    if barrier.left == 0 and barrier.bytes == 0:
        barrier.phase, barrier.left = barrier.phase + 1, barrier.count
        c.wake()


@gate("mbarrier")
def _mbarrier_gate(b: Builder, i: Instruction) -> Gate | None:
    if i.parts[1] not in ("try_wait", "test_wait"):
        return None
    address, parity = b.address(i.operands[1]), i.has("parity")
    token = b.get(i.operands[2], "u32" if parity else "u64")

    def through(c: ThreadBlock, lanes: Lanes, at: int) -> Lanes | None:
        places = address(c)
        wanted = np.broadcast_to(np.asarray(token(c)), c.threads)
        ready = np.zeros(c.threads, dtype=bool)
        for place in np.unique(places[lanes.index]).tolist():
            _land(c, place)
            phase = barrier_at(c, place).phase
            done = (wanted & 1) != phase % 2 if parity else wanted < phase
            ready |= done & (places == np.uint64(place))
        go = lanes.mask & ready
        left = lanes.mask & ~ready
        if left.any():
            c.polling[at] = c.polling[at] | left if at in c.polling else left
        return (lanes if not left.any() else Lanes(go, False)) if go.any() else None

    return through


def _land(c: ThreadBlock, at: int) -> None:
    """Somebody waits for a barrier: bulk copies that tell it arrive, as late as they may."""
    at -= SHARED if at >= SHARED else 0
    for copy in [f for f in c.flights if f.barrier == at]:
        c.flights.remove(copy)
        copy.land()


@operation("mbarrier")
def _mbarrier(b: Builder, i: Instruction) -> Op:
    what = i.parts[1]
    if what in ("try_wait", "test_wait"):
        put = b.put(i.operands[0], "pred")
        return lambda c, lanes: put(c, lanes, np.ones(c.threads, dtype=bool))
    if what == "init":
        return _init(b, i)
    if what == "inval":
        return _invalidate(b, i)
    if what in ("arrive", "expect_tx", "complete_tx"):
        return _arrive(b, i)
    raise ValueError(what)


def _invalidate(b: Builder, i: Instruction) -> Op:
    address = b.address(i.operands[0])

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        for at in address(c)[lanes.index].tolist():
            c.mbarriers.pop(at - SHARED if at >= SHARED else at, None)

    return op


def _init(b: Builder, i: Instruction) -> Op:
    address, count = b.address(i.operands[0]), b.get(i.operands[1], "u32")

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        counts = np.broadcast_to(np.asarray(count(c)), c.threads)
        for lane in lanes.index.tolist():
            at, n = int(address(c)[lane]), int(counts[lane])
            at -= SHARED if at >= SHARED else 0
            c.memories["shared"].load(np.array([at], dtype=np.uint64), 8, 1)  # in bounds and aligned
            c.mbarriers[at] = Mbarrier(n, n)

    return op


def _arrive(b: Builder, i: Instruction) -> Op:
    """Tokens are numbers of phases. `expect_tx` announces bytes before the arrival counts."""
    operands = list(i.operands)
    put: Any = None
    if not isinstance(operands[0], Address):
        target = operands.pop(0)
        put = None if isinstance(target, Name) else b.put(target, "b64")
    address = b.address(operands[0])
    second = b.get(operands[1], "u32") if len(operands) > 1 else None
    arrives, expects = i.parts[1] == "arrive", i.has("expect_tx")

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        places = address(c)
        amount = np.ones(c.threads) if second is None else np.broadcast_to(np.asarray(second(c)), c.threads)
        tokens = np.zeros(c.threads, dtype=np.uint64)
        for lane in lanes.index.tolist():
            barrier = barrier_at(c, int(places[lane]))
            tokens[lane] = barrier.phase
            if expects:
                barrier.bytes += int(amount[lane])
            elif not arrives:
                barrier.bytes -= int(amount[lane])
            if arrives:
                arrive(c, int(places[lane]), 1 if expects else int(amount[lane]))
            else:
                settle(c, barrier)
        if put is not None:
            put(c, lanes, tokens)

    return op
