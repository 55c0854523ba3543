"""The bit tricks of four-bit products, for every code, and the choice of instruction."""

from __future__ import annotations

import itertools

import pytest
import torch

from lowbit.codegen.nibbles import Text, affine_bytes, fold_scale, lower_product, two_level_bytes, unpack_x16
from lowbit.compiler.errors import KernelError


def signed_bytes(word: torch.Tensor) -> torch.Tensor:
    """int64 [..., 4]: the bytes of 32-bit words, low first, as signed numbers."""
    found = (word.to(torch.int64)[..., None] >> torch.arange(0, 32, 8)) & 255
    return torch.where(found > 127, found - 256, found)


def test_nibbles_times_16_for_every_byte_in_every_place() -> None:
    byte = torch.arange(256)
    value = torch.where(torch.arange(16) > 7, torch.arange(16) - 16, torch.arange(16))
    for place, rest in itertools.product(range(4), (0, 0xFFFFFFFF, 0x5A5A5A5A)):
        word = (byte << 8 * place) | (rest & ~(255 << 8 * place))
        low, high = unpack_x16(word)
        assert torch.equal(signed_bytes(low)[:, place], 16 * value[byte & 15])
        assert torch.equal(signed_bytes(high)[:, place], 16 * value[byte >> 4])


def test_products_of_scaled_nibbles_are_256_times_those_of_levels() -> None:
    """What sm_90 computes with int8 is what sm_80 computes with int4, exactly, also for the longest rows."""
    rng = torch.Generator().manual_seed(0)
    w, x = (torch.randint(-8, 8, (4, 4096), generator=rng) for _ in range(2))
    assert torch.equal((16 * w) @ (16 * x).T, 256 * (w @ x.T))
    assert 131072 * (16 * 8) * 127 < 2**31


def test_affine_bytes_for_every_scale_offset_and_code() -> None:
    code = torch.arange(16)
    for scale in range(1, 18):
        least = torch.arange(-128, 128)
        value = code[None, :] * scale + least[:, None]
        fits = (value <= 127).all(1)
        for others in (0, 15):  # neighbours at both extremes must not carry into the byte
            for place in range(4):
                kept = least[fits & (others * scale + least <= 127)]
                word = (code << 8 * place) + others * (0x01010101 - (1 << 8 * place))
                got = signed_bytes(affine_bytes(word[None, :], scale, kept[:, None]) & 0xFFFFFFFF)
                assert torch.equal(got[..., place], code[None, :] * scale + kept[:, None])


def test_two_level_weights_fit_a_byte() -> None:
    """A row of largest magnitude 119 has, with group scales up to 16, only weights that fit a byte."""
    for scale, zero in itertools.product(range(1, 17), range(16)):
        low, high = -zero * scale, (15 - zero) * scale
        if low < -128 or high > 127:
            continue  # not what encoding gives: see quantizers
        codes = torch.arange(16) * 0x01010101
        want = ((torch.arange(16) - zero) * scale)[:, None].expand(-1, 4)
        assert torch.equal(signed_bytes(two_level_bytes(codes, scale, zero) & 0xFFFFFFFF), want)


def test_text_is_the_same_expression() -> None:
    low, high = unpack_x16(Text("w"))
    assert (low.text, high.text) == ("((w << 4) & 0xf0f0f0f0u)", "(w & 0xf0f0f0f0u)")
    text = affine_bytes(Text("q"), Text("s"), Text("m")).text
    word, scale, least = 0x0F030201, 7, -60
    names = {"q": word, "s": scale, "m": least}
    assert eval(text.replace("u)", ")"), names) & 0xFFFFFFFF == affine_bytes(word, scale, least) & 0xFFFFFFFF


def test_scales_are_folded_exactly_or_not_at_all() -> None:
    scale = torch.tensor([1.0, 0.37, 2.0**-10]).half()
    assert torch.equal(fold_scale(scale, -4) * 16, scale)
    for value, power in ((2.0**-24, -4), (60000.0, 4), (6e-5, -4)):
        with pytest.raises(KernelError, match="LB0417"):
            fold_scale(torch.tensor([value]).half(), power)


def test_four_bit_products_only_where_the_hardware_has_them() -> None:
    assert lower_product("sm_80", 4, 4, 128).operand == lower_product("sm_89", 4, 4, 16).operand == "s4"
    for arch in ("sm_90", "sm_90a", "sm_100a", "sm_120a"):
        for widths in itertools.product((4, 8), repeat=2):
            found = lower_product(arch, *widths, 128)
            assert found.operand == "s8"
            assert found.factor == 16 ** (widths.count(4))
    assert lower_product("sm_90", 4, 8, 64).instruction == "wgmma.m64k32"
    assert lower_product("sm_90", 4, 8, 16).instruction == "mma.m16n8k32"
    assert lower_product("sm_80", 4, 8, 128).instruction == "mma.m16n8k32"
