"""The canonical storage of codes: a dense little-endian bit stream per row, in int32 words.

Code i of a row occupies bits [i*b, (i+1)*b) of the stream, low bits first; codes may straddle words. This is also the
layout of compressed-tensors' `pack-quantized` files (of its versions from 0.18 on, for widths that do not divide 32).

32 codes fill exactly b words, so both directions walk over the 32 positions of such a run, for all runs at once.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [R, C] below 2**bits, of 1 to 32 bits -> int32 words [R, ceil(C * bits / 32)]."""
    rows, cols = codes.shape
    runs = math.ceil(cols / 32)
    wide = torch.int64 if bits > 8 else torch.int32
    padded = pad(codes, (0, runs * 32 - cols)).reshape(rows, runs, 32).to(wide)
    words = torch.zeros(rows, runs, bits, dtype=wide, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= padded[..., i] << shift
        if shift + bits > 32:
            words[..., word + 1] |= padded[..., i] >> (32 - shift)
    flat = words.reshape(rows, runs * bits).narrow_copy(1, 0, math.ceil(cols * bits / 32))
    return flat.to(torch.int32)  # drops what was shifted beyond bit 31; the next word has it


def unpack_bits(words: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """Inverse of `pack_bits`: codes [R, cols], uint8 up to 8 bits, else int64."""
    rows, stored = words.shape
    runs = math.ceil(cols / 32)
    padded = pad(words, (0, runs * bits - stored)).reshape(rows, runs, bits)
    if bits > 8:
        padded = padded.to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(rows, runs, 32, dtype=torch.uint8 if bits <= 8 else torch.int64, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = padded[..., word] >> shift
        if shift + bits > 32:
            # The shift copies the sign bit: drop the copies before the next word's bits are put in their place.
            code = (code & ((1 << (32 - shift)) - 1)) | (padded[..., word + 1] << (32 - shift))
        codes[..., i] = code & (2**bits - 1)
    return codes.reshape(rows, runs * 32).narrow_copy(1, 0, cols)
