"""Rounding is to the nearest code, and scales are found for every kind of group, degenerate ones included."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.compiler.errors import RunError
from lowbit.compiler.ir.program import Program
from lowbit.quantizers.formats import Element, Format, Granularity, catalog, parse_format
from lowbit.quantizers.methods.grid import Grid, codec_of, search_grid, stored_scale
from lowbit.quantizers.qtensor import QTensor

ALL = [str(f) for f in catalog()]


@dataclass(frozen=True)
class Uneven(Element):
    """An element that is no integer: levels out of order, unequal gaps, and zero twice."""

    bits: int = 3
    symmetric: bool = True

    @property
    def name(self) -> str:
        return "uneven"

    @property
    def integer(self) -> bool:
        return False

    def levels(self) -> torch.Tensor:
        return torch.tensor([0.0, 0.5, 1.0, 3.0, -0.0, -0.5, -1.0, -3.0])

    def decode(self) -> Program:
        raise NotImplementedError


def exhaustive(values: torch.Tensor, fmt: Format, scale: float, zero: float, offset: float) -> torch.Tensor:
    """Distance of each value to the nearest number the format can write, by trying every code."""
    levels = fmt.element.levels()
    numbers = (levels[levels.isfinite()] - zero) * scale + offset
    return (values[:, None] - numbers[None]).abs().amin(1)


@pytest.mark.parametrize("text", ALL)
def test_every_value_gets_the_nearest_code(text: str) -> None:
    fmt = parse_format(text)
    span = 2.0 ** (fmt.bits - 1) + 2
    values = torch.linspace(-span, span, 1001)
    scale, zero = torch.tensor([[0.75]]), torch.tensor([[1.0]]) if fmt.zero else None
    offset = torch.tensor([[-0.3125]]) if fmt.offset else None
    q = Grid(fmt, scale, zero, offset).encode(values[None])
    error = (q.dequantize()[0] - values).abs()
    expected = exhaustive(values, fmt, 0.75, 1.0 if fmt.zero else 0.0, -0.3125 if fmt.offset else 0.0)
    assert torch.allclose(error, expected, atol=1e-5)


def test_elements_known_by_their_levels_only() -> None:
    fmt = Format(Uneven(), Granularity("ch"))
    values = torch.linspace(-4, 4, 801)
    q = Grid(fmt, torch.tensor([[1.0]]), None).encode(values[None])
    assert torch.allclose((q.dequantize()[0] - values).abs(), exhaustive(values, fmt, 1.0, 0.0, 0.0), atol=1e-6)
    assert int(q.codes.max()) < 8
    assert 4 not in q.codes, "of two codes for zero the lower one is written"
    assert codec_of(Uneven()).step == 0


def test_search_works_for_unknown_elements() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 40)
    q = search_grid(weight, Format(Uneven(), Granularity("g", 16))).encode(weight)
    assert (q.dequantize() - weight).square().mean() < 0.15


DEGENERATE = {
    "zeros": torch.zeros(4, 40),
    "constant": torch.full((4, 40), 0.37),
    "negative": torch.full((4, 40), -2.5),
    "one nonzero": torch.zeros(4, 40).index_fill(1, torch.tensor([7]), 3.0),
    "tiny": torch.linspace(-1e-9, 1e-9, 160).reshape(4, 40),
    "denormal": torch.linspace(-1e-41, 1e-41, 160).reshape(4, 40),
    "large": torch.linspace(-3e4, 3e4, 160).reshape(4, 40),
    "outlier": torch.cat([torch.full((4, 39), 1e-3), torch.full((4, 1), 900.0)], 1),
    "zero row": torch.cat([torch.zeros(1, 40), torch.randn(3, 40, generator=torch.Generator().manual_seed(1))]),
    "minus zero": torch.full((4, 40), -0.0),
    "two values": torch.tensor([-1.0, 1.0]).repeat(4, 20),
    "positive": torch.linspace(10, 10.1, 160).reshape(4, 40),
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("clip", [True, False])
def test_degenerate_weights_in_every_format(kind: str, clip: bool) -> None:
    weight = DEGENERATE[kind]
    for text in ALL:
        for granularity in ("ch", "g16", "t"):
            fmt = parse_format(text.replace(".ch", f".{granularity}", 1))
            q = search_grid(weight, fmt, clip=clip).encode(weight)
            out = q.dequantize()
            assert bool(out.isfinite().all()), fmt
            worst = weight.abs().max().clamp(min=torch.finfo(fmt.scale_dtype).tiny * 2)
            assert bool(((out - weight).abs() <= 2.01 * worst).all()), fmt
            if bool((weight == 0).all()):
                assert bool((out == 0).all()), f"{fmt}: zeros must stay zeros"


def test_two_values_are_exact_in_one_bit() -> None:
    weight = DEGENERATE["two values"]
    q = search_grid(weight, parse_format("int1.g20.sym")).encode(weight)
    assert torch.equal(q.dequantize(), weight)


@pytest.mark.parametrize("text", ["int4.g16.sym", "int3.g16.asym", "int2.ch.sym", "int1.g16.sym", "int8.t.asym"])
def test_clip_search_never_loses_to_min_max(text: str) -> None:
    torch.manual_seed(3)
    weight, fmt = torch.randn(16, 50), parse_format(text)

    def errors(clip: bool) -> float:
        return float((search_grid(weight, fmt, clip=clip).encode(weight).dequantize() - weight).square().sum())

    assert errors(True) <= errors(False) * 1.0001
    assert errors(True) < errors(False) * 0.99 or fmt.bits == 8


def test_importance_moves_the_error_to_where_it_costs_least() -> None:
    torch.manual_seed(4)
    weight, fmt = torch.randn(32, 32), parse_format("int2.ch.sym")
    importance = torch.ones(32)
    importance[:4] = 1000.0

    def cost(importance_used: torch.Tensor | None) -> float:
        out = search_grid(weight, fmt, importance_used).encode(weight).dequantize()
        return float(((out - weight).square() * importance).sum())

    assert cost(importance) < 0.9 * cost(None)


def test_scales_are_numbers_the_format_stores() -> None:
    torch.manual_seed(5)
    weight = torch.randn(8, 64) * 1e-3
    for scale in ("f16", "bf16", "f32"):
        fmt = parse_format("int4.g32.sym" + ("" if scale == "f16" else f".{scale}"))
        grid = search_grid(weight, fmt)
        assert torch.equal(grid.scale, grid.scale.to(fmt.scale_dtype).float())


def test_stored_scale_never_becomes_zero_or_infinite() -> None:
    values = torch.tensor([0.0, 1e-30, -1e-30, 1.0, 1e30])
    out = stored_scale(values, parse_format("int4.ch.sym"))
    assert bool(out.isfinite().all())
    assert out.tolist()[0] == 0.0
    assert 0 < out.tolist()[1] < 1e-7
    assert out.tolist()[2] == -out.tolist()[1]


def test_scales_that_overflow_are_refused() -> None:
    weight = torch.full((2, 8), 1e7)
    with pytest.raises(RunError, match=r"LB0512.*f32"):
        search_grid(weight, parse_format("int4.ch.sym"))
    out = search_grid(weight, parse_format("int4.ch.sym.f32")).encode(weight).dequantize()
    assert torch.allclose(out, weight, rtol=1e-3)


@given(
    st.sampled_from(ALL),
    st.sampled_from(["t", "ch", "g1", "g7", "g32"]),
    st.integers(1, 9),
    st.integers(32, 70),
    st.floats(-4, 4),
    st.integers(0, 10_000),
)
def test_any_shape_any_format(text: str, granularity: str, n: int, k: int, exponent: float, seed: int) -> None:
    fmt = parse_format(text.replace(".ch", f".{granularity}", 1))
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    q = search_grid(weight, fmt).encode(weight)
    assert isinstance(q, QTensor)
    assert q.shape == (n, k)
    assert int(q.codes.max()) < 2**fmt.bits
    if q.zero is not None:
        assert int(q.zero.max()) < 2**fmt.bits
    assert (q.dequantize() - weight).square().sum() <= 1.001 * weight.square().sum(), "never worse than writing zeros"
