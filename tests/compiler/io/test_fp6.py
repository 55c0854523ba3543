"""Interchange layouts of 6-bit codes: byte for byte what FP6-LLM's own packer writes."""

from __future__ import annotations

import zlib

import pytest
import torch

from lowbit.compiler.errors import FormatError
from lowbit.compiler.io.fp6 import pack_plain, pack_tcfpx, unpack_plain, unpack_tcfpx

GOLDEN = {
    (64, 64): (0xC094D2DB, 0x972A0C63),
    (128, 192): (0x9FC9B5E2, 0x68A71903),
    (256, 128): (0x16D0E152, 0x80A3C8BA),
}


def pattern(n: int, k: int) -> torch.Tensor:
    r, c = torch.arange(n)[:, None], torch.arange(k)[None, :]
    return ((7 * r + 13 * c + (r * c) % 11) & 63).to(torch.uint8)


@pytest.mark.parametrize("shape", GOLDEN)
def test_bytes_are_the_reference_packers(shape: tuple[int, int]) -> None:
    codes = pattern(*shape)
    found = [zlib.crc32(pack(codes, 6).numpy().tobytes()) for pack in (pack_plain, pack_tcfpx)]
    assert tuple(found) == GOLDEN[shape]
    buffer, planes = pack_tcfpx(codes), shape[0] * shape[1] // 4
    words = [int.from_bytes(bytes(buffer[i : i + 4].tolist()), "little") for i in (0, planes)]
    assert words == [0x323E2DE9, 0xD5D30889]


def test_four_codes_are_three_bytes() -> None:
    c = [0b110101, 0b001110, 0b101011, 0b010001]
    want = [c[0] << 2 | c[1] >> 4, (c[1] & 15) << 4 | c[2] >> 2, (c[2] & 3) << 6 | c[3]]
    assert pack_plain(torch.tensor([c], dtype=torch.uint8), 6).tolist() == want


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_round_trips(bits: int) -> None:
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (128, 192), generator=rng).to(torch.uint8)
    buffer = pack_tcfpx(codes, bits)
    assert buffer.numel() == 128 * 192 * bits // 8
    assert torch.equal(unpack_tcfpx(buffer, 128, 192, bits), codes)
    odd = codes[:3, :5]
    assert torch.equal(unpack_plain(pack_plain(odd, bits), bits, 3, 5), odd)


def lane_words(buffer: torch.Tensor, bits: int, shape: tuple[int, int]) -> list[torch.Tensor]:
    """uint32 words of each plane as a warp loads them: [slices, words of a lane, 32 lanes]."""
    planes, start, n_codes = [], 0, shape[0] * shape[1]
    for width in {5: (1, 4), 6: (2, 4), 7: (1, 2, 4)}[bits]:
        stop = start + n_codes * width // 8
        planes.append((buffer[start:stop].view(torch.int32).long() & 0xFFFFFFFF).reshape(-1, width, 32))
        start = stop
    return planes


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_the_kernels_loop_finds_operands_of_matrix_instructions(bits: int) -> None:
    """FP6-LLM's loop, for every width: each turn takes the top of every byte of every plane, so that shifts by 8 and
    by the plane's width suffice; what it finds must be the A operands of mma.m16n8k16 of four 16-row blocks."""
    shape, mask = (128, 64), {1: 0x80808080, 2: 0xC0C0C0C0, 4: 0xF0F0F0F0}
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    planes = lane_words(pack_tcfpx(codes, bits), bits, shape)
    lane = torch.arange(32)
    for turn in range(8):
        word, above = torch.zeros(planes[0].shape[0], 32, dtype=torch.int64), 0
        for words in planes:
            width = words.shape[1]
            at, shift = divmod(turn * width, 8)
            word |= ((words[:, at] << shift) & mask[width]) >> above
            above += width
        for which in range(4):
            # Registers of two halves: the upper byte of each half holds weights 1 and 2, the lower one 3 and 4.
            place = 16 * (which % 2) + 8 * (which < 2)
            found = (word >> (place + 8 - bits)) & (2**bits - 1)
            pair = 2 * (turn % 2) + which // 2  # a0a1, a2a3, a4a5, a6a7 of the PTX manual's fragment
            row = turn // 2 * 16 + lane // 4 + 8 * (pair % 2)
            col = lane % 4 * 2 + which % 2 + 8 * (pair // 2)
            for piece in range(planes[0].shape[0]):
                r, c = piece // (shape[1] // 16) * 64 + row, piece % (shape[1] // 16) * 16 + col
                assert torch.equal(found[piece], codes[r, c].long()), (turn, which, piece)


def test_what_does_not_fit_is_refused() -> None:
    for shape, bits in (((64, 65), 6), ((63, 64), 6), ((64, 64), 4)):
        with pytest.raises(FormatError, match="LB0229"):
            pack_tcfpx(torch.zeros(shape, dtype=torch.uint8), bits)
    with pytest.raises(FormatError, match="LB0229"):
        unpack_tcfpx(torch.zeros(10, dtype=torch.uint8), 64, 64)
    with pytest.raises(FormatError, match="LB0229"):
        unpack_plain(torch.zeros(10, dtype=torch.uint8), 6, 64, 64)
