"""Operands as functions: how an instruction gets its numbers and where it leaves them. Operations register here."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from _ptx.errors import PtxError
from _ptx.lanes import Lanes
from _ptx.parse import Address, Immediate, Instruction, Name, Operand, Register, Vector
from _ptx.values import Array, is_float, kind_of, size_of, unsigned

if TYPE_CHECKING:
    from _ptx.block import ThreadBlock

__all__ = ["OPS", "Builder", "Get", "Op", "Put", "operation"]

Op = Callable[["ThreadBlock", Lanes], None]
Get = Callable[["ThreadBlock"], Any]
"""All threads' values: an array, or one number where it is the same for all."""
Put = Callable[["ThreadBlock", Lanes, Array], None]
"""Leave values for some threads. The array is kept: it must not be any register's own."""
OPS: dict[str, Callable[[Builder, Instruction], Op]] = {}
"""First part of an instruction's name -> what makes it a function."""


def operation(*names: str) -> Callable[[Callable[[Builder, Instruction], Op]], Callable[[Builder, Instruction], Op]]:
    """Register what builds instructions whose name starts so."""

    def register(make: Callable[[Builder, Instruction], Op]) -> Callable[[Builder, Instruction], Op]:
        for name in names:
            OPS[name] = make
        return make

    return register


class Builder:
    """Knows where variables lie. addresses: of variables and parameters, by name."""

    def __init__(self, addresses: dict[str, int]) -> None:
        self.addresses = addresses

    def op(self, i: Instruction) -> Op:
        """What an instruction does to a thread block, its guard included; what is unknown raises PtxError when run."""
        make = OPS.get(i.parts[0])
        if make is None:
            return _unknown(i)
        try:
            op = make(self, i)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, AssertionError) as e:
            return _unknown(i, f" ({type(e).__name__}: {e})")
        if i.guard is None:
            return op
        wanted = self.get(i.guard, "pred")

        def guarded(c: ThreadBlock, lanes: Lanes) -> None:
            some = lanes.also(wanted(c))
            if not some.empty:
                op(c, some)

        return guarded

    def get(self, operand: Operand, kind: str) -> Get:
        """Values of an operand as a PTX type; narrow floats that numpy lacks as their bits."""
        if isinstance(operand, Register):
            return _register(operand, kind)
        if isinstance(operand, Immediate):
            value = _constant(operand.value, kind)
            return lambda c: value
        if isinstance(operand, Vector):
            return self._joined(operand, kind)
        name, offset = (operand.base, operand.offset) if isinstance(operand, Address) else (operand, 0)
        assert isinstance(name, Name)
        if name.name in self.addresses:
            place = _constant(self.addresses[name.name] + offset, kind)
            return lambda c: place
        special = name.name
        if not special.startswith("%"):
            raise ValueError(f"unknown name {special}")
        want = np.dtype(kind_of(kind))
        return lambda c: c.special(special).astype(want)

    def _joined(self, operand: Vector, kind: str) -> Get:
        """`{low, high}` as one number."""
        size = size_of(kind) // len(operand.items)
        parts = [self.get(item, f"b{8 * size}") for item in operand.items]
        final = unsigned(size * len(parts))

        def get(c: ThreadBlock) -> Array:
            columns = [np.broadcast_to(p(c), c.threads) for p in parts]
            return np.stack(columns, axis=1).view(final)[:, 0]

        return get

    def put(self, operand: Operand, kind: str) -> Put:
        """Leave values of a PTX type in a register, wider ones extended."""
        if isinstance(operand, Name) and operand.name == "_":
            return lambda c, lanes, value: None
        if isinstance(operand, Vector):
            return self._taken_apart(operand, kind)
        assert isinstance(operand, Register)
        slot, width = operand.slot, unsigned(operand.width)

        def put(c: ThreadBlock, lanes: Lanes, value: Array) -> None:
            if value.dtype != width:
                value = value.view(width) if value.dtype.itemsize == width.itemsize else value.astype(width)
            if lanes.full and value.ndim and len(value) == c.threads:
                c.r[slot] = value
            else:
                np.copyto(c.r[slot], value, where=lanes.mask)

        return put

    def _taken_apart(self, operand: Vector, kind: str) -> Put:
        size = size_of(kind) // len(operand.items)
        puts = [self.put(item, f"b{8 * size}") for item in operand.items]

        def put(c: ThreadBlock, lanes: Lanes, value: Array) -> None:
            parts = np.ascontiguousarray(np.broadcast_to(value, c.threads)).view(unsigned(size)).reshape(c.threads, -1)
            for j, one in enumerate(puts):
                one(c, lanes, parts[:, j].copy())

        return put

    def address(self, operand: Operand) -> Get:
        """uint64 addresses of `[...]`, one for each thread."""
        if not isinstance(operand, Address):
            operand = Address(operand, 0)
        base, offset = operand.base, np.uint64(operand.offset % (1 << 64))
        if not isinstance(base, Register):
            get = self.get(base, "u64")
            return lambda c: np.full(c.threads, np.asarray(get(c), dtype=np.uint64) + offset)
        slot = base.slot
        if base.width == 8:
            return lambda c: c.r[slot] + offset
        # Addresses of 32 bits (of shared memory): an offset below zero must not leave them.
        short = np.uint32(operand.offset % (1 << 32))
        return lambda c: (c.r[slot] + short).astype(np.uint64)


def _register(register: Register, kind: str) -> Get:
    slot, size = register.slot, size_of(kind)
    if register.width == 0:
        return (lambda c: ~c.r[slot]) if register.negated else (lambda c: c.r[slot])
    want = kind_of(kind)
    if register.width == size:
        if want is None or np.dtype(want) == unsigned(size):
            return lambda c: c.r[slot]
        return lambda c: c.r[slot].view(want)
    bits = unsigned(size)
    if want is None:
        return lambda c: c.r[slot].astype(bits)
    if kind[0] == "s" and register.width < size:
        narrow = f"i{register.width}"
        return lambda c: c.r[slot].view(narrow).astype(want)
    return lambda c: c.r[slot].astype(bits).view(want)


def _constant(value: int | float, kind: str) -> Any:
    size = size_of(kind)
    if size == 0:
        return np.bool_(value)
    if isinstance(value, float):
        if kind in ("f32", "f64"):
            return np.dtype(kind_of(kind)).type(value)
        value = int.from_bytes(struct.pack("<d" if size == 8 else "<f", value), "little")
    found = np.array(value % (1 << 8 * size), dtype=unsigned(size))
    want = kind_of(kind)
    return found[()] if want is None or (is_float(kind) and want is None) else found.view(want)[()]


def _unknown(i: Instruction, why: str = "") -> Op:
    def op(c: ThreadBlock, lanes: Lanes) -> None:
        raise PtxError(f"unknown instruction{why}")

    return op
