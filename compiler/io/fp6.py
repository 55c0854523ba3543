"""Byte layouts of 5, 6 and 7 bit codes that other programs exchange.

Plain: the codes of a row-major matrix as one stream of bits, highest bits first, so that 4 six-bit codes are 3 bytes.

TC-FPx: the prepacked form of "FP6-LLM: Efficiently Serving Large Language Models Through FP6-Centric Algorithm-System
Co-Design" (Xia et al.), later used by DeepSpeed and torchao. Codes are split into planes of powers of two bits, highest
bits in the first plane; within a plane the 32 codes that one lane of a warp feeds to four m16n8k16 matrix instructions
lie in consecutive registers, in the order in which the kernel shifts them out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import plane_bits

__all__ = ["pack_plain", "pack_tcfpx", "unpack_plain", "unpack_tcfpx"]

_TILE = 64
_BYTE = (1, 3, 0, 2)  # the byte of a word in which each of four neighbours lies


def pack_plain(codes: Tensor, bits: int) -> Tensor:
    """uint8 stream of uint8 codes [N, K] below 2**bits; the last byte is filled up with zeros."""
    flat = codes.reshape(-1, 1).to(torch.int16) >> torch.arange(bits - 1, -1, -1, dtype=torch.int16) & 1
    stream = flat.reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    return (stream << torch.arange(7, -1, -1, dtype=torch.int16)).sum(1).to(torch.uint8)


def unpack_plain(stream: Tensor, bits: int, n: int, k: int) -> Tensor:
    """Inverse of `pack_plain`: uint8 codes [n, k]. Raises FormatError (LB0229) when the stream has another length."""
    _check_length(stream, -(-n * k * bits // 8))
    single = stream.reshape(-1, 1).to(torch.int16) >> torch.arange(7, -1, -1, dtype=torch.int16) & 1
    codes = single.reshape(-1)[: n * k * bits].reshape(-1, bits)
    return (codes << torch.arange(bits - 1, -1, -1, dtype=torch.int16)).sum(1).to(torch.uint8).reshape(n, k)


def pack_tcfpx(codes: Tensor, bits: int = 6) -> Tensor:
    """uint8 buffer of uint8 codes [N, K] below 2**bits: the planes one after the other.

    Raises FormatError (LB0229) unless N and K are multiples of 64 and `bits` is 5 to 7.
    """
    n, k = codes.shape
    parts, low = [], bits
    for width in _planes(bits, n, k):
        low -= width
        word, shift = _places(n, k, width)
        part = (codes.long() >> low & (2**width - 1)) << shift
        words = torch.zeros(n * k * width // 32, dtype=torch.int64).index_add_(0, word.reshape(-1), part.reshape(-1))
        parts.append(torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).view(torch.uint8))
    return torch.cat(parts)


def unpack_tcfpx(buffer: Tensor, n: int, k: int, bits: int = 6) -> Tensor:
    """Inverse of `pack_tcfpx`: uint8 codes [n, k]. Raises FormatError (LB0229) when the buffer has another length."""
    planes = _planes(bits, n, k)
    _check_length(buffer, n * k * bits // 8)
    codes, start = torch.zeros(n, k, dtype=torch.int64), 0
    for width in planes:
        stop = start + n * k * width // 8
        word, shift = _places(n, k, width)
        words = buffer[start:stop].contiguous().view(torch.int32).long() & 0xFFFFFFFF
        codes = codes << width | words[word] >> shift & (2**width - 1)
        start = stop
    return codes.to(torch.uint8)


def _planes(bits: int, n: int, k: int) -> tuple[int, ...]:
    if not 5 <= bits <= 7 or n % _TILE or k % _TILE:
        raise FormatError(
            "LB0229",
            f"TC-FPx holds 5 to 7 bit codes of multiples of {_TILE} rows and columns, not {bits} bits of {n}x{k}",
            hint="pad the matrix with zero codes",
        )
    return plane_bits(bits)[::-1]


def _check_length(buffer: Tensor, wanted: int) -> None:
    if buffer.numel() != wanted:
        raise FormatError("LB0229", f"expected {wanted} bytes of codes, got {buffer.numel()}")


def _places(n: int, k: int, width: int) -> tuple[Tensor, Tensor]:
    """Word and shift of every code's part in a plane of `width` bits, int64 [n, k]."""
    row, col = torch.arange(n)[:, None], torch.arange(k)[None, :]
    lane = 4 * (row % 8) + col % 8 // 2
    position = 2 * (row % 16 // 8 + 2 * (col % 16 // 8)) + col % 2  # in one instruction's fragment
    turn = row % 64 // 16 * 8 + position  # of the lane's 32 codes in one slice of 64 rows x 16 columns
    per = 32 // width
    word = ((row // 64 * (k // 16) + col // 16) * width + turn // per) * 32 + lane
    byte = torch.tensor(_BYTE)[turn % 4]
    return word, 8 * byte + 8 - width - width * (turn % per // 4)
