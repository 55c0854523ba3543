"""Small floats: every code of every width, against ml_dtypes and against the rules written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit.codegen.reference.torch_ops import TORCH
from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats import FloatElement, catalog, parse_format, scalar_format
from lowbit.quantizers.methods.grid import codec_of

ORACLES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
ALL = [
    *(f"e{e}m{m}" for e in range(1, 8) for m in range(8 - e)),
    *("e4m3finite", "e5m2finite", "e3m4fn", "e2m1fn", "e5m1ieee"),
]


def element(name: str) -> FloatElement:
    found = FloatElement.parse(name, True)
    assert found is not None
    return found


def finite(e: FloatElement) -> torch.Tensor:
    """Codes of numbers, in ascending order of magnitude, positive ones first."""
    return e.levels().isfinite().nonzero().flatten()


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal bits, whatever the kind of NaN."""
    numbers = ~want.isnan()
    bits = (got[numbers].view(torch.int32), want[numbers].view(torch.int32))
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(*bits)


@pytest.mark.parametrize("name", ALL)
def test_every_code(name: str) -> None:
    e = element(name)
    codes, levels = torch.arange(2**e.bits), e.levels()
    assert e.name == name
    assert same(e.decode().run(TORCH, {"code": codes}), levels)
    numbers = finite(e)
    assert torch.equal(e.encode(levels[numbers]).long(), numbers), "minus zero included"
    half = levels[: 2 ** (e.bits - 1)]
    assert bool((half[half.isfinite()].diff() > 0).all())
    assert same(-half, levels[2 ** (e.bits - 1) :])


def test_largest_numbers_and_specials() -> None:
    largest = {"e2m1": 6, "e2m2": 7, "e3m1": 24, "e3m2": 28, "e2m3": 7.5, "e4m3": 448, "e5m2": 57344, "e4m3finite": 480}
    for name, value in largest.items():
        levels = element(name).levels()
        assert float(levels[levels.isfinite()].max()) == value
    assert element("e4m3").levels().isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert element("e5m2").levels().isinf().nonzero().flatten().tolist() == [0x7C, 0xFC]
    assert all(bool(element(n).levels().isfinite().all()) for n in ALL if n not in ORACLES and n[-1] not in "ne")


@pytest.mark.parametrize("name", ORACLES)
def test_codes_are_those_of_ml_dtypes(name: str) -> None:
    e, dtype = element(name), ORACLES[name]
    want = np.arange(2**e.bits, dtype=np.uint8).view(dtype).astype(np.float32)
    assert same(e.levels(), torch.from_numpy(want))
    positive = e.levels()[finite(e)].unique()
    positive = positive[positive >= 0]
    middle, top = (positive[1:] + positive[:-1]) / 2, float(positive[-1])
    around = [torch.nextafter(middle, torch.full_like(middle, to)) for to in (0.0, top)]
    rng = torch.Generator().manual_seed(0)
    spread = torch.randn(100_000, generator=rng) * torch.exp(4 * torch.randn(100_000, generator=rng))
    x = torch.cat([middle, *around, spread * top / 50, torch.tensor([0.0, 1e-30, 1e9])])
    x = torch.cat([x, -x])
    codes = x.clamp(-top, top).numpy().astype(dtype).view(np.uint8)
    assert torch.equal(e.encode(x), torch.from_numpy(codes))


def test_rounding_by_hand() -> None:
    values = {0.03125: 0, 0.09375: 2, 0.21875: 4, 27: 31, 26: 30, 30: 31, -0.25: 0x24, 0.234: 4, -0.01: 0x20}
    assert element("e3m2").encode(torch.tensor(list(values))).tolist() == list(values.values())
    with pytest.raises(FormatError, match="LB0217"):
        element("e3m2").encode(torch.tensor([1.0, torch.nan]))
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert element("e5m2").encode(infinite).tolist() == [0x7B, 0xFB], "what is too large becomes the largest number"


@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e2m3", "e4m3", "e5m2"])
def test_grids_round_like_encode(name: str) -> None:
    """Ties included; only the sign of zeros is lost."""
    e = element(name)
    values = e.levels()[finite(e)].unique()
    x = torch.cat([values, (values[1:] + values[:-1]) / 2])
    codec = codec_of(e)
    got = e.levels()[codec.code(codec.index(x)).long()]
    assert torch.equal(got, e.levels()[e.encode(x).long()])


def test_no_operation_of_a_decode_program_sees_a_subnormal_float32() -> None:
    tiny = torch.finfo(torch.float32).tiny

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*operands: Any) -> Any:
            result = function(*operands)
            for value in (*operands, result):
                if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                    assert bool(((value == 0) | ~(value.abs() < tiny)).all())
            return result

        return run

    table = {name: watched(function) for name, function in TORCH.items()}
    for name in ALL:
        e = element(name)
        e.decode().run(table, {"code": torch.arange(2**e.bits)})


HALVES = {"f16": (5, 10, torch.float16), "bf16": (8, 7, torch.bfloat16), "e4m3": (4, 3, torch.float8_e4m3fn)}


@pytest.mark.parametrize("target", HALVES)
@pytest.mark.parametrize("name", ["e3m2", "e2m3", "e2m2", "e3m1", "e2m1"])
def test_fields_in_a_wider_float_are_the_value_times_a_power_of_two(name: str, target: str) -> None:
    e, (exponent, mantissa, dtype) = element(name), HALVES[target]
    codes, width = torch.arange(2**e.bits), 1 + exponent + mantissa
    sign, rest = codes >> (e.bits - 1), codes & (2 ** (e.bits - 1) - 1)
    bits = sign << (width - 1) | rest << (mantissa - e.mantissa)
    whole = torch.uint8 if width == 8 else torch.int16
    spread = bits.to(torch.int32).to(whole).view(dtype).float()
    assert torch.equal(spread * 2.0 ** (2 ** (exponent - 1) - 1 - e.exponent_bias), e.levels())


def test_a_scale_can_take_the_power_of_two() -> None:
    """fp16(fp16(x / 4096 * 4096) * s) = fp16(x / 4096 * fp16(4096 s)) until 4096 s overflows."""
    levels = element("e3m2").levels().half()
    scales = torch.exp(torch.linspace(-9.2, 2.7, 20_001)).half()[:, None]
    small = levels / 4096
    assert torch.equal(small * 4096 * scales, small * (scales * 4096))
    assert bool((torch.tensor(16.0).half() * 4096).isinf())


def test_what_floats_do_not_have() -> None:
    for text in ("e3m2.ch.asym", "e9m1.ch", "e4m4.ch", "e0m3.ch", "e4m3ieee.ch", "e5m2fn.ch", "e3m2.g0"):
        with pytest.raises(FormatError, match="LB021"):
            scalar_format(text)
    with pytest.raises(FormatError, match=r"LB0210.*symmetric"):
        scalar_format("e3m2.g64.asym")
    assert str(scalar_format("e3m2.ch.sym")) == "e3m2.ch"
    assert str(scalar_format("e2m1.g32.fz.f32")) == "e2m1.g32.fz.f32"
    assert {"e3m2.ch", "e2m3.ch", "e2m1.ch", "e4m3.ch", "e5m2.ch", "e4m1.ch"} <= {str(f) for f in catalog()}
    assert parse_format("e3m2") is parse_format(" e3m2 ") or parse_format("e3m2") == parse_format(" e3m2 ")
