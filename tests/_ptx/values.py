"""Numbers as PTX types see them: registers hold bits, an instruction's type says what they mean."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Array", "bf16_bits", "bf16_float", "decode", "encode", "is_float", "kind_of", "size_of", "unsigned"]

Array = NDArray[Any]

KINDS: dict[str, type[np.generic]] = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_}
for _bits in (8, 16, 32, 64):
    KINDS |= {f"{c}{_bits}": getattr(np, f"uint{_bits}") for c in "ub"}
    KINDS[f"s{_bits}"] = getattr(np, f"int{_bits}")
_SIZES = {name: np.dtype(kind).itemsize for name, kind in KINDS.items()}
_SIZES |= {"pred": 0, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "f16x2": 4, "bf16x2": 4, "b128": 16}
_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def kind_of(name: str) -> type[np.generic] | None:
    """numpy's type of a PTX type that numpy has."""
    return KINDS.get(name)


def is_float(name: str) -> bool:
    """Whether a PTX type is of floating-point numbers."""
    return name[0] == "f" or name in ("bf16", "e4m3", "e5m2", "tf32", "bf16x2")


def size_of(name: str) -> int:
    """Bytes of a PTX type."""
    return _SIZES[name]


@cache
def unsigned(size: int) -> np.dtype[Any]:
    """The unsigned integer of so many bytes; a truth value of none."""
    return np.dtype(np.bool_) if size == 0 else np.dtype(f"u{size}")


@cache
def _table(name: str) -> Array:
    codes = torch.arange(256, dtype=torch.uint8).view(_FP8[name]).float().numpy()
    return np.ascontiguousarray(codes)


def decode(bits: Array, name: str) -> Array:
    """Values of a narrow float's bits, as float32."""
    if name == "f16":
        return bits.view(np.float16).astype(np.float32)
    if name == "bf16":
        return bf16_float(bits)
    if name == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return _table(name)[bits]


def bf16_float(bits: Array) -> Array:
    """float32 of bfloat16's bits (uint16)."""
    found: Array = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return found


def bf16_bits(value: Array, zero: bool = False) -> Array:
    """bfloat16's bits of float32 or float64 numbers, rounded once to nearest even, or towards zero."""
    if value.dtype == np.float64 and not zero:
        value = _odd(value)
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    high = bits >> np.uint32(16)
    if not zero:
        high = (bits + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
    found: Array = np.where(np.isnan(value), np.uint32(0x7FFF), high).astype(np.uint16)
    return found


def _odd(value: Array) -> Array:
    """float64 -> float32 rounded to odd: rounding the result again is as if it were rounded once."""
    near = value.astype(np.float32)
    wide = near.astype(np.float64)
    bits = near.view(np.uint32)
    inexact = (wide != value) & np.isfinite(near)
    # Towards zero first: one bit pattern down where rounding went away from it. Then the last bit is set.
    bits = np.where(inexact & (np.abs(wide) > np.abs(value)), bits - np.uint32(1), bits)
    found: Array = np.where(inexact, bits | np.uint32(1), bits).view(np.float32)
    return found


def encode(value: Array, name: str, saturate: bool = False) -> Array:
    """Bits of float32 or float64 numbers in a narrow float, rounded to nearest even."""
    if name == "bf16":
        return bf16_bits(value)
    if name == "f16":
        return value.astype(np.float16).view(np.uint16)
    if name == "tf32":
        return _tf32(value.astype(np.float32))
    top = float(torch.finfo(_FP8[name]).max)
    wide = np.ascontiguousarray(np.clip(value, -top, top) if saturate else value, dtype=np.float32)
    return torch.from_numpy(wide).to(_FP8[name]).view(torch.uint8).numpy()


def _tf32(value: Array) -> Array:
    """Rounded to nearest, ties away from zero, as `cvt.rna` does."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    found: Array = np.where(np.isfinite(value), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)
    return found
