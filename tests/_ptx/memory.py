"""Memory of a kernel: tensors at their real addresses, shared memory, parameters, and windows of generic addresses."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from _ptx.errors import PtxError
from _ptx.values import Array, unsigned

__all__ = ["LOCAL", "PARAM", "SHARED", "SHARED_START", "Buffer", "Memory"]

WINDOW = 1 << 40
SHARED, LOCAL, PARAM, NAMED = (0x7F00_0000_0000_0000 + i * WINDOW for i in range(4))
"""Where the windows of generic addresses begin: beyond any address that this machine's tensors have."""
SHARED_START = 1024
"""Shared address of the first byte: not 0, so that nothing works because it happens to be."""


@dataclass
class Buffer:
    """Bytes that a kernel may touch, from `begin` to `end`. data: bytes from `first` (a multiple of 16) on."""

    name: str
    begin: int
    end: int
    first: int
    data: Array

    @staticmethod
    def of_array(name: str, begin: int, data: Array) -> Buffer:
        """Bytes of this process at an address of their own. begin: a multiple of 16."""
        return Buffer(name, begin, begin + data.size, begin, data)

    @staticmethod
    def of_tensor(name: str, tensor: torch.Tensor) -> Buffer:
        """A tensor's bytes at their real address."""
        begin, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        first = begin // 16 * 16
        room = -(first - begin - size) // 16 * 16 + 16
        # The few bytes around it that share its 16-byte pieces are mapped too; nobody touches them.
        data = np.ctypeslib.as_array((ctypes.c_uint8 * room).from_address(first))
        return Buffer(name, begin, begin + size, first, data)


class Memory:
    """All buffers of one space, found by address."""

    def __init__(self, what: str, buffers: list[Buffer]) -> None:
        self.what = what
        self.buffers = sorted((b for b in buffers if b.end > b.begin), key=lambda b: b.begin)
        self.begins = np.array([b.begin for b in self.buffers], dtype=np.uint64)
        self.views: dict[tuple[int, int], Array] = {}

    def find(self, low: int, high: int) -> int:
        """Number of the buffer that holds bytes low to high; -1 where none does."""
        i = int(np.searchsorted(self.begins, np.uint64(low), "right")) - 1
        return i if i >= 0 and high <= self.buffers[i].end else -1

    def view(self, i: int, size: int) -> Array:
        """Buffer i as unsigned integers of `size` bytes."""
        if (i, size) not in self.views:
            self.views[i, size] = self.buffers[i].data.view(unsigned(size))
        return self.views[i, size]

    def bytes_at(self, address: int, size: int) -> Array:
        """A view of bytes; raises PtxError outside."""
        i = self.find(address, address + size)
        if i < 0:
            raise PtxError(self.outside(address, size))
        start = address - self.buffers[i].first
        return self.buffers[i].data[start : start + size]

    def load(self, at: Array, size: int, count: int) -> Array:
        """[len(at), count] integers of `size` bytes; raises PtxError (with `.lane`)."""
        i, offset = self._place(at, size * count)
        if i < 0:
            return np.concatenate([self.load(at[j : j + 1], size, count) for j in range(len(at))])
        data = self.view(i, size)
        if count == 1:
            return data[offset // np.uint64(size)][:, None]
        return data[(offset // np.uint64(size))[:, None] + np.arange(count, dtype=np.uint64)]

    def store(self, at: Array, values: Array) -> None:
        """Write [len(at), count] integers; of several to one place the last one stays."""
        size, count = values.dtype.itemsize, values.shape[1]
        i, offset = self._place(at, size * count)
        if i < 0:
            for j in range(len(at)):
                self.store(at[j : j + 1], values[j : j + 1])
            return
        data, where = self.view(i, size), offset // np.uint64(size)
        if count == 1:
            data[where] = values[:, 0]
        else:
            data[where[:, None] + np.arange(count, dtype=np.uint64)] = values

    def _place(self, at: Array, total: int) -> tuple[int, Array]:
        """The one buffer of all addresses (-1: several) and where in its data."""
        wrong = at & np.uint64(total - 1)
        if wrong.any():
            lane = int(np.flatnonzero(wrong)[0])
            raise _of_lane(f"{total} bytes at {int(at[lane]):#x} in {self.what} memory are not aligned", lane)
        low, high = int(at.min()), int(at.max()) + total
        i = self.find(low, high)
        if i >= 0:
            return i, at - np.uint64(self.buffers[i].first)
        for lane, a in enumerate(at.tolist()):
            if self.find(a, a + total) < 0:
                raise _of_lane(self.outside(a, total), lane)
        return -1, at

    def outside(self, address: int, size: int) -> str:
        """What to say of bytes that no buffer holds."""
        near = min(self.buffers, key=lambda b: min(abs(b.begin - address), abs(b.end - address)), default=None)
        where = ""
        if near is not None:
            where = f"; nearest is {near.name} of {near.end - near.begin} bytes, at byte {address - near.begin} of it"
        return f"{size} bytes at {address:#x} in {self.what} memory are outside of all buffers{where}"


def _of_lane(message: str, lane: int) -> PtxError:
    error = PtxError(message)
    error.lane = lane  # type: ignore[attr-defined]
    return error
