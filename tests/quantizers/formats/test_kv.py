"""Formats of key-value caches: text, sizes to the byte, and the codec."""

from __future__ import annotations

import pytest
import torch

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats.kv import KVSide, parse_kv_format
from lowbit.quantizers.kv import dequantize_groups, fake_quantize, quantize_groups

SIDES = [KVSide(bits, along, group) for bits in (2, 4, 8)
         for along, group in (("channel", 32), ("channel", 64), ("token", 0), ("token", 32))]  # fmt: skip


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "text",
    ["kv4.kc64.vt.w64", "kv2.kc32.vt32.w128", "k8v4.kt.vt", "k16v4.vt64.w32", "k4v16.kc64.w64",
     "kv4.kc64.vc64.w64", "kv4.kt.vt.rot", "kv2.kc64.vt32.w64.rot.gear2r4"],
)  # fmt: skip
def test_text_round_trips(text: str) -> None:
    fmt = parse_kv_format(text)
    assert str(fmt) == text
    assert parse_kv_format(".".join([text.split(".")[0], *reversed(text.split(".")[1:])])) == fmt


@pytest.mark.parametrize(
    ("text", "code"),
    [("kv3", "LB0250"), ("int4", "LB0250"), ("kv4.x", "LB0250"), ("kv4.kc48.vt.w48", "LB0251"), ("kv4.kc.vt", "LB0251"),
     ("kv4.kc64.vt.w64.gear60r4", "LB0252"), ("kv4.kc64.vt", "LB0253"), ("kv4.kc64.vt.w96", "LB0253"),
     ("kv4.kt.vt.gear2r4", "LB0253")],
)  # fmt: skip
def test_bad_formats_are_refused(text: str, code: str) -> None:
    with pytest.raises(FormatError) as e:
        parse_kv_format(text)
    assert e.value.code == code


def test_bytes_by_hand() -> None:
    """4096 tokens of a head of 64: codes, a scale and a minimum of 2 bytes per group, a window of 2 bytes a number."""
    assert parse_kv_format("k16v16").nbytes(4096, 64) == 2 * 4096 * 64 * 2
    kv4 = parse_kv_format("kv4.kc64.vt.w64")
    keys = 4096 * 64 // 2 + 4096 // 64 * 64 * 4
    values = 4032 * 64 // 2 + 4032 * 4 + 64 * 64 * 2
    assert kv4.nbytes(4096, 64) == keys + values
    assert kv4.nbytes(4097, 64) == keys + 64 * 2 + values + 32 + 4
    assert kv4.bits_per_number(64) == 4.5
    assert parse_kv_format("kv2.kc32.vt32.w32").bits_per_number(64) == 3.0
    gear = parse_kv_format("kv2.kc64.vt.w64.gear2r4")
    block = 2 * (64 * 64 // 4) + (64 + 64) * 4 + 2 * (2 * 4 * (64 + 64) + 64 * 2 * 3)
    assert gear.nbytes(128, 64) == 2 * block


def test_what_is_quantized_when() -> None:
    """KIVI: after T tokens T % R keys are float16, and min(T, R) values."""
    fmt = parse_kv_format("kv4.kc32.vt.w64")
    for tokens in (0, 1, 63, 64, 65, 128, 200):
        assert tokens - fmt.stored(fmt.key, tokens) == tokens % 64
        assert tokens - fmt.stored(fmt.value, tokens) == min(tokens, 64)


@pytest.mark.parametrize("side", SIDES, ids=lambda s: f"{s.bits}{s.text('x')}")
def test_extremes_are_kept(side: KVSide) -> None:
    """Minima exactly; maxima too where the scale is a float16, else to half of its last place."""
    x = numbers(2, 64, 80) * 5
    got, exact = fake_quantize(x, side), x.half().float()
    axis = -2 if side.along == "channel" else -1
    size = side.group or 80
    for a, b in zip(exact.split(size, axis), got.split(size, axis), strict=True):
        assert torch.equal(a.amin(axis), b.amin(axis))
        span = a.amax(axis) - a.amin(axis)
        assert bool(((a.amax(axis) - b.amax(axis)).abs() <= span * 2**-11).all())
        # Half a step, and what rounding the scale moves the largest code by.
        limit = span / (2**side.bits - 1) / 2 + span * 2**-10
        assert bool(((a - b).abs().amax(axis) <= limit).all())
    steps = torch.arange(2**side.bits).float().repeat(64 * 80 // 2**side.bits + 1)[: 64 * 80] * 0.25 - 3
    grid = steps.view(64, 80) if side.along == "token" else steps.view(80, 64).T
    if side.bits < 8:  # every group holds the whole grid, whose scale is a float16
        assert torch.equal(fake_quantize(grid, side), grid)


@pytest.mark.parametrize("side", SIDES, ids=lambda s: f"{s.bits}{s.text('x')}")
@pytest.mark.parametrize("value", [0.0, -3.7, 65504.0, 6e-8, 1e9])
def test_constant_groups_have_no_error(side: KVSide, value: float) -> None:
    x = torch.full((64, 64), value)
    got = fake_quantize(x, side)
    assert torch.equal(got, x.clamp(max=65504).half().float())


def test_the_smallest_range_survives() -> None:
    """A span below what float16 scales hold still orders its numbers."""
    x = torch.zeros(64, 32)
    x[5] = 2.0**-24
    groups = quantize_groups(x, KVSide(4, "channel", 64))
    assert bool((groups.scale > 0).all())
    assert torch.equal(dequantize_groups(groups, KVSide(4, "channel", 64)), x)


@pytest.mark.parametrize("text", ["kv2.kc64.vt32.w64.gear2r4", "kv4.kc64.vt.w64.gear5r2"])
def test_gear_lowers_the_error_and_keeps_outliers(text: str) -> None:
    fmt = parse_kv_format(text)
    x = numbers(2, 3, 128, 64)
    x[..., 3] *= 30  # a channel
    x[:, :, 17] *= 20  # a token
    for side in (fmt.key, fmt.value):
        plain, better = fake_quantize(x, side), fake_quantize(x, side, fmt.gear, fmt.window)
        exact = x.half().float()
        assert float((better - exact).norm()) < 0.8 * float((plain - exact).norm())
        blocks = exact.unflatten(2, (-1, 64)), better.unflatten(2, (-1, 64))
        axis = -2 if side.along == "channel" else -1
        top = blocks[0].argmax(axis, keepdim=True)
        assert torch.equal(blocks[0].gather(axis, top), blocks[1].gather(axis, top))
