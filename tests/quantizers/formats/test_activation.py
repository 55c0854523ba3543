"""Activation formats: text, scales, rounding and saturation."""

from __future__ import annotations

import pytest
import torch

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats import parse_activation

TEXTS = [
    "int8.token",
    "int8.g64",
    "int4.g64.w2",
    "int4.token.c90",
    "int2.g32",
    "e4m3.token",
    "e2m1.g16",
    "int8.g64.static",
    "int8.g64.w1x16",
    "int8.token.w32x16",
    "int4.token.w64.c90",
    "int4.g64.asym",
    "int3.g64.w1.c90.asym",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(text: str) -> None:
    assert str(parse_activation(text)) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("int8", "token"),
        ("int8.token.g64", "token"),
        ("float8.token", "float8"),
        ("int4.token.w2", "wide"),
        ("int4.g64.w2x4", "w2x4"),
        ("e4m3.g64.w2", "wide"),
        ("int8.g64.g64", "twice"),
        ("int8.token.c0", "c0"),
        ("int8.token.c101", "needed"),
        ("int1.token", "one bit"),
        ("int9.token", "int9"),
        ("int8.g64.asym", "asymmetric"),
        ("e2m1.g32.asym", "asymmetric"),
        ("int4.g64.asym.static", "static scales"),
    ],
)
def test_text_that_means_nothing(text: str, why: str) -> None:
    with pytest.raises(FormatError, match="LB0240") as found:
        parse_activation(text)
    assert why in str(found.value)


@pytest.mark.parametrize("k", [64, 100, 576])
@pytest.mark.parametrize("text", [t for t in TEXTS if not t.endswith("static")])
def test_rounding_is_to_the_nearest_level(text: str, k: int) -> None:
    fmt, x = parse_activation(text), torch.randn(5, k, generator=torch.Generator().manual_seed(k)) * 3
    levels, scales = fmt.round(x)
    assert levels.shape == x.shape
    assert scales.shape == (5, fmt.groups(k))
    sizes = torch.tensor(fmt.sizes(k))
    tops = fmt.tops(k).repeat_interleave(sizes)
    assert (levels <= tops).all()
    assert (levels >= -tops - int(fmt.integer)).all()
    steps = scales.repeat_interleave(sizes, 1)
    if not fmt.integer:
        table = fmt.element.levels()
        table = table[table.isfinite()]
        assert torch.allclose((levels - x / steps).abs(), (table[:, None, None] - x / steps).abs().amin(0), atol=1e-5)
        return
    inside = x.abs() <= tops * steps * 1.000001
    if fmt.asym and fmt.clip < 1:
        inside &= (levels - x / steps).abs() <= 0.5001
    assert torch.equal(levels, levels.round())
    assert ((levels * steps - x).abs() <= (0.5001 + 3e-7 * tops) * steps)[inside].all()  # beside that of float32
    assert inside.all() or fmt.clip < 1


def test_the_largest_magnitude_is_the_largest_level_of_its_group() -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    levels, _ = parse_activation("int4.g64.w2").round(x)
    assert levels.unflatten(1, (4, 64)).abs().amax(-1).tolist() == [[127, 127, 7, 7]] * 3


def test_asymmetric_levels_cover_the_range_of_their_group() -> None:
    fmt, x = parse_activation("int4.g64.w1.asym"), torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    x[:, 128:192], x[:, 192:] = x[:, 128:192].abs() + 1, -x[:, 192:].abs()  # ranges that do not include zero
    levels, steps = fmt.round(x)
    grouped = levels.unflatten(1, (4, 64))
    low, high = grouped.amin(-1), grouped.amax(-1)
    assert (high - low)[:, 1].min() == 15
    assert (grouped[:, 2] > 0).all()
    assert (high[:, 2] == 15).all()
    assert (low[:, 3] == -15).all()
    assert grouped[:, 0].abs().amax(-1).eq(127).all()  # wide groups stay symmetric
    assert (x - levels * steps.repeat_interleave(64, 1)).abs().max() < 0.51 * steps.max()
    plain = parse_activation("int4.g64.w1")
    assert (fmt.apply(x) - x)[:, 64:128].square().sum() < 0.8 * (plain.apply(x) - x)[:, 64:128].square().sum()
    assert fmt.bits_per_value(256) == plain.bits_per_value(256) + 3 * 4 / 256


def test_zeros_stay_zero_and_nan_spreads_over_its_group_only() -> None:
    fmt, x = parse_activation("int8.g32"), torch.ones(1, 96)
    x[0, :32], x[0, 40] = 0, torch.inf
    y = fmt.apply(x)
    assert torch.equal(y[0, :32], torch.zeros(32))
    assert y[0, 32:64].isnan().all()
    assert torch.allclose(y[0, 64:], torch.ones(32))


def test_static_scales_saturate() -> None:
    fmt = parse_activation("int8.g32.static")
    with pytest.raises(FormatError, match="LB0241"):
        fmt.round(torch.ones(1, 64))
    levels, _ = fmt.round(torch.tensor([[300.0, -300.0, 1.5, 2.5] * 16]), torch.tensor([1.0, 2.0]))
    assert levels[0, :4].tolist() == [127, -128, 2, 2]
    assert levels[0, 32:36].tolist() == [127, -128, 1, 1]


def test_bits_count_scales_and_wide_groups() -> None:
    assert parse_activation("int8.token").bits_per_value(64) == 8.5
    assert parse_activation("int4.g64.w1").bits_per_value(128) == 6.5
    assert parse_activation("int4.g64.static").bits_per_value(128) == 4
    assert parse_activation("int8.token.w32x16").bits_per_value(128) == (32 * 16 + 96 * 8 + 2 * 32) / 128
