"""cp.async.bulk: the copy engine. Copies into shared memory land when somebody waits for their barrier; copies out of
it read what is there when somebody waits for their group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from _ptx.block import Copy, ThreadBlock
from _ptx.build import Builder, Get, Op
from _ptx.errors import PtxError
from _ptx.lanes import Lanes
from _ptx.memory import SHARED
from _ptx.parse import Address, Immediate, Instruction
from _ptx.tensor_map import TensorMap
from _ptx.values import Array

__all__ = ["bulk"]


def bulk(b: Builder, i: Instruction) -> Op:
    """Copies of bytes and of boxes of tensors, commit and wait."""
    if i.has("commit_group"):
        return _commit
    if i.has("wait_group"):
        assert isinstance(i.operands[0], Immediate)
        return _wait(int(i.operands[0].value))
    if i.has("prefetch"):
        return lambda c, lanes: None
    if i.has("multicast::cluster", "im2col", "reduce"):
        raise ValueError("multicast, im2col and reduction")
    outwards = i.parts[-1] == "bulk_group" or i.has("bulk_group")
    if i.has("tensor"):
        return _tensor_out(b, i) if outwards else _tensor_in(b, i)
    return _bytes_out(b, i) if outwards else _bytes_in(b, i)


def _each(c: ThreadBlock, lanes: Lanes, gets: list[Get]) -> list[tuple[int, ...]]:
    """Values of every thread that is here."""
    columns = [np.broadcast_to(np.asarray(g(c)), c.threads)[lanes.index].tolist() for g in gets]
    return [tuple(int(v) for v in row) for row in zip(*columns, strict=True)]


def _shared(c: ThreadBlock, at: int, size: int, align: int) -> Array:
    at -= SHARED if at >= SHARED else 0
    if at % align:
        raise PtxError(f"a bulk copy's shared address {at:#x} is no multiple of {align}")
    return c.memories["shared"].bytes_at(at, size)


def _depart(c: ThreadBlock, place: Array, barrier: int, read: Callable[[], Array]) -> None:
    """A copy on its way into shared memory."""
    barrier -= SHARED if barrier >= SHARED else 0
    if barrier not in c.mbarriers:
        raise PtxError(f"no mbarrier was initialized at {barrier:#x}")
    place[:] = 0xFF

    def land() -> None:
        from _ptx.ops_async import settle

        place[:] = read()
        c.mbarriers[barrier].bytes -= place.size
        settle(c, c.mbarriers[barrier])

    c.flights.append(Copy(land, barrier))


def _bytes_in(b: Builder, i: Instruction) -> Op:
    gets = [b.address(i.operands[0]), b.address(i.operands[1]), b.get(i.operands[2], "u32"), b.address(i.operands[3])]

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        for to, source, size, barrier in _each(c, lanes, gets):
            if size % 16 or source % 16:
                raise PtxError(f"a bulk copy of {size} bytes from {source:#x}: both must be multiples of 16")
            data = c.memories["global"].bytes_at(source, size)
            _depart(c, _shared(c, to, size, 16), barrier, lambda data=data: data)  # type: ignore[misc]

    return op


def _bytes_out(b: Builder, i: Instruction) -> Op:
    gets = [b.address(i.operands[0]), b.address(i.operands[1]), b.get(i.operands[2], "u32")]

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        for to, source, size in _each(c, lanes, gets):
            if size % 16 or to % 16:
                raise PtxError(f"a bulk copy of {size} bytes to {to:#x}: both must be multiples of 16")
            place, data = c.memories["global"].bytes_at(to, size), _shared(c, source, size, 16)
            _leave(c, lambda place=place, data=data: np.copyto(place, data))  # type: ignore[misc]

    return op


def _tensor(b: Builder, i: Instruction, box: int, tensor: int) -> tuple[Get, Get, list[Get]]:
    """Addresses of the box and of the map, and the coordinates."""
    address = i.operands[tensor]
    assert isinstance(address, Address)
    assert address.coordinates is not None
    coordinates = [b.get(x, "s32") for x in address.coordinates.items]
    return b.address(i.operands[box]), b.address(Address(address.base, address.offset)), coordinates


def _map_at(c: ThreadBlock, at: int) -> TensorMap:
    found: dict[int, TensorMap] = c.copies["maps"]
    if at not in found:
        raise PtxError(f"no tensor map at {at:#x}")
    return found[at]


def _tensor_in(b: Builder, i: Instruction) -> Op:
    to, source, coordinates = _tensor(b, i, 0, 1)
    gets = [to, source, b.address(i.operands[2]), *coordinates]

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        for to, at, barrier, *where in _each(c, lanes, gets):
            found = _map_at(c, at)
            place = _shared(c, to, found.box_bytes, 128)
            first = to % (1 << 32)
            _depart(c, place, barrier, lambda f=found, w=where, a=first: f.read(c.memories["global"], w, a))  # type: ignore[misc]

    return op


def _tensor_out(b: Builder, i: Instruction) -> Op:
    source, to, coordinates = _tensor(b, i, 1, 0)
    gets = [source, to, *coordinates]

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        for source, at, *where in _each(c, lanes, gets):
            found = _map_at(c, at)
            data = _shared(c, source, found.box_bytes, 128)
            first = source % (1 << 32)

            def write(f: TensorMap = found, w: list[int] = where, d: Array = data, a: int = first) -> None:
                f.write(c.memories["global"], w, d, a)

            _leave(c, write)

    return op


def _leave(c: ThreadBlock, write: Callable[[], Any]) -> None:
    """A copy out of shared memory: of the group that is not committed yet."""
    c.copies.setdefault("out", []).append(write)


def _commit(c: ThreadBlock, lanes: Lanes) -> None:
    c.copies.setdefault("out groups", []).append(c.copies.pop("out", []))


def _wait(left: int) -> Op:
    def op(c: ThreadBlock, lanes: Lanes) -> None:
        groups = c.copies.get("out groups", [])
        while len(groups) > left:
            for write in groups.pop(0):
                write()

    return op
