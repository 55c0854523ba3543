"""Choosing trellises' codes: the search against all paths, its quality, and feedback against rounding."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from lowbit.compiler.errors import RunError
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import TrellisElement, parse_format, scalar_format
from lowbit.quantizers.methods.decoupleq import DecoupleQ
from lowbit.quantizers.methods.gptq import Gptq
from lowbit.quantizers.methods.rtn import Rtn
from lowbit.quantizers.methods.trellis import cheapest_paths, value_table


def weight_of(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.05


def stats_of(k: int) -> LayerStats:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(8 * k, k, generator=rng) @ (torch.eye(k) * 2 + torch.randn(k, k, generator=rng) * 0.3)
    x = x * torch.exp(0.7 * torch.randn(k, generator=rng))  # inputs of layers differ in size, some by far
    return LayerStats(x.T @ x / len(x), len(x))


def decibels(weight: torch.Tensor, text: str) -> float:
    q = Rtn().quantize(weight, parse_format(text), None).qtensor.dequantize()
    return -10 * math.log10(float((q - weight).square().mean() / weight.square().mean()))


@pytest.mark.parametrize("bits", range(1, 5))
def test_registers_hold_the_last_codes(bits: int) -> None:
    element = TrellisElement(bits)
    codes = torch.randint(0, 2**bits, (1, 30), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    register, values = 0, []
    for code in codes[0].tolist():
        register = register >> bits | code << (element.state_bits - bits)
        values.append(float(value_table(element)[register]))
    assert values == element.values(codes)[0].tolist()


@pytest.mark.parametrize(("bits", "columns"), [(1, 7), (2, 4), (3, 3), (4, 2)])
def test_no_path_is_cheaper(bits: int, columns: int) -> None:
    """Against every path, from registers that hold something, with columns of unlike importance."""
    element, n = TrellisElement(bits), 5
    rng = torch.Generator().manual_seed(bits)
    target, importance = torch.randn(n, columns, generator=rng) * 40, torch.rand(n, columns, generator=rng) + 0.1
    register = torch.randint(0, 2**element.state_bits, (n,), generator=rng, dtype=torch.int32)
    table = value_table(element)

    def cost(row: int, codes: tuple[int, ...]) -> float:
        state, total = int(register[row]), 0.0
        for t, code in enumerate(codes):
            state = state >> bits | code << (element.state_bits - bits)
            total += float(importance[row, t]) * (float(table[state]) - float(target[row, t])) ** 2
        return total

    found = cheapest_paths(element, target, importance, register)
    for row in range(n):
        least = min(cost(row, codes) for codes in product(range(2**bits), repeat=columns))
        assert cost(row, tuple(found[row].tolist())) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize(("bits", "least"), [(1, 4.9), (2, 10.8), (3, 16.6)])
def test_normal_numbers_lose_less_than_in_scalar_codes(bits: int, least: float) -> None:
    """The best scalar codes of 1, 2 and 3 bits have 4.4, 9.3 and 14.6 dB, whatever their levels."""
    assert decibels(weight_of(12, 256), f"tcq{bits}.ch") > least


def test_scales_reach_for_heavy_tails() -> None:
    """Rows with a few large weights get larger scales than their root mean square alone asks for."""
    weight = weight_of(4, 256)
    weight[:, ::37] *= 6
    for text in ("tcq3.ch", "tcq4.g64"):
        assert decibels(weight, text) > decibels(weight, text.replace("tcq", "int").replace(".ch", ".ch.sym"))


@pytest.mark.parametrize("text", ["tcq2.ch", "tcq3.g32", "tcq2.g64.bf16", "tcq4.t"])
def test_feedback_lowers_the_loss(text: str) -> None:
    weight, stats = weight_of(10, 80), stats_of(80)
    found = Gptq().quantize(weight, parse_format(text), stats)
    assert found.proxy_error < 0.75 * found.rtn_error
    assert str(found.qtensor.fmt) == text


def test_a_trellis_beats_integers_of_as_many_bits() -> None:
    weight, stats = weight_of(16, 192), stats_of(192)
    trellis, integers = (Gptq().quantize(weight, parse_format(f), stats) for f in ("tcq2.ch", "int2.g64.fz"))
    assert trellis.qtensor.bits_per_weight < integers.qtensor.bits_per_weight
    assert trellis.proxy_error < 0.8 * integers.proxy_error


def test_rows_of_zeros_stay_zeros() -> None:
    weight = weight_of(4, 96)
    weight[1] = 0
    weight[2, 32:64] = 0
    for method in (Rtn(), Gptq()):
        q = method.quantize(weight, scalar_format("tcq2.g32"), stats_of(96)).qtensor.dequantize()
        assert bool((q[1] == 0).all())
        assert method.name == "gptq" or bool((q[2, 32:64] == 0).all())


def test_other_methods_decline() -> None:
    with pytest.raises(RunError, match=r"LB0515.*tcq2.g32"):
        DecoupleQ().quantize(weight_of(8, 64), parse_format("tcq2.g32"), stats_of(64))
