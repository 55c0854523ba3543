"""Loads, stores, atomic operations, and addresses of the spaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from _ptx.block import ThreadBlock
from _ptx.build import Builder, Op, operation
from _ptx.errors import PtxError
from _ptx.lanes import Lanes
from _ptx.memory import LOCAL, NAMED, PARAM, SHARED, WINDOW, Memory
from _ptx.parse import Instruction, Operand, Vector
from _ptx.values import Array, kind_of, size_of, unsigned

__all__ = ["items", "placed", "space_of"]

_SPACES = {"global": "global", "const": "global", "local": "local", "param": "param", "param::entry": "param",
           "shared": "shared", "shared::cta": "shared", "shared::cluster": "shared"}  # fmt: skip


def space_of(i: Instruction) -> str:
    """Which memory an instruction is for; empty where the address itself says."""
    return next((_SPACES[p] for p in i.parts if p in _SPACES), "")


def items(operand: Operand) -> tuple[Operand, ...]:
    """A vector's items, or the one."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def placed(c: ThreadBlock, space: str, at: Array, index: Array) -> list[tuple[Memory, Array, Array]]:
    """(memory, addresses there, which of `at`) for addresses of a space or of none. index: the threads'."""
    everyone = np.arange(len(at))
    if space in ("global", "shared", "param"):
        return [(c.memories[space], at, everyone)]
    if space == "local":
        return [_local(c, at, index, everyone)]
    window = np.where(at >= np.uint64(SHARED), (at - np.uint64(SHARED)) // np.uint64(WINDOW), np.uint64(9))
    found = []
    for w in np.unique(window).tolist():
        which = np.flatnonzero(window == w)
        if SHARED + w * WINDOW == SHARED:
            found.append((c.memories["shared"], at[which] - np.uint64(SHARED), which))
        elif w == (LOCAL - SHARED) // WINDOW:
            found.append(_local(c, at[which], index[which], which))
        else:
            space = "param" if w == (PARAM - SHARED) // WINDOW else "global"
            found.append((c.memories[space], at[which], which))
    return found


def _local(c: ThreadBlock, at: Array, index: Array, which: Array) -> tuple[Memory, Array, Array]:
    """Every thread's own bytes lie side by side."""
    size = c.program.local_bytes
    if ((at < np.uint64(LOCAL)) | (at >= np.uint64(LOCAL + size))).any():
        raise PtxError("an address outside of local memory")
    return c.memories["local"], at + index.astype(np.uint64) * np.uint64(size), which


@operation("ld", "ldu")
def _load(b: Builder, i: Instruction) -> Op:
    kind, space = i.parts[-1], space_of(i)
    targets, size = items(i.operands[0]), size_of(kind)
    puts = [b.put(t, f"b{8 * size}" if kind[0] != "s" else kind) for t in targets]
    address, count = b.address(i.operands[1]), len(targets)
    view = np.dtype(kind_of(kind)) if kind[0] == "s" else unsigned(size)

    def load(c: ThreadBlock, lanes: Lanes) -> None:
        at = address(c)
        if not lanes.full:
            at = at[lanes.index]
        values = _gather(c, space, at, lanes, size, count).view(view)
        for j, put in enumerate(puts):
            column = values[:, j].copy()
            if not lanes.full:
                wide = np.empty(c.threads, dtype=view)
                wide[lanes.index] = column
                column = wide
            put(c, lanes, column)

    return load


def _gather(c: ThreadBlock, space: str, at: Array, lanes: Lanes, size: int, count: int) -> Array:
    if space in ("global", "shared", "param"):
        return c.memories[space].load(at, size, count)
    found = placed(c, space, at, lanes.index)
    if len(found) == 1:
        return found[0][0].load(found[0][1], size, count)
    values = np.empty((len(at), count), dtype=unsigned(size))
    for memory, where, which in found:
        values[which] = memory.load(where, size, count)
    return values


@operation("st")
def _store(b: Builder, i: Instruction) -> Op:
    kind, space = i.parts[-1], space_of(i)
    size = size_of(kind)
    gets = [b.get(o, f"b{8 * size}") for o in items(i.operands[1])]
    address = b.address(i.operands[0])

    def store(c: ThreadBlock, lanes: Lanes) -> None:
        index = lanes.index
        at = address(c)[index]
        values = np.empty((len(index), len(gets)), dtype=unsigned(size))
        for j, get in enumerate(gets):
            v = get(c)
            values[:, j] = v[index] if isinstance(v, np.ndarray) and v.ndim else v
        for memory, where, which in placed(c, space, at, index):
            memory.store(where, values if len(which) == len(values) else values[which])
            if memory is c.memories["shared"]:
                c.wrote(where, size * len(gets), index[which])

    return store


@operation("cvta")
def _cvta(b: Builder, i: Instruction) -> Op:
    """Only shared memory has addresses of its own; those of the other spaces are generic ones."""
    kind = i.parts[-1]
    put, get = b.put(i.operands[0], kind), b.get(i.operands[1], kind)
    step = np.uint64(0)
    if space_of(i) == "shared":
        step = np.uint64(2**64 - SHARED if i.has("to") else SHARED)

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        value = np.asarray(get(c))
        put(c, lanes, (value.astype(np.uint64) + step).astype(value.dtype))

    return op


@operation("isspacep")
def _isspacep(b: Builder, i: Instruction) -> Op:
    put, get, space = b.put(i.operands[0], "pred"), b.get(i.operands[1], "u64"), space_of(i)
    begin = {"shared": SHARED, "local": LOCAL, "param": PARAM}.get(space)

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        at = np.broadcast_to(get(c), c.threads)
        inside = at < np.uint64(SHARED) if begin is None else (at - np.uint64(begin)) < np.uint64(WINDOW)
        if begin is None:
            inside = inside | (at >= np.uint64(NAMED))
        put(c, lanes, np.array(inside))

    return op


@operation("mapa")
def _mapa(b: Builder, i: Instruction) -> Op:
    """Addresses of another block of the cluster; clusters have one block here."""
    kind = i.parts[-1]
    put, get = b.put(i.operands[0], kind), b.get(i.operands[1], kind)
    return lambda c, lanes: put(c, lanes, np.array(np.broadcast_to(get(c), c.threads)))


@operation("prefetch", "prefetchu", "membar", "griddepcontrol", "nanosleep", "applypriority", "discard", "setmaxnreg",
           "pmevent")  # fmt: skip
def _nothing(b: Builder, i: Instruction) -> Op:
    """What changes no value."""
    return lambda c, lanes: None


@operation("createpolicy")
def _policy(b: Builder, i: Instruction) -> Op:
    put = b.put(i.operands[0], "b64")
    return lambda c, lanes: put(c, lanes, np.zeros(c.threads, dtype=np.uint64))


_ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, v: old + v, "min": min, "max": max, "and": lambda old, v: old & v, "or": lambda old, v: old | v,
    "xor": lambda old, v: old ^ v, "exch": lambda old, v: v, "inc": lambda old, v: 0 if old >= v else old + 1,
    "dec": lambda old, v: v if old == 0 or old > v else old - 1,
}  # fmt: skip


@operation("atom", "red")
def _atomic(b: Builder, i: Instruction) -> Op:
    """Thread after thread, in their order."""
    kind, space, returns = i.parts[-1], space_of(i), i.parts[0] == "atom"
    name = next(p for p in i.parts[1:] if p in _ATOMIC or p == "cas")
    first = 1 if returns else 0
    address = b.address(i.operands[first])
    sources = [[b.get(item, kind) for item in items(o)] for o in i.operands[first + 1 :][: 2 if name == "cas" else 1]]
    packed = {"f16x2": np.float16, "f16": np.float16}.get(kind)
    if kind.startswith("bf16"):
        raise ValueError("atomic operations on bfloat16")
    puts = [b.put(item, kind) for item in items(i.operands[0])] if returns else []
    dtype = np.dtype(packed or kind_of(kind))
    each = size_of(kind) if packed is None else np.dtype(packed).itemsize * (2 if kind.endswith("x2") else 1)

    def one(c: ThreadBlock, lane: int, at: int, j: int) -> Any:
        memory, where, _ = placed(c, space, np.array([at], dtype=np.uint64), np.array([lane]))[0]
        bits = memory.load(where, each, 1)
        old = bits.reshape(-1).view(dtype).copy()
        given = [np.atleast_1d(np.broadcast_to(s[j](c), c.threads)[lane : lane + 1]).view(dtype) for s in sources]
        if name == "cas":
            new = np.where(old == given[0], given[1], old)
        else:
            new = np.array([_ATOMIC[name](o, v) for o, v in zip(old, given[0], strict=True)], dtype=dtype)
        memory.store(where, new.astype(dtype).view(bits.dtype).reshape(1, 1))
        return bits[0, 0]

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        at = address(c)
        found = np.zeros((max(1, len(sources[0])), c.threads), dtype=unsigned(each))
        for lane in lanes.index.tolist():
            for j in range(len(sources[0])):
                found[j, lane] = one(c, lane, int(at[lane]) + j * each, j)
        for put, row in zip(puts, found, strict=False):
            put(c, lanes, row.copy())

    return op
