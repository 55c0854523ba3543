"""Floating-point arithmetic, comparisons and everything that has the same name for integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from _ptx.block import ThreadBlock
from _ptx.build import Builder, Op, operation
from _ptx.lanes import Lanes
from _ptx.ops_integer import elementwise, integer, kind_at_end
from _ptx.parse import Instruction, Vector
from _ptx.values import Array, bf16_bits, bf16_float, is_float, kind_of

__all__: list[str] = []


def _fma(a: Any, b: Any, c: Any) -> Any:
    return a * b + c


_FLOAT: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "abs": np.abs, "neg": np.negative,
    "min": np.fmin, "max": np.fmax, "fma": _fma, "mad": _fma, "rcp": np.reciprocal, "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a), "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@operation(*_FLOAT, "rem")
def _arithmetic(b: Builder, i: Instruction) -> Op:
    kind = kind_at_end(i)
    if not is_float(kind):
        return integer(b, i)
    fn = _FLOAT[i.parts[0]]
    if i.has("NaN"):
        fn = {"min": np.minimum, "max": np.maximum}[i.parts[0]]
    if i.has("rz", "rm", "rp", "xorsign"):
        raise ValueError("rounding other than to nearest")
    count = len(i.operands) - 1
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return _halves(b, i, fn, kind, count)
    wide = kind == "f32" and i.parts[0] in ("fma", "mad")
    finish = _finish(i, np.float32 if kind == "f32" else np.float64)

    def compute(*values: Any) -> Any:
        return finish(fn(*[np.asarray(v).astype(np.float64) for v in values]) if wide else fn(*values))

    plain = fn if not (wide or i.has("ftz", "sat")) else compute
    return elementwise(b, i, plain, [kind] * count, kind)


def _finish(i: Instruction, dtype: Any) -> Callable[[Any], Any]:
    """Rounding to the type, `.sat` and `.ftz`."""
    tiny = np.finfo(dtype).tiny

    def finish(v: Any) -> Any:
        v = np.asarray(v).astype(dtype)
        if i.has("sat"):
            v = np.where(np.isnan(v), dtype(0), np.clip(v, 0, 1)).astype(dtype)
        return np.where(np.abs(v) < tiny, np.copysign(dtype(0), v), v) if i.has("ftz") else v

    return finish


def _halves(b: Builder, i: Instruction, fn: Callable[..., Any], kind: str, count: int) -> Op:
    """One or two numbers of 16 bits, computed in float64 and rounded once."""
    bits = "b32" if kind.endswith("x2") else "b16"
    brain = kind.startswith("b")

    def compute(*values: Any) -> Any:
        wide = [_widen(np.atleast_1d(np.asarray(v)), brain) for v in values]
        found = fn(*wide)
        if i.has("sat"):
            found = np.where(np.isnan(found), 0.0, np.clip(found, 0, 1))
        if i.has("relu"):
            found = np.where(np.isnan(found), found, np.maximum(found, 0))
        narrow = bf16_bits(found) if brain else found.astype(np.float16).view(np.uint16)
        if bits == "b16":
            return narrow
        return np.ascontiguousarray(narrow).reshape(-1, 2).view(np.uint32)[:, 0]

    return elementwise(b, i, compute, [bits] * count, bits)


def _widen(bits: Array, brain: bool) -> Array:
    short = np.ascontiguousarray(bits).view(np.uint16)
    if bits.dtype.itemsize == 4:
        short = short.reshape(-1, 2)
    return bf16_float(short).astype(np.float64) if brain else short.view(np.float16).astype(np.float64)


@operation("copysign")
def _copysign(b: Builder, i: Instruction) -> Op:
    kind = kind_at_end(i)
    return elementwise(b, i, lambda a, x: np.copysign(x, a), [kind, kind], kind)


@operation("testp")
def _test(b: Builder, i: Instruction) -> Op:
    fn: dict[str, Callable[..., Any]] = {"finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a),
                                         "notanumber": np.isnan}  # fmt: skip
    return elementwise(b, i, fn[i.parts[1]], [kind_at_end(i)], "pred")


_COMPARE: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(name: str, kind: str) -> Callable[..., Any]:
    """Of floats `ne` is of numbers only, and a `u` at the end accepts what is no number."""
    if not is_float(kind):
        return _COMPARE[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name.endswith("u"):
        fn = _COMPARE[name[:-1]]
        return lambda a, b: fn(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return _COMPARE[name]


_JOIN: dict[str, Callable[..., Any]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@operation("setp")
def _setp(b: Builder, i: Instruction) -> Op:
    kind = kind_at_end(i)
    compare = _comparison(i.parts[1], kind)
    packed = kind.endswith("x2")
    gets = [b.get(o, _read_as(kind)) for o in i.operands[1:3]]
    third = b.get(i.operands[3], "pred") if len(i.operands) > 3 else None
    join = next((_JOIN[p] for p in i.parts[2:] if p in _JOIN), None)
    targets = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
    puts = [b.put(t, "pred") for t in targets]

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        truth = np.asarray(compare(*[_numbers(g(c), kind) for g in gets]))
        found = [truth[:, 0], truth[:, 1]] if packed else [truth, ~truth]
        for put, value in zip(puts, found, strict=False):
            put(c, lanes, value.copy() if third is None or join is None else join(value, third(c)))

    return op


def _read_as(kind: str) -> str:
    return {"bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}.get(kind, kind)


def _numbers(value: Any, kind: str) -> Any:
    return (
        _widen(np.atleast_1d(np.asarray(value)), kind.startswith("b"))
        if "16" in kind and is_float(kind) and (kind != "f16")
        else value
    )


@operation("set")
def _set(b: Builder, i: Instruction) -> Op:
    to, kind = i.parts[-2], i.parts[-1]
    compare = _comparison(i.parts[1], kind)
    if kind.endswith("x2") or len(i.operands) > 3:
        raise ValueError("packed or joined set")
    yes = np.dtype(kind_of(to)).type(1.0 if to == "f32" else -1 if to[0] == "s" else 2**32 - 1)
    no = yes.dtype.type(0)
    read = _read_as(kind)
    return elementwise(
        b, i, lambda x, y: np.where(compare(_numbers(x, kind), _numbers(y, kind)), yes, no), [read] * 2, to
    )
