"""Bits of integers: shifts, fields, any function of three, permutations of bytes, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from _ptx.block import ThreadBlock
from _ptx.build import Builder, Op, operation
from _ptx.lanes import Lanes
from _ptx.ops_integer import elementwise, kind_at_end
from _ptx.parse import Immediate, Instruction
from _ptx.values import Array, kind_of

__all__: list[str] = []


@operation("shl", "shr")
def _shift(b: Builder, i: Instruction) -> Op:
    kind = kind_at_end(i)
    bits = int(kind[1:])
    left = i.parts[0] == "shl"
    operator = np.left_shift if left else np.right_shift
    dtype = np.dtype(kind_of(kind))
    by = i.operands[2]
    if isinstance(by, Immediate) and isinstance(by.value, int) and 0 <= by.value < bits:
        amount = dtype.type(by.value)
        put, get = b.put(i.operands[0], kind), b.get(i.operands[1], kind)
        return lambda c, lanes: put(c, lanes, operator(get(c), amount))

    def shift(a: Array, n: Array) -> Array:
        n = np.asarray(n)
        found = operator(a, np.minimum(n, bits - 1).astype(dtype))
        beyond = dtype.type(0) if left or kind[0] != "s" else np.asarray(a) >> dtype.type(bits - 1)
        return np.asarray(np.where(n >= bits, beyond, found))

    return elementwise(b, i, shift, [kind, "u32"], kind)


@operation("shf")
def _funnel(b: Builder, i: Instruction) -> Op:
    """The upper (left) or lower (right) word of two, shifted."""
    left, wrap = i.parts[1] == "l", i.parts[2] == "wrap"

    def shift(low: Array, high: Array, n: Array) -> Array:
        n = np.asarray(n & 31 if wrap else np.minimum(n, 32)).astype(np.uint64)
        both = np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)
        found = (both << n) >> np.uint64(32) if left else both >> n
        return np.asarray(found).astype(np.uint32)

    return elementwise(b, i, shift, ["b32", "b32", "u32"], "b32")


@operation("bfe")
def _extract(b: Builder, i: Instruction) -> Op:
    kind = kind_at_end(i)
    bits = int(kind[1:])

    def extract(a: Array, position: Array, length: Array) -> Array:
        a, p, n = np.broadcast_arrays(a, position & 0xFF, length & 0xFF)
        wide = [_field(int(x), int(y), int(z), bits, kind[0] == "s") for x, y, z in zip(a, p, n, strict=True)]
        return np.array(wide, dtype=f"u{bits // 8}")

    def fast(a: Array) -> Array:
        up = np.array(bits - start - size).astype(a.dtype)
        return np.asarray((a << up) >> np.array(bits - size).astype(a.dtype))

    where, length = i.operands[2:]
    if isinstance(where, Immediate) and isinstance(length, Immediate):
        start, size = int(where.value) & 0xFF, int(length.value) & 0xFF
        if size > 0 and start + size <= bits:
            put, get = b.put(i.operands[0], kind), b.get(i.operands[1], kind)
            return lambda c, lanes: put(c, lanes, fast(get(c)))
    return elementwise(b, i, extract, [kind, "u32", "u32"], kind)


def _field(a: int, position: int, length: int, bits: int, signed: bool) -> int:
    """Bits of a number; beyond its end are its sign's."""
    if length == 0 or (not signed and position >= bits):
        return 0
    found = a >> min(position, bits - 1 if signed else position) & ((1 << length) - 1)
    if not signed:
        return (a % (1 << bits)) >> position & ((1 << length) - 1)
    sign = a >> min(position + length - 1, bits - 1) & 1
    found = a >> position & ((1 << length) - 1)
    return (found - (sign << length)) % (1 << bits)


@operation("bfi")
def _insert(b: Builder, i: Instruction) -> Op:
    kind = kind_at_end(i)
    bits = int(kind[1:])
    dtype = np.dtype(kind_of(kind))

    def insert(a: Array, into: Array, position: Array, length: Array) -> Array:
        p, n = np.asarray(position & 0xFF).astype(object), np.asarray(length & 0xFF).astype(object)
        mask = (((1 << np.minimum(n, bits)) - 1) << np.minimum(p, bits)) & ((1 << bits) - 1)
        mask = np.asarray(mask).astype(dtype)
        shifted = np.asarray(a) << np.asarray(np.minimum(p, bits - 1)).astype(dtype)
        return np.asarray((into & ~mask) | (shifted & mask))

    return elementwise(b, i, insert, [kind, kind, "u32", "u32"], kind)


@operation("lop3")
def _lop3(b: Builder, i: Instruction) -> Op:
    table = i.operands[4]
    assert isinstance(table, Immediate)
    fn = _logic_of(int(table.value))
    put = b.put(i.operands[0], "b32")
    ga, gb, gc = (b.get(o, "b32") for o in i.operands[1:4])
    return lambda c, lanes: put(c, lanes, fn(ga(c), gb(c), gc(c)))


def _logic_of(table: int) -> Callable[[Any, Any, Any], Any]:
    """Bit j of the table is the result where the three bits are j's: a is worth 4, b 2, c 1."""
    known: dict[int, Callable[[Any, Any, Any], Any]] = {
        0xEA: lambda a, b, c: (a & b) | c, 0x6A: lambda a, b, c: (a & b) ^ c, 0x96: lambda a, b, c: a ^ b ^ c,
        0xFE: lambda a, b, c: a | b | c, 0x80: lambda a, b, c: a & b & c, 0xF8: lambda a, b, c: a | (b & c),
    }  # fmt: skip
    if table in known:
        return known[table]
    # Of the ones or of the zeros, whichever are fewer.
    ones = bin(table).count("1") <= 4
    terms = [j for j in range(8) if (table >> j & 1) == ones]

    def fn(a: Any, b: Any, c: Any) -> Any:
        found: Any = np.zeros_like(a ^ b ^ c)
        for j in terms:
            found = found | ((a if j & 4 else ~a) & (b if j & 2 else ~b) & (c if j & 1 else ~c))
        return found if ones else ~found

    return fn


@operation("prmt")
def _permute(b: Builder, i: Instruction) -> Op:
    mode = i.parts[2] if len(i.parts) > 2 else ""

    def permute(a: Array, by: Array, selector: Array) -> Array:
        a, by, selector = np.broadcast_arrays(a, by, selector)
        data = np.stack([a, by], axis=1).view(np.uint8).reshape(len(a), 8)
        places = _places(selector, mode)
        found = np.take_along_axis(data, places & 7, axis=1)
        sign = np.where(found & 0x80, np.uint8(0xFF), np.uint8(0))
        chosen = np.where(places & 8, sign, found).astype(np.uint8)
        return np.ascontiguousarray(chosen).view(np.uint32)[:, 0]

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        values = [np.broadcast_to(np.asarray(g(c), dtype=np.uint32), c.threads) for g in gets]
        put(c, lanes, permute(*values))

    put, gets = b.put(i.operands[0], "b32"), [b.get(o, "b32") for o in i.operands[1:4]]
    return op


_MODES = {
    "f4e": ((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)),
    "b4e": ((0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)),
    "rc8": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
    "ecl": ((0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)),
    "ecr": ((0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)),
    "rc16": ((0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)),
}


def _places(selector: Array, mode: str) -> Array:
    """[threads, 4]: which byte of eight; 8 more for its sign."""
    if mode:
        return np.asarray(np.array(_MODES[mode])[selector & 3])
    return np.asarray(selector[:, None] >> np.array([0, 4, 8, 12], dtype=np.uint32) & np.uint32(15)).astype(np.int64)


def _bits_of(a: Array) -> Array:
    """[n, bits], lowest first."""
    plain = np.ascontiguousarray(np.atleast_1d(a))
    found: Array = np.unpackbits(plain.view(np.uint8).reshape(len(plain), -1), axis=1, bitorder="little")
    return found


@operation("popc", "clz", "brev", "bfind")
def _count(b: Builder, i: Instruction) -> Op:
    name, kind = i.parts[0], kind_at_end(i)

    def popc(a: Array) -> Array:
        return np.asarray(_bits_of(a).sum(axis=1), dtype=np.uint32)

    def clz(a: Array) -> Array:
        bits = _bits_of(a)[:, ::-1]
        return np.where(bits.any(axis=1), bits.argmax(axis=1), bits.shape[1]).astype(np.uint32)

    def bfind(a: Array) -> Array:
        a = np.where(a < 0, ~a, a) if kind[0] == "s" else a
        zeros = clz(a)
        bits = np.uint32(a.dtype.itemsize * 8)
        found = zeros if i.has("shiftamt") else bits - np.uint32(1) - zeros
        return np.where(zeros == bits, np.uint32(0xFFFFFFFF), found)

    def brev(a: Array) -> Array:
        bits = np.packbits(_bits_of(a)[:, ::-1], axis=1, bitorder="little")
        return np.asarray(np.ascontiguousarray(bits).view(a.dtype)[:, 0])

    fn = {"popc": popc, "clz": clz, "brev": brev, "bfind": bfind}[name]
    return elementwise(b, i, fn, [kind], kind if name == "brev" else "u32")
