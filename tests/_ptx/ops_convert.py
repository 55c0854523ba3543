"""cvt: between integers and floats of all widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from _ptx.block import ThreadBlock
from _ptx.build import Builder, Op, operation
from _ptx.lanes import Lanes
from _ptx.ops_integer import elementwise
from _ptx.parse import Instruction
from _ptx.values import Array, bf16_bits, decode, encode, is_float, kind_of, size_of

__all__: list[str] = []

_ROUND: dict[str, Callable[..., Any]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@operation("cvt")
def _cvt(b: Builder, i: Instruction) -> Op:
    if i.parts[1] == "pack":
        return _pack(b, i)
    to, source = i.parts[-2], i.parts[-1]
    if to.endswith("x2") or source.endswith("x2"):
        return _pairs(b, i, to, source)
    if not is_float(to) and not is_float(source):
        if i.has("sat"):
            return elementwise(b, i, lambda a: _saturated(a, to), [source], to)
        # The register is as wide as the source's type, or wider and cut.
        return elementwise(b, i, lambda a: np.asarray(a).astype(kind_of(to)), [source], to)
    mode = next((_ROUND[p] for p in i.parts if p in _ROUND), None)
    return elementwise(b, i, lambda a: _converted(a, i, to, source, mode), [_raw(source)], _raw(to))


def _raw(kind: str) -> str:
    """Narrow floats are read and left as their bits."""
    return f"b{8 * size_of(kind)}" if kind in ("bf16", "f16", "tf32") else kind


def _converted(a: Any, i: Instruction, to: str, source: str, mode: Callable[..., Any] | None) -> Any:
    value: Any = np.asarray(a)
    if is_float(source):
        value = decode(value, source) if source in ("bf16", "f16", "tf32") else value
        value = mode(value) if mode else value
    if not is_float(to):
        return _to_integer(value, to)
    if i.has("sat"):
        value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)
    if i.has("relu"):
        value = np.where(np.isnan(value), value, np.maximum(value, 0))
    if to in ("f32", "f64"):
        return value.astype(kind_of(to))
    if value.dtype.kind in "iu":
        value = value.astype(np.float64)
    if to == "tf32" and not i.has("rna"):
        raise ValueError("tf32 rounded otherwise than rna")
    if i.has("rz"):
        assert to == "bf16", "only bfloat16 is rounded towards zero"
        return bf16_bits(value, zero=True)
    return encode(value, to)


def _to_integer(value: Any, to: str) -> Array:
    """What is beyond the integer's range becomes its end, what is no number 0."""
    dtype = np.dtype(kind_of(to))
    ends = np.iinfo(dtype)
    wide = np.where(np.isnan(value), 0.0, value.astype(np.float64))
    low, high = wide <= float(ends.min), wide >= float(ends.max)
    inside = np.where(low | high, 0.0, wide).astype(dtype)
    return np.where(low, dtype.type(ends.min), np.where(high, dtype.type(ends.max), inside))


def _saturated(a: Any, to: str) -> Array:
    ends = np.iinfo(np.dtype(kind_of(to)))
    own = np.iinfo(np.asarray(a).dtype)
    return np.asarray(np.clip(a, max(ends.min, own.min), min(ends.max, own.max))).astype(kind_of(to))


def _pairs(b: Builder, i: Instruction, to: str, source: str) -> Op:
    """Two numbers at once: of two operands the first goes into the upper half."""
    saturate = i.has("satfinite")
    put = b.put(i.operands[0], f"b{16 * size_of(to[:-2])}")
    narrow = to.removesuffix("x2")
    if source == "f32":
        gets = [b.get(o, "f32") for o in i.operands[1:]]

        def pair(c: ThreadBlock, lanes: Lanes) -> None:
            high, low = (np.broadcast_to(np.asarray(g(c)), c.threads) for g in gets)
            put(c, lanes, _joined(_shaped(np.stack([low, high], axis=1)), narrow))

        def _joined(values: Array, kind: str) -> Array:
            if i.has("rz"):
                assert kind == "bf16", "only bfloat16 is rounded towards zero"
                bits = bf16_bits(values, zero=True)
            else:
                bits = encode(values, kind, saturate)
            return np.ascontiguousarray(bits).view(f"u{2 * size_of(kind)}")[:, 0]

        def _shaped(values: Array) -> Array:
            return np.where(np.isnan(values), values, np.maximum(values, 0)) if i.has("relu") else values

        return pair
    wide, size = source.removesuffix("x2"), size_of(source.removesuffix("x2"))
    get = b.get(i.operands[1], f"b{16 * size}")

    def change(c: ThreadBlock, lanes: Lanes) -> None:
        bits = np.ascontiguousarray(np.broadcast_to(get(c), c.threads)).view(f"u{size}").reshape(-1, 2)
        found = encode(decode(bits, wide), narrow, saturate)
        put(c, lanes, np.ascontiguousarray(found).view(f"u{2 * size_of(narrow)}")[:, 0])

    return change


def _pack(b: Builder, i: Instruction) -> Op:
    """cvt.pack.sat.s8.s32.b32 d, a, b, c: two integers below what c's lower half is."""
    to = i.parts[3]
    bits = int(to[1:])
    assert bits in (8, 16), "integers of 8 or 16 bits"

    def fn(a: Array, low: Array, above: Any = None) -> Array:
        mask = np.uint32((1 << bits) - 1)
        high, down = (_saturated(v, to).astype(np.int64).astype(np.uint32) & mask for v in (a, low))
        found = high << np.uint32(bits) | down
        return np.asarray(found if above is None else found | np.asarray(above) << np.uint32(2 * bits))

    return elementwise(b, i, fn, ["s32", "s32", "b32"][: len(i.operands) - 1], "b32")
