"""Which formats GGUF has block types for, and how a matrix becomes such blocks.

Every type here has blocks of 32 columns of one row:

    Q8_0    f16 scale d, 32 signed bytes q                          w = d * q
    Q4_0    f16 d, 32 nibbles                                       w = d * (q - 8)
    Q5_0    f16 d, the high bits in 4 bytes, 32 nibbles             w = d * (q - 16)
    Q4_1    f16 d, f16 minimum m, 32 nibbles                        w = d * q + m
    Q5_1    f16 d, f16 m, the high bits in 4 bytes, 32 nibbles      w = d * q + m
    IQ4_NL  f16 d, 32 nibbles                                       w = d * table[q]
    MXFP4   e8m0 d, 32 nibbles, e2m1                                w = d * float(q)

Nibbles of columns 0 to 15 are the low halves of 16 bytes, those of columns 16 to 31 the high ones. Source: ggml's
`ggml-common.h` and the package gguf, `gguf.quants`.

Numbers are moved, never rounded again: a scale of more columns than a block has is written for each of its blocks, and
integers, less their zero point, go into the narrowest type that holds all of them (4 bits with zero points are Q5_0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quantizers.formats import Format, IntElement, LevelElement, WeightFormat, scalar_format
from lowbit.quantizers.formats.levels import IQ4_NL
from lowbit.quantizers.qtensor import QTensor

__all__ = ["BLOCK", "BLOCK_BYTES", "block_type", "misfit", "pack_blocks", "suggestion", "value_misfit"]

BLOCK = 32
"""Columns of a block."""

BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q5_0": 22, "Q4_1": 20, "Q5_1": 24, "IQ4_NL": 18, "MXFP4": 17}
"""Bytes of a block, by the name of its type."""

_HALVES = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}
"""What is added to integers for the codes of a type: it holds those from minus so many up, as many again from 0 on."""
_MINIMA = {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1"}
"""Types with a minimum, by bits of the code."""
_MXFP4 = scalar_format("mxfp4")


def block_type(fmt: WeightFormat) -> str | None:
    """The name of the GGUF type that holds `fmt`, None where there is none."""
    if not isinstance(fmt, Format) or fmt == _MXFP4:
        return "MXFP4" if fmt == _MXFP4 else None
    whole = fmt.granularity.kind != "g" or fmt.granularity.group % BLOCK == 0
    if not whole or fmt != Format(fmt.element, fmt.granularity, offset=fmt.offset):
        return None
    if fmt.offset:
        return _MINIMA.get(fmt.bits) if isinstance(fmt.element, IntElement) else None
    if isinstance(fmt.element, LevelElement):
        return "IQ4_NL" if fmt.element.table == IQ4_NL else None
    return _integer_type(fmt) if isinstance(fmt.element, IntElement) else None


def _integer_type(fmt: Format) -> str | None:
    levels = fmt.element.levels()
    low, high = float(levels.min()) - fmt.zero * (2**fmt.bits - 1), float(levels.max())
    return next((name for name, half in _HALVES.items() if -half <= low and high < half), None)


def misfit(fmt: WeightFormat, k: int) -> str | None:
    """Why GGUF cannot hold a matrix with `k` columns in `fmt`, or None; what its values say: see `value_misfit`."""
    if block_type(fmt) is None:
        return f"it is {fmt}, and {_lack(fmt)}"
    return f"its {k} columns are no multiple of {BLOCK}" if k % BLOCK else None


def _lack(fmt: WeightFormat) -> str:
    if not isinstance(fmt, Format) or fmt.ordered or fmt.tensor or fmt.channel or fmt.terms > 1:
        return "GGUF's blocks have one code per weight and one scale, in the order of the columns"
    if fmt.granularity.kind == "g" and fmt.granularity.group % BLOCK:
        return f"a block of GGUF has one scale for {BLOCK} columns"
    if fmt.scale not in ("f16", "e8m0"):
        return f"GGUF's scales are float16, not {fmt.scale}"
    return "GGUF has no such numbers: integers of up to 8 bits (5 with offsets, 7 with zero points), and mxfp4"


def suggestion(fmt: WeightFormat) -> str:
    """The format nearest to `fmt` that GGUF holds, as text."""
    if isinstance(fmt, Format) and fmt.terms == 1 and fmt.bits > 4:
        return "int5.g32.sym" if fmt.bits == 5 else "int8.g32.sym"
    return "int4.g32.sym"


def value_misfit(q: QTensor) -> str | None:
    """Why GGUF cannot hold this matrix, whose format it has a type for, or None: its minima are no float16 numbers, or
    a scale stands for no number."""
    if q.scale.dtype == torch.float8_e8m0fnu and bool((q.scale.view(torch.uint8) == 255).any()):
        return "a scale is NaN"  # ggml reads this byte as a power of two
    if q.offset is None:
        return None
    exact = _minima(q)
    lost = int((exact.half().double() != exact).sum())
    what = f"{lost:,} of {exact.numel():,} groups have a minimum (the weight of code 0) that float16 does not hold"
    return what if lost else None


def _minima(q: QTensor) -> Tensor:
    """float64 [N, groups]: the number that code 0 of each group stands for, exactly."""
    assert q.offset is not None
    return q.offset.double() + q.scale.double() * q.fmt.element.levels()[0].double()


def pack_blocks(q: QTensor) -> Tensor:
    """uint8 [N, bytes of a row]: the blocks of a matrix for which `misfit` and `value_misfit` find nothing."""
    name = block_type(q.fmt)
    assert name is not None, q.fmt
    codes = _codes(q, name).reshape(q.shape[0], -1, BLOCK)
    parts = [_bytes(_by_block(q.scale, q))]
    if name in ("Q4_1", "Q5_1"):
        parts.append(_bytes(_by_block(_minima(q).half(), q)))
    if name in ("Q5_0", "Q5_1"):
        parts.append(_high_bits(codes))
    # Offset binary becomes two's complement by its highest bit.
    parts.append(codes ^ 0x80 if name == "Q8_0" else (codes[..., :16] & 15) | (codes[..., 16:] << 4))
    return torch.cat(parts, dim=2).flatten(1)


def _codes(q: QTensor, name: str) -> Tensor:
    """uint8 [N, K]: the codes that a type has for the numbers of the matrix."""
    if name not in _HALVES:
        return q.codes
    integers = q.fmt.element.levels().to(torch.int16)[q.codes.long()]
    if q.zero is not None:
        group = q.fmt.granularity.group_size(q.shape[1])
        integers -= q.zero.to(torch.int16).repeat_interleave(group, dim=1)[:, : q.shape[1]]
    return (integers + _HALVES[name]).to(torch.uint8)


def _by_block(side: Tensor, q: QTensor) -> Tensor:
    """[N, blocks]: for each block what `side`, [N or 1, groups], has for its group."""
    n, k = q.shape
    blocks = k // BLOCK
    each = blocks if side.shape[1] == 1 else q.fmt.granularity.group_size(k) // BLOCK
    raw = side.view(torch.uint8) if side.dtype == torch.float8_e8m0fnu else side  # which torch does not repeat
    return raw.repeat_interleave(each, dim=1)[:, :blocks].expand(n, blocks)


def _bytes(side: Tensor) -> Tensor:
    """uint8 [N, groups, bytes of a number]."""
    return side.contiguous().view(torch.uint8).reshape(*side.shape, side.element_size())


def _high_bits(codes: Tensor) -> Tensor:
    """uint8 [N, groups, 4]: bit 4 of every code, column 0's the lowest."""
    bits = (codes >> 4 & 1).reshape(*codes.shape[:2], 4, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(3, dtype=torch.uint8)
