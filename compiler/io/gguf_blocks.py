"""Matrices in GGUF's blocks as quantized ones: codes are moved, and the scales of one group become one number.

`gguf_types` lists the types of 32 columns. The others have 256 columns of one row, cut into groups of 16 or 32, whose
scales (and minima) are small integers under one or two float16 numbers d and m:

    Q2_K    4-bit scales and minima of 16 columns      w = d * s * q - m * t           q of 2 bits
    Q3_K    6-bit scales of 16 columns, less 32        w = d * s * (q - 4)             q of 3 bits
    Q4_K    6-bit scales and minima of 32 columns      w = d * s * q - m * t           q of 4 bits
    Q5_K    the same                                   w = d * s * q - m * t           q of 5 bits
    Q6_K    signed bytes as scales of 16 columns       w = d * s * (q - 32)            q of 6 bits
    IQ4_XS  6-bit scales of 32 columns, less 32        w = d * s * table[q]            q of 4 bits
    TQ2_0   none, one group                            w = d * (q - 1)                 q of 2 bits
    TQ1_0   none, one group                            w = d * (q - 1)                 five or four ternary q in a byte

Codes are exact. So are scales of types without integers among them; d * s, and the offsets that minima become, are
rounded to float16: to 2**-11 of themselves. Source: ggml's `ggml-common.h` and the package gguf,
`gguf.quants`, whose own decoding the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quantizers.formats import Format, scalar_format
from lowbit.quantizers.qtensor import QTensor

__all__ = ["BLOCK_TYPES", "BlockType", "read_blocks"]

_Sides = tuple[Tensor, Tensor, Tensor | None]
"""uint8 codes [B, columns], float32 scales [B, groups], float32 minima (the number of code 0) or None, of B blocks."""


@dataclass(frozen=True)
class BlockType:
    """A type of blocks. columns, nbytes: of a block; text: the format; read: uint8 [B, nbytes] -> codes and sides.

    exact: whether float16 holds the sides, so that the matrix has exactly the file's numbers.
    """

    columns: int
    nbytes: int
    text: str
    read: Callable[[Tensor], _Sides]
    exact: bool = False

    @property
    def format(self) -> Format:
        """The format that a matrix gets."""
        return scalar_format(self.text)


def read_blocks(name: str, raw: Tensor) -> QTensor:
    """uint8 [N, bytes of a row] in blocks of the type `name` -> the quantized [N, K] matrix.

    Raises ValueError when bytes are no whole blocks or stand for no number, or the float16 numbers of a block are too
    large for their products to be float16 again.
    """
    kind = BLOCK_TYPES[name]
    n, width = raw.shape
    if width % kind.nbytes or not width:
        raise ValueError(f"rows of {width} bytes are no blocks of {kind.nbytes}")
    codes, scale, least = kind.read(raw.reshape(-1, kind.nbytes))
    fmt, offset = kind.format, None
    if bool((codes >> fmt.bits).any()):
        raise ValueError("a ternary code is neither 0, 1 nor 2")
    if bool(scale.isnan().any()):
        raise ValueError("a scale is NaN")  # which ggml takes for a power of two
    if least is not None:
        offset = _half(least - float(fmt.element.levels()[0]) * scale).reshape(n, -1)
    side = scale.to(torch.float8_e8m0fnu) if fmt.scale == "e8m0" else _half(scale)
    return QTensor(fmt, codes.reshape(n, -1).contiguous(), side.reshape(n, -1), offset=offset)


def _half(side: Tensor) -> Tensor:
    """float16. Small numbers lose nothing: they are multiples of its smallest one. ValueError for what overflows."""
    rounded = side.half()
    if not bool(rounded.isfinite().all()):
        raise ValueError("scales lie outside the range of float16")
    return rounded


def _floats(raw: Tensor, start: int) -> Tensor:
    """The float16 number at a byte of every block, as float32 [B, 1]."""
    return raw[:, start : start + 2].contiguous().view(torch.float16).float()


def _halves(raw: Tensor, run: int) -> Tensor:
    """uint8 [B, n] -> [B, 2 n]: of every `run` bytes first the low halves, then the high ones."""
    return _fields(raw, run, 4)


def _fields(raw: Tensor, run: int, bits: int) -> Tensor:
    """uint8 [B, n] -> [B, n * 8 / bits]: of every `run` bytes first the lowest `bits` bits, then the next ones ..."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    fields: Tensor = raw.reshape(len(raw), -1, 1, run) >> shifts & 2**bits - 1
    return fields.reshape(len(raw), -1)


def _scaled_and_least(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The 16 bytes that Q4_K and Q5_K begin with: 8 scales and minima of 6 bits, the last four of each in pieces."""
    packed = raw[:, 4:16]
    first, second, third = packed.split(4, dim=1)
    scales = torch.cat([first & 63, (third & 15) | (first >> 2 & 48)], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | (second >> 2 & 48)], dim=1)
    return _floats(raw, 0) * scales, -_floats(raw, 2) * minima


def _simple(high: bool, least: bool) -> Callable[[Tensor], _Sides]:
    """Q4_0, Q5_0 (`high`: a fifth bit), Q4_1, Q5_1 (`least`: a minimum), and IQ4_NL."""

    def read(raw: Tensor) -> _Sides:
        at = 4 if least else 2
        codes = _halves(raw[:, at + 4 * high :], 16)
        if high:
            # Bit i of the four bytes is column i's.
            codes = codes | _fields(raw[:, at : at + 4], 1, 1) << 4
        return codes, _floats(raw, 0), _floats(raw, 2) if least else None

    return read


def _bytes(raw: Tensor) -> _Sides:
    return raw[:, 2:] ^ 0x80, _floats(raw, 0), None


def _mx(raw: Tensor) -> _Sides:
    return _halves(raw[:, 1:], 16), raw[:, :1].contiguous().view(torch.float8_e8m0fnu).float(), None


def _q2_k(raw: Tensor) -> _Sides:
    sides = raw[:, :16]
    return _fields(raw[:, 16:80], 32, 2), _floats(raw, 80) * (sides & 15), -_floats(raw, 82) * (sides >> 4)


def _q3_k(raw: Tensor) -> _Sides:
    low, high = _halves(raw[:, 96:104], 8), _fields(raw[:, 104:108], 4, 2)
    scale = (low | high << 4).float() - 32
    codes = _fields(raw[:, 32:96], 32, 2) | _fields(raw[:, :32], 32, 1) << 2
    return codes, _floats(raw, 108) * scale, None


def _q4_k(raw: Tensor) -> _Sides:
    return _halves(raw[:, 16:], 32), *_scaled_and_least(raw)


def _q5_k(raw: Tensor) -> _Sides:
    codes = _halves(raw[:, 48:], 32) | _fields(raw[:, 16:48], 32, 1) << 4
    return codes, *_scaled_and_least(raw)


def _q6_k(raw: Tensor) -> _Sides:
    codes = _halves(raw[:, :128], 64) | _fields(raw[:, 128:192], 32, 2) << 4
    return codes, _floats(raw, 208) * raw[:, 192:208].contiguous().view(torch.int8), None


def _iq4_xs(raw: Tensor) -> _Sides:
    low, high = _fields(raw[:, 4:8], 1, 4), _fields(raw[:, 2:4], 1, 2)
    return _halves(raw[:, 8:], 16), _floats(raw, 0) * ((low | high << 4).float() - 32), None


def _tq2(raw: Tensor) -> _Sides:
    return _fields(raw[:, :64], 32, 2) + 1, _floats(raw, 64), None


def _tq1(raw: Tensor) -> _Sides:
    """Bytes are fractions of 256: times a power of three they lose the digits before, and the next one is on top."""
    parts = [(raw[:, :32], 5), (raw[:, 32:48], 5), (raw[:, 48:52], 4)]
    digits = []
    for part, count in parts:
        powers = torch.tensor([3**i for i in range(count)], dtype=torch.int32)[:, None]
        digits.append(((part[:, None].int() * powers & 255) * 3 >> 8).flatten(1))
    return torch.cat(digits, dim=1).to(torch.uint8) + 1, _floats(raw, 52), None


BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(32, 18, "int4.g32.sym", _simple(False, False), exact=True),
    "Q4_1": BlockType(32, 20, "int4.g32.fz", _simple(False, True)),
    "Q5_0": BlockType(32, 22, "int5.g32.sym", _simple(True, False), exact=True),
    "Q5_1": BlockType(32, 24, "int5.g32.fz", _simple(True, True)),
    "Q8_0": BlockType(32, 34, "int8.g32.sym", _bytes, exact=True),
    "IQ4_NL": BlockType(32, 18, "iq4nl.g32", _simple(False, False), exact=True),
    "MXFP4": BlockType(32, 17, "mxfp4", _mx, exact=True),
    "Q2_K": BlockType(256, 84, "int2.g16.fz", _q2_k),
    "Q3_K": BlockType(256, 110, "int3.g16.sym", _q3_k),
    "Q4_K": BlockType(256, 144, "int4.g32.fz", _q4_k),
    "Q5_K": BlockType(256, 176, "int5.g32.fz", _q5_k),
    "Q6_K": BlockType(256, 210, "int6.g16.sym", _q6_k),
    "IQ4_XS": BlockType(256, 136, "iq4nl.g32", _iq4_xs),
    "TQ1_0": BlockType(256, 54, "int2.g256.sym", _tq1, exact=True),
    "TQ2_0": BlockType(256, 66, "int2.g256.sym", _tq2, exact=True),
}
"""By the name that GGUF has for the type."""
