"""Integer and bit instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from _ptx.block import ThreadBlock
from _ptx.build import Builder, Op, operation
from _ptx.lanes import Lanes
from _ptx.parse import Instruction
from _ptx.values import Array, is_float, kind_of

__all__ = ["elementwise", "kind_at_end"]


def kind_at_end(i: Instruction) -> str:
    """The type that ends an instruction's name."""
    return i.parts[-1]


def elementwise(b: Builder, i: Instruction, fn: Callable[..., Any], kinds: list[str], to: str) -> Op:
    """d = fn(operands), each read as its type."""
    put = b.put(i.operands[0], to)
    gets = [b.get(o, k) for o, k in zip(i.operands[1:], kinds, strict=True)]
    if len(gets) == 1:
        (g0,) = gets
        return lambda c, lanes: put(c, lanes, fn(g0(c)))
    if len(gets) == 2:
        g0, g1 = gets
        return lambda c, lanes: put(c, lanes, fn(g0(c), g1(c)))

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        put(c, lanes, fn(*[g(c) for g in gets]))

    return op


@operation("mov")
def _mov(b: Builder, i: Instruction) -> Op:
    kind = kind_at_end(i)
    put, get = b.put(i.operands[0], kind), b.get(i.operands[1], kind)
    return lambda c, lanes: put(c, lanes, get(c).copy())


@operation("and", "or", "xor", "not", "cnot")
def _logic(b: Builder, i: Instruction) -> Op:
    name, kind = i.parts[0], kind_at_end(i)
    if name == "not":
        return elementwise(b, i, np.invert, [kind], kind)
    if name == "cnot":
        return elementwise(b, i, lambda a: (a == 0).astype(a.dtype), [kind], kind)
    fn = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
    return elementwise(b, i, fn, [kind, kind], kind)


_PLAIN: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "abs": np.abs, "neg": np.negative,
}  # fmt: skip


def integer(b: Builder, i: Instruction) -> Op:
    """add, sub, min, max, abs, neg, mul, mad, div, rem of integers."""
    name, kind = i.parts[0], kind_at_end(i)
    if name in ("mul", "mad"):
        return _multiply(b, i, kind)
    fn = _PLAIN.get(name) or {"div": _divide, "rem": _remainder}[name]
    if i.has("cc", "sat"):
        raise ValueError("carries and saturation")
    return elementwise(b, i, fn, [kind] * (len(i.operands) - 1), kind)


def _divide(a: Array, by: Array) -> Array:
    """Towards zero; by zero all bits are set."""
    a, by = np.broadcast_arrays(a, by)
    safe = np.where(by == 0, by.dtype.type(1), by)
    whole = a // safe
    if a.dtype.kind == "i":
        whole = whole + ((whole < 0) & (whole * safe != a))
    return np.where(by == 0, a.dtype.type(0) - a.dtype.type(1) if a.dtype.kind == "i" else ~a.dtype.type(0), whole)


def _remainder(a: Array, by: Array) -> Array:
    return np.asarray(a - _divide(a, by) * by)


def _multiply(b: Builder, i: Instruction, kind: str) -> Op:
    part = next((p for p in i.parts if p in ("lo", "hi", "wide")), "lo")
    if i.has("cc", "sat"):
        raise ValueError("carries and saturation")
    bits = int(kind[1:])
    wide = f"{kind[0]}{2 * bits}"
    to = wide if part == "wide" else kind
    if part == "lo":
        product: Callable[..., Any] = np.multiply
    elif bits == 64:
        product = _high64
    else:
        product = _widened(np.dtype(kind_of(wide)), np.dtype(kind_of(kind)) if part == "hi" else None, bits)
    if i.parts[0] == "mul":
        return elementwise(b, i, product, [kind, kind], to)
    return elementwise(b, i, lambda x, y, z: product(x, y) + z, [kind, kind, to], to)


def _widened(wide: np.dtype[Any], high: np.dtype[Any] | None, bits: int) -> Callable[..., Any]:
    shift = wide.type(bits)

    def product(a: Array, by: Array) -> Array:
        full: Array = np.asarray(a).astype(wide) * np.asarray(by).astype(wide)
        return full if high is None else (full >> shift).astype(high)

    return product


def _high64(a: Array, by: Array) -> Array:
    a, by = np.broadcast_arrays(a, by)
    high = [(int(x) * int(y)) >> 64 for x, y in zip(a.ravel(), by.ravel(), strict=True)]
    return np.array([h % (1 << 64) for h in high], dtype=np.uint64).view(a.dtype)


@operation("selp")
def _select(b: Builder, i: Instruction) -> Op:
    kind = kind_at_end(i)
    bits = kind if not is_float(kind) else f"b{kind[1:]}"
    return elementwise(b, i, lambda x, y, p: np.where(p, x, y), [bits, bits, "pred"], bits)


@operation("dp4a")
def _dot4(b: Builder, i: Instruction) -> Op:
    first, second = i.parts[1], i.parts[2]

    def dot(a: Array, by: Array, c: Array) -> Array:
        x, y = (_four(v, k[0]) for v, k in ((a, first), (by, second)))
        return np.asarray((x * y).sum(axis=-1).astype(np.uint32) + c)

    return elementwise(b, i, dot, ["b32", "b32", "u32"], "u32")


def _four(v: Any, sign: str) -> Array:
    data = np.ascontiguousarray(np.atleast_1d(v)).view(np.int8 if sign == "s" else np.uint8)
    return data.reshape(-1, 4).astype(np.int64)
