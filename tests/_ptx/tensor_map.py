"""What the copy engine knows of a tensor: a stand-in for the driver's 128 bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from _ptx.memory import Memory
from _ptx.values import Array

__all__ = ["TensorMap", "swizzled"]


def swizzled(address: Array, width: int) -> Array:
    """Where a byte lies whose place without exchanges is `address`: 16-byte pieces of `width` bytes (128, 64, 32) are
    exchanged as bits 7 and on say; 0 exchanges nothing."""
    if not width:
        return address
    bits = {128: 7, 64: 3, 32: 1}[width]
    return np.asarray(address ^ ((address >> 7 & bits) << 4))


@dataclass(frozen=True)
class TensorMap:
    """address: of the first element. sizes, box: elements along every axis, the contiguous one first. strides: bytes
    from one to the next along the axes after the first. width: bytes of an element. swizzle: bytes, or 0."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    width: int
    swizzle: int = 0

    @staticmethod
    def of(tensor: torch.Tensor, box: Sequence[int], swizzle: int = 0) -> TensorMap:
        """Of a tensor whose last axis is contiguous; `box` has that axis last, as the tensor's shape."""
        width = tensor.element_size()
        strides = tuple(s * width for s in tensor.stride()[-2::-1])
        return TensorMap(tensor.data_ptr(), tuple(tensor.shape[::-1]), strides, tuple(box[::-1]), width, swizzle)

    def __post_init__(self) -> None:
        line = self.box[0] * self.width
        if self.address % 16 or any(s % 16 for s in self.strides):
            raise ValueError("a tensor's address and strides must be multiples of 16 bytes")
        if line % 16 or (self.swizzle and line > self.swizzle) or any(b > 256 for b in self.box):
            raise ValueError(f"a box of {self.box} elements of {self.width} bytes, exchanged over {self.swizzle}")

    @property
    def box_bytes(self) -> int:
        """Bytes of a box."""
        return int(np.prod(self.box)) * self.width

    def read(self, memory: Memory, first: Sequence[int], at: int) -> Array:
        """The box from an element on, as it lies in shared memory from address `at` on; zeros outside the tensor."""
        data = np.zeros(self.box_bytes, dtype=np.uint8)
        for where, line, count, skipped in self._lines(first):
            start = line * self.box[0] * self.width + skipped
            data[start : start + count] = memory.bytes_at(where, count)
        return self._exchange(data, at)

    def write(self, memory: Memory, first: Sequence[int], data: Array, at: int) -> None:
        """Put a box where it belongs; what is outside of the tensor is left out."""
        plain = self._exchange(data, at)
        for where, line, count, skipped in self._lines(first):
            start = line * self.box[0] * self.width + skipped
            memory.bytes_at(where, count)[:] = plain[start : start + count]

    def _lines(self, first: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """(address, line of the box, bytes inside the tensor, bytes of the line before them)."""
        low, high = max(first[0], 0), min(first[0] + self.box[0], self.sizes[0])
        found = []
        for line, rest in enumerate(itertools.product(*[range(b) for b in self.box[:0:-1]])):
            place = [f + r for f, r in zip(first[1:], rest[::-1], strict=True)]
            if low < high and all(0 <= p < s for p, s in zip(place, self.sizes[1:], strict=True)):
                offset = sum(p * s for p, s in zip(place, self.strides, strict=True))
                skipped = (low - first[0]) * self.width
                found.append((self.address + offset + low * self.width, line, (high - low) * self.width, skipped))
        return found

    def _exchange(self, data: Array, at: int) -> Array:
        """Exchanging twice is doing nothing, so it serves both ways."""
        if not self.swizzle:
            return data
        place = np.arange(data.size) + at
        moved = swizzled(place, self.swizzle) - at
        if moved.min() < 0 or moved.max() >= data.size:
            raise ValueError(f"a box at {at:#x} is not aligned to its exchange of {self.swizzle} bytes")
        return np.asarray(data[moved])
