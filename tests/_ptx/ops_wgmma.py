"""wgmma: four warps multiply, with operands in shared memory that descriptors point to.

A product is computed when its group is waited for. Until then its sums hold nonsense, and its operands must not change:
the hardware reads them and writes the sums at any time in between.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from _ptx.block import ThreadBlock
from _ptx.build import Builder, Get, Op, operation
from _ptx.errors import PtxError
from _ptx.lanes import WARP, Lanes
from _ptx.memory import SHARED_START
from _ptx.ops_matrix import left_of, registers, sums_of
from _ptx.ops_memory import items
from _ptx.parse import Immediate, Instruction, Register, Vector
from _ptx.tensor_map import swizzled
from _ptx.values import Array, decode, size_of

__all__ = ["Descriptor"]

_SWIZZLE = (0, 128, 64, 32)


@dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory. leading, stride: bytes. swizzle: bytes of a line whose pieces are exchanged, or 0."""

    start: int
    leading: int
    stride: int
    swizzle: int

    @staticmethod
    def of(bits: int) -> Descriptor:
        """Raises PtxError for bits that nobody knows."""
        if bits >> 49 & 7:
            raise PtxError(f"descriptor {bits:#x} has a base offset, which is unknown here")
        start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        return Descriptor(start, leading, stride, _SWIZZLE[bits >> 62])

    def addresses(self, rows: int, size: int, across: bool) -> Array:
        """[rows, columns]: shared addresses of numbers of `size` bytes in 32 bytes of columns. across: rows that follow
        each other lie side by side, not columns."""
        row, column = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
        byte = column * size
        if not across and self.swizzle:
            plain = row // 8 * self.stride + row % 8 * self.swizzle + byte
        elif not across:
            plain = row // 8 * self.stride + row % 8 * 16 + byte // 16 * self.leading + byte % 16
        elif self.swizzle:
            line = self.swizzle // size
            plain = row // line * self.leading + row % line * size
            plain = plain + column // 8 * self.stride + column % 8 * self.swizzle
        else:
            plain = row // 8 * self.stride + column // 8 * self.leading + column % 8 * 16 + row % 8 * size
        return swizzled(self.start + plain, self.swizzle)

    def read(self, c: ThreadBlock, rows: int, size: int, across: bool) -> Array:
        """[rows, columns] bits; raises PtxError outside of shared memory, or where a fence is missing."""
        at = self.addresses(rows, size, across)
        buffer = c.memories["shared"].buffers[0]
        if at.min() < buffer.begin or at.max() + size > buffer.end:
            raise PtxError(c.memories["shared"].outside(int(at.max()), size) + f" ({self})")
        offset = at - SHARED_START
        c.check_fenced(offset)
        return np.array(c.memories["shared"].view(0, size)[offset // size])


@dataclass
class Product:
    """One instruction of one warpgroup. operands: what they were; read: what they are."""

    read: Callable[[], tuple[Array, Array]]
    operands: tuple[Array, Array]
    slots: list[int]
    finish: Callable[[Array, Array], None]
    text: str


@dataclass
class Queue:
    """A warpgroup's products. sums: [32-bit registers by slot] of those on their way, for the block's threads."""

    open: list[Product] = field(default_factory=list)
    groups: list[list[Product]] = field(default_factory=list)
    sums: dict[int, Array] = field(default_factory=dict)


def _queue(c: ThreadBlock, group: int) -> Queue:
    found: Queue = c.copies.setdefault("wgmma", {}).setdefault(group, Queue())
    return found


@operation("wgmma")
def _wgmma(b: Builder, i: Instruction) -> Op:
    if i.parts[1] == "fence":
        return lambda c, lanes: None
    if i.parts[1] == "commit_group":
        return _commit
    if i.parts[1] == "wait_group":
        assert isinstance(i.operands[0], Immediate)
        return _wait(int(i.operands[0].value))
    return _multiply(b, i)


def _groups_of(lanes: Lanes) -> list[int]:
    return sorted(set((lanes.warps // 4).tolist()))


def _commit(c: ThreadBlock, lanes: Lanes) -> None:
    for group in _groups_of(lanes):
        queue = _queue(c, group)
        queue.groups.append(queue.open)
        queue.open = []


def _wait(left: int) -> Op:
    def op(c: ThreadBlock, lanes: Lanes) -> None:
        for group in _groups_of(lanes):
            queue = _queue(c, group)
            while len(queue.groups) > left:
                for product in queue.groups.pop(0):
                    _finish(product)
            _give_back(c, queue, group)

    return op


def _finish(product: Product) -> None:
    now = product.read()
    for before, after, which in zip(product.operands, now, ("left", "right"), strict=True):
        if not np.array_equal(before, after):
            raise PtxError(f"the {which} operand changed before `{product.text[:60]}...` was waited for")
    product.finish(*now)


def _give_back(c: ThreadBlock, queue: Queue, group: int) -> None:
    """Sums that no product is still adding to."""
    busy = {s for products in [*queue.groups, queue.open] for p in products for s in p.slots}
    mine = np.arange(c.threads) // (4 * WARP) == group
    for slot in [s for s in queue.sums if s not in busy]:
        if (c.r[slot][mine] != 0xFFFFFFFF).any():
            raise PtxError("sums were written before their product was waited for")
        np.copyto(c.r[slot], queue.sums.pop(slot), where=mine)


def _multiply(b: Builder, i: Instruction) -> Op:
    shape = re.match(r"m64n(\d+)k(\d+)$", i.parts[4])
    assert shape is not None
    columns, (to, left, right) = int(shape[1]), i.parts[5:8]
    slots = [r.slot for r in items(i.operands[0]) if isinstance(r, Register)]
    from_registers = isinstance(i.operands[1], Vector)
    scale, *signs = [b.get(o, "pred" if j == 0 else "s32") for j, o in enumerate(i.operands[3:])]
    across = [bool(int(g(None))) for g in signs[2:]]  # type: ignore[arg-type]
    turned_left = across.pop(0) if across and not from_registers else False
    turned_right = across[0] if across else False
    factor = float(np.prod([int(g(None)) for g in signs[:2]])) if signs else 1.0  # type: ignore[arg-type]
    ga = [b.get(r, "b32") for r in items(i.operands[1])] if from_registers else [b.get(i.operands[1], "b64")]
    gb = b.get(i.operands[2], "b64")

    def operand_a(c: ThreadBlock, group: int) -> Callable[[], Array]:
        if from_registers:
            warps = np.arange(4 * group, 4 * group + 4)
            return lambda: registers(c, ga, warps)
        found = _descriptor(c, ga[0], group)
        return lambda: found.read(c, 64, size_of(left), turned_left)

    def issue(c: ThreadBlock, group: int) -> None:
        read_a, found = operand_a(c, group), _descriptor(c, gb, group)
        queue, warps = _queue(c, group), np.arange(4 * group, 4 * group + 4)
        keep = bool(_same(c, scale, group))

        def read() -> tuple[Array, Array]:
            return read_a(), found.read(c, columns, size_of(right), turned_right)

        def finish(a: Array, by: Array) -> None:
            matrix = left_of(a, left).reshape(64, -1) if from_registers else _plain(a, left)
            sums = sums_of((factor * (matrix @ _plain(by, right).T)).reshape(4, 16, columns))
            _add(queue, slots, sums, to, keep, warps, c)

        _take(c, queue, slots, group)
        now = read()
        if from_registers and c.copies["registers at issue"]:
            queue.open.append(Product(lambda: (now[0], read()[1]), now, slots, finish, i.text))
        else:
            queue.open.append(Product(read, now, slots, finish, i.text))

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        for group in _groups_of(lanes):
            issue(c, group)

    return op


def _take(c: ThreadBlock, queue: Queue, slots: list[int], group: int) -> None:
    """Sums belong to the product from here on."""
    mine = np.arange(c.threads) // (4 * WARP) == group
    for slot in slots:
        if slot not in queue.sums:
            queue.sums[slot] = c.r[slot].copy()
            np.copyto(c.r[slot], np.uint32(0xFFFFFFFF), where=mine)


def _add(queue: Queue, slots: list[int], sums: Array, to: str, keep: bool, warps: Array, c: ThreadBlock) -> None:
    """The product plus what was there, or the product alone."""
    if to == "f16":
        sums = sums.reshape(-1, 2, *sums.shape[1:]).transpose(0, 2, 3, 1)
    for slot, new in zip(slots, sums, strict=True):
        held = queue.sums[slot].reshape(-1, WARP)
        old = np.ascontiguousarray(held[warps])
        if to == "f16":
            wide = old.view(np.float16).reshape(*old.shape, 2).astype(np.float32)
            held[warps] = np.ascontiguousarray((new + wide * keep).astype(np.float16)).view(np.uint32)[..., 0]
        elif to == "s32":
            held[warps] = (np.rint(new).astype(np.int32) + old.view(np.int32) * np.int32(keep)).view(np.uint32)
        else:
            held[warps] = (new + np.where(keep, old.view(np.float32), np.float32(0))).astype(np.float32).view(np.uint32)


def _plain(bits: Array, kind: str) -> Array:
    """[rows, columns] as float32."""
    if kind in ("s8", "u8"):
        return bits.view(np.int8 if kind == "s8" else np.uint8).astype(np.float32)
    return decode(bits, kind)


def _same(c: ThreadBlock, get: Get, group: int) -> Any:
    """What all threads of a warpgroup agree on."""
    values = np.broadcast_to(np.asarray(get(c)), c.threads)[4 * WARP * group : 4 * WARP * (group + 1)]
    if (values != values[0]).any():
        raise PtxError(f"threads of warpgroup {group} disagree on a descriptor or scale: {np.unique(values).tolist()}")
    return values[0]


def _descriptor(c: ThreadBlock, get: Get, group: int) -> Descriptor:
    return Descriptor.of(int(_same(c, get, group)))
