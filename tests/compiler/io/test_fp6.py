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


def test_what_does_not_fit_is_refused() -> None:
    for shape, bits in (((64, 65), 6), ((63, 64), 6), ((64, 64), 4)):
        with pytest.raises(FormatError, match="LB0229"):
            pack_tcfpx(torch.zeros(shape, dtype=torch.uint8), bits)
    with pytest.raises(FormatError, match="LB0229"):
        unpack_tcfpx(torch.zeros(10, dtype=torch.uint8), 64, 64)
    with pytest.raises(FormatError, match="LB0229"):
        unpack_plain(torch.zeros(10, dtype=torch.uint8), 6, 64, 64)
