"""The canonical storage of codes: a dense little-endian bit stream per row, in int32 words.

Code i of a row occupies bits [i*b, (i+1)*b) of the stream, low bits first; codes may straddle words. This is also the
layout of compressed-tensors' `pack-quantized` files for every width that divides 32, and for the others up to their
padding per word, which `compiler.io` handles.
"""

from __future__ import annotations

import math

import torch

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [R, C] below 2**bits -> int32 words [R, ceil(C * bits / 32)]."""
    rows, cols = codes.shape
    words = math.ceil(cols * bits / 32)
    stream = torch.zeros(rows, words * 32, dtype=torch.uint8)
    unpacked = (codes[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    stream[:, : cols * bits] = unpacked.reshape(rows, cols * bits)
    weights = 1 << torch.arange(32, dtype=torch.int64)
    value = (stream.reshape(rows, words, 32).to(torch.int64) * weights).sum(-1)
    return torch.where(value >= 2**31, value - 2**32, value).to(torch.int32)


def unpack_bits(words: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """Inverse of `pack_bits`: uint8 codes [R, cols]."""
    rows = words.shape[0]
    stream = (words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    stream = stream.reshape(rows, -1)[:, : cols * bits].reshape(rows, cols, bits)
    return (stream << torch.arange(bits, dtype=torch.int32)).sum(-1).to(torch.uint8)
