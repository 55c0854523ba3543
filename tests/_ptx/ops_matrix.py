"""mma.sync, ldmatrix and stmatrix: which lane holds which number of a matrix.

A lane is (group, place): lane // 4 and lane % 4. A register of 32 bits holds `each` numbers side by side. Register i of
the left operand has row group + 8 (i % 2), columns each (place + 4 (i / 2)) on; of the right operand column group, rows
each (place + 4 i) on; of sums row group + 8 (i / 2), column 2 place + i % 2.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from _ptx.block import ThreadBlock
from _ptx.build import Builder, Get, Op, operation
from _ptx.lanes import WARP, Lanes
from _ptx.ops_memory import items, placed, space_of
from _ptx.parse import Instruction
from _ptx.values import Array, decode

__all__ = ["left_of", "numbers", "registers", "sums_of"]


def registers(c: ThreadBlock, gets: list[Get], warps: Array) -> Array:
    """[registers, warps, 32] bits."""
    columns = [np.broadcast_to(np.asarray(g(c)), c.threads).reshape(-1, WARP)[warps] for g in gets]
    return np.stack(columns)


def numbers(bits: Array, kind: str) -> Array:
    """[..., each] numbers in words of 32 bits, as float32 (exact: they are narrow)."""
    bits = np.ascontiguousarray(bits)
    if kind in ("s4", "u4"):
        codes = bits[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)
        found = codes.astype(np.float32)
        return found - 16 * (found >= 8) if kind == "s4" else found
    if kind in ("s8", "u8"):
        return bits.view(np.int8 if kind == "s8" else np.uint8).reshape(*bits.shape, 4).astype(np.float32)
    if kind == "tf32":
        return decode(bits, kind)[..., None]
    size = 1 if kind in ("e4m3", "e5m2") else 2
    return decode(bits.view(f"u{size}").reshape(*bits.shape, 4 // size), kind)


def left_of(bits: Array, kind: str) -> Array:
    """[warps, rows, columns] of the left operand's registers [registers, warps, 32]."""
    values = numbers(bits, kind)
    count, warps, _, each = values.shape
    halves = min(count, 2)
    values = values.reshape(count // halves, halves, warps, 8, 4, each)
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 8 * halves, -1)


def _right_of(bits: Array, kind: str) -> Array:
    """[warps, rows, 8] of the right operand's registers."""
    values = numbers(bits, kind)
    count, warps, _, each = values.shape
    return values.reshape(count, warps, 8, 4, each).transpose(1, 0, 3, 4, 2).reshape(warps, -1, 8)


def sums_of(product: Array) -> Array:
    """[registers, warps, 32] of [warps, 16 or 8 rows, 8 n columns]: four (two) registers for eight columns."""
    warps, rows, columns = product.shape
    parts = product.reshape(warps, rows // 8, 8, columns // 8, 4, 2)
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(-1, warps, WARP)


@operation("mma")
def _mma(b: Builder, i: Instruction) -> Op:
    shape = next(p for p in i.parts if re.match(r"m\d+n\d+k\d+$", p))
    kinds = [p for p in i.parts if p in _KINDS]
    to, left, right, _ = kinds
    known = shape.startswith(("m16n8", "m8n8k16", "m8n8k32")) and to in ("f32", "s32", "f16")
    if not known or i.has("sp") or not i.has("row"):
        raise ValueError(f"products of shape {shape}")
    ga, gb = ([b.get(r, "b32") for r in items(o)] for o in i.operands[1:3])
    held = "b32" if to == "f16" else to
    gc, puts = [b.get(r, held) for r in items(i.operands[3])], [b.put(r, held) for r in items(i.operands[0])]

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        warps = lanes.warps
        product = left_of(registers(c, ga, warps), left) @ _right_of(registers(c, gb, warps), right)
        before, sums = registers(c, gc, warps), sums_of(product)
        if to == "f16":
            wide = np.ascontiguousarray(before).view(np.float16).reshape(*before.shape, 2).astype(np.float32)
            pairs = sums.reshape(-1, 2, *sums.shape[1:]).transpose(0, 2, 3, 1)
            after: Any = np.ascontiguousarray((wide + pairs).astype(np.float16)).view(np.uint32)[..., 0]
        else:
            after = before + (np.rint(sums).astype(np.int32) if to == "s32" else sums)
        spread(c, lanes, puts, after, warps)

    return op


_KINDS = ("f32", "f16", "bf16", "tf32", "s32", "s8", "u8", "s4", "u4", "e4m3", "e5m2")


def spread(c: ThreadBlock, lanes: Lanes, puts: list[Any], values: Array, warps: Array) -> None:
    """Leave [registers, warps, 32] values in the warps' registers."""
    for put, value in zip(puts, values, strict=True):
        if len(warps) * WARP == c.threads:
            put(c, lanes, value.reshape(-1).copy())
            continue
        whole = np.zeros((c.threads // WARP, WARP), dtype=value.dtype)
        whole[warps] = value
        put(c, lanes, whole.reshape(-1))


@operation("ldmatrix")
def _ldmatrix(b: Builder, i: Instruction) -> Op:
    """Lane 8 j + r gives the address of row r of matrix j; lane (g, p) gets numbers 2 p, 2 p + 1 of row g."""
    if i.parts[3] != "m8n8" or i.parts[-1] != "b16":
        raise ValueError("matrices other than of 8 x 8 numbers of 16 bits")
    puts, address, space = [b.put(r, "b32") for r in items(i.operands[0])], b.address(i.operands[1]), space_of(i)
    transposed, count = i.has("trans"), len(items(i.operands[0]))

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        warps = lanes.warps
        at = address(c).reshape(-1, WARP)[warps, : 8 * count].reshape(-1)
        index = np.arange(c.threads).reshape(-1, WARP)[warps, : 8 * count].reshape(-1)
        ((memory, where, _),) = placed(c, space, at, index)
        rows = memory.load(where, 2, 8).reshape(len(warps), count, 8, 8)
        if transposed:
            rows = rows.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(rows).view(np.uint32).reshape(len(warps), count, WARP)
        spread(c, lanes, puts, words.transpose(1, 0, 2), warps)

    return op


@operation("stmatrix")
def _stmatrix(b: Builder, i: Instruction) -> Op:
    """The other way round."""
    if i.parts[3] != "m8n8" or i.parts[-1] != "b16":
        raise ValueError("matrices other than of 8 x 8 numbers of 16 bits")
    gets, address, space = [b.get(r, "b32") for r in items(i.operands[1])], b.address(i.operands[0]), space_of(i)
    count, transposed = len(gets), i.has("trans")

    def op(c: ThreadBlock, lanes: Lanes) -> None:
        warps = lanes.warps
        at = address(c).reshape(-1, WARP)[warps, : 8 * count].reshape(-1)
        index = np.arange(c.threads).reshape(-1, WARP)[warps, : 8 * count].reshape(-1)
        words = np.ascontiguousarray(registers(c, gets, warps).transpose(1, 0, 2))
        rows = words.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            rows = rows.transpose(0, 1, 3, 2)
        ((memory, where, _),) = placed(c, space, at, index)
        memory.store(where, np.ascontiguousarray(rows).reshape(-1, 8))
        c.wrote(where, 16, index)

    return op
