"""What the operations of a decode program mean, as torch functions on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["TORCH"]


def _lut(index: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.float32)[index.long()]


def _bitcast(x: torch.Tensor) -> torch.Tensor:
    signed = torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)
    return signed.view(torch.float32)


def _half(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 2**15, x - 2**16, x).to(torch.int16).view(torch.float16).float()


TORCH: dict[str, Callable[..., Any]] = {
    "const": lambda value: torch.tensor(value, dtype=torch.float32),
    "int": lambda value: torch.tensor(value, dtype=torch.int64),
    "shr": lambda x, by: x >> by,
    "shl": lambda x, by: x << by,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "multiply": lambda x, y: x * y & 0xFFFFFFFF,
    "plus": lambda x, y: x + y & 0xFFFFFFFF,
    "bitcast": _bitcast,
    "half": _half,
    "int_to_float": lambda x: x.float(),
    "lut": _lut,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "fma": lambda x, y, z: x * y + z,
}
"""Operation name -> function; words are non-negative int64 tensors."""
