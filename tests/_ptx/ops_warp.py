"""What threads of a warp do together, and barriers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from _ptx.block import Gate, ThreadBlock
from _ptx.build import Builder, Get, Op, operation
from _ptx.errors import PtxError
from _ptx.lanes import WARP, Lanes
from _ptx.parse import Immediate, Instruction, Vector
from _ptx.program import gate
from _ptx.values import Array, kind_of

__all__ = ["together"]


def together(size: int, members: Get | None = None) -> Gate:
    """Go on when all threads of a warp (size 32) or warpgroup (128) are here: those that have not ended, and of them
    those that `members` (a mask of lanes) names."""

    def through(c: ThreadBlock, lanes: Lanes, at: int) -> Lanes | None:
        if lanes.full and at not in c.parked:
            return lanes
        here = lanes.mask | c.parked.pop(at) if at in c.parked else lanes.mask
        needed = c.alive
        if members is not None:
            mask = np.broadcast_to(np.asarray(members(c), dtype=np.uint32), c.threads)
            bits = (np.arange(c.threads) % WARP).astype(np.uint32)
            chosen = np.where(here, mask, 0).astype(np.uint32).reshape(-1, WARP)
            own = np.bitwise_or.reduce(chosen, axis=1).repeat(WARP)
            needed = needed & (own >> bits & np.uint32(1)).astype(bool)
        missing = (needed & ~here).reshape(-1, size).any(axis=1)
        if not missing.any():
            return lanes if here is lanes.mask else Lanes(here)
        some = missing & here.reshape(-1, size).any(axis=1)
        if not some.any():
            return lanes if here is lanes.mask else Lanes(here)
        go = here & ~some.repeat(size)
        c.parked[at] = here & ~go
        return Lanes(go, False) if go.any() else None

    return through


@gate("shfl", "vote", "match", "redux")
def _with_members(b: Builder, i: Instruction) -> Gate:
    return together(WARP, b.get(i.operands[-1], "b32"))


@gate("mma", "ldmatrix", "stmatrix", "movmatrix", "setmaxnreg")
def _whole_warp(b: Builder, i: Instruction) -> Gate:
    return together(WARP)


@gate("wgmma")
def _warpgroup(b: Builder, i: Instruction) -> Gate:
    # Fences are each warp's own. So are groups, but a product is all four's, and so are they here.
    return together(WARP if i.parts[1] == "fence" else 4 * WARP)


@gate("elect")
def _elect_gate(b: Builder, i: Instruction) -> Gate:
    return together(WARP, b.get(i.operands[1], "b32"))


@gate("bar", "barrier")
def _barrier_gate(b: Builder, i: Instruction) -> Gate | None:
    if i.has("warp"):
        return together(WARP, b.get(i.operands[0], "b32"))
    if i.has("cluster"):  # of one block
        number: Get = lambda c: np.uint32(1 << 16)  # noqa: E731
        return None if i.has("arrive") else _barrier(number, None, wait=True)
    if i.has("red"):
        return None  # unknown to the operation too
    count = b.get(i.operands[1], "u32") if len(i.operands) > 1 else None
    return _barrier(b.get(i.operands[0], "u32"), count, wait=not i.has("arrive"))


def _barrier(number: Get, count: Get | None, wait: bool) -> Gate:
    def through(c: ThreadBlock, lanes: Lanes, at: int) -> Lanes | None:
        ids = np.broadcast_to(np.asarray(number(c)), c.threads)
        counts = np.zeros(c.threads, np.int64) if count is None else np.broadcast_to(np.asarray(count(c)), c.threads)
        for one in np.unique(ids[lanes.index]).tolist():
            some = lanes.mask & (ids == one)
            needed = np.unique(counts[some])
            if len(needed) > 1 or int(needed[0]) % WARP:
                raise PtxError(f"barrier {one} is given {needed.tolist()} threads")
            if wait:
                c.barriers.setdefault(one, []).append((at + 1, some))
            c.arrived[one] = c.arrived.get(one, 0) + int(some.sum())
            c.expected[one] = int(needed[0])
            c.open(one)
        return None if wait else lanes

    return through


@operation("bar", "barrier")
def _barrier_op(b: Builder, i: Instruction) -> Op:
    if i.has("red"):
        raise ValueError("barriers that reduce")
    return lambda c, lanes: None


@operation("shfl")
def _shuffle(b: Builder, i: Instruction) -> Op:
    mode = i.parts[2]
    first = i.operands[0]
    targets = first.items if isinstance(first, Vector) else (first,)
    put = b.put(targets[0], "b32")
    valid = b.put(targets[1], "pred") if len(targets) > 1 else None
    value, by, clamp = (b.get(o, "b32") for o in i.operands[1:4])

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        lane = np.arange(c.threads) % WARP
        n, limits = (np.broadcast_to(np.asarray(g(c)), c.threads).astype(np.int64) for g in (by, clamp))
        n, segment, bound = n & 31, limits >> 8 & 31, limits & 31
        low, top = lane & segment, (lane & segment) | (bound & ~segment)
        there = {"up": lane - n, "down": lane + n, "bfly": lane ^ n, "idx": low | (n & ~segment)}[mode]
        inside = there >= top if mode == "up" else there <= top
        source = np.arange(c.threads) // WARP * WARP + np.where(inside, there, lane)
        given = np.broadcast_to(np.asarray(value(c)), c.threads)
        # Threads that are not here have nothing to give.
        found = np.where(lanes.mask[source], given[source], np.uint32(0xFFFFFFFF))
        put(c, lanes, found)
        if valid is not None:
            valid(c, lanes, inside)

    return op


def _members(c: ThreadBlock, lanes: Lanes, mask: Get) -> Array:
    """[warps, 32]: who takes part."""
    bits = np.broadcast_to(np.asarray(mask(c)), c.threads).astype(np.uint32)
    own = bits >> (np.arange(c.threads) % WARP).astype(np.uint32) & np.uint32(1)
    return np.asarray((own.astype(bool) & lanes.mask).reshape(-1, WARP))


_WEIGHTS = np.uint32(1) << np.arange(WARP, dtype=np.uint32)


def _ballot(truth: Array) -> Array:
    return np.asarray((truth * _WEIGHTS).sum(axis=1, dtype=np.uint32).repeat(WARP))


@operation("vote")
def _vote(b: Builder, i: Instruction) -> Op:
    mode, mask, get = i.parts[2], b.get(i.operands[2], "b32"), b.get(i.operands[1], "pred")
    put = b.put(i.operands[0], "b32" if mode == "ballot" else "pred")

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        members = _members(c, lanes, mask)
        truth = np.broadcast_to(np.asarray(get(c)), c.threads).reshape(-1, WARP)
        yes, no = (truth & members), (~truth & members)
        if mode == "ballot":
            return put(c, lanes, _ballot(yes))
        found = {"all": ~no.any(axis=1), "any": yes.any(axis=1), "uni": ~no.any(axis=1) | ~yes.any(axis=1)}[mode]
        return put(c, lanes, found.repeat(WARP))

    return op


@operation("activemask")
def _activemask(b: Builder, i: Instruction) -> Op:
    put = b.put(i.operands[0], "b32")
    return lambda c, lanes: put(c, lanes, _ballot(lanes.mask.reshape(-1, WARP)))


@operation("elect")
def _elect(b: Builder, i: Instruction) -> Op:
    """The first of the members."""
    first, mask = i.operands[0], b.get(i.operands[1], "b32")
    lane, chosen = first.items if isinstance(first, Vector) else (first, first)
    put_lane, put = b.put(lane, "b32"), b.put(chosen, "pred")

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        leader = _members(c, lanes, mask).argmax(axis=1).repeat(WARP)
        put_lane(c, lanes, leader.astype(np.uint32))
        put(c, lanes, np.arange(c.threads) % WARP == leader)

    return op


_REDUCE: dict[str, Callable[..., Any]] = {
    "add": np.add.reduce, "min": np.minimum.reduce, "max": np.maximum.reduce, "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce, "xor": np.bitwise_xor.reduce,
}  # fmt: skip


@operation("redux")
def _redux(b: Builder, i: Instruction) -> Op:
    kind, fn = i.parts[-1], _REDUCE[i.parts[2]]
    put, get, mask = b.put(i.operands[0], kind), b.get(i.operands[1], kind), b.get(i.operands[2], "b32")

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        members = _members(c, lanes, mask)
        values = np.broadcast_to(np.asarray(get(c)), c.threads).reshape(-1, WARP)
        found = np.zeros(c.threads // WARP, dtype=kind_of(kind))
        for w in lanes.warps.tolist():
            found[w] = fn(values[w][members[w]].astype(np.int64)).astype(found.dtype)
        put(c, lanes, found.repeat(WARP))

    return op


@operation("match")
def _match(b: Builder, i: Instruction) -> Op:
    """match.any: lanes with an equal value."""
    if i.parts[1] != "any":
        raise ValueError("match.all")
    assert not isinstance(i.operands[0], Immediate)
    put, get, mask = b.put(i.operands[0], "b32"), b.get(i.operands[1], i.parts[-1]), b.get(i.operands[2], "b32")

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        members = _members(c, lanes, mask)
        values = np.broadcast_to(np.asarray(get(c)), c.threads).reshape(-1, WARP)
        equal = (values[:, :, None] == values[:, None, :]) & members[:, None, :]
        put(c, lanes, (equal * _WEIGHTS).sum(axis=2, dtype=np.uint32).reshape(-1))

    return op
