"""Choosing among formats: the one with the lowest error on the layer at hand."""

from __future__ import annotations

import pytest
import torch

from lowbit.compiler.errors import FormatError
from lowbit.compiler.job.engine import entry
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import ChoiceFormat, parse_format
from lowbit.quantizers.methods import Gptq, Method, Rtn, quantize_weight
from lowbit.quantizers.scheme import Scheme

CHOICE = "int6.ch.sym|e3m2.ch|e2m3.ch"


def weights(kind: str) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    uniform = torch.rand(16, 64, generator=rng) * 2 - 1
    if kind == "uniform":
        return uniform
    normal = torch.randn(16, 64, generator=rng)
    return normal * normal.abs().sqrt() if kind == "peaked" else normal.sign() * torch.exp(2.5 * normal.abs())


@pytest.mark.parametrize(("kind", "want"), [("uniform", "int6.ch.sym"), ("peaked", "e2m3.ch"), ("wide", "e3m2.ch")])
@pytest.mark.parametrize("method", [Rtn(), Gptq()], ids=["rtn", "gptq"])
def test_the_distribution_decides(kind: str, want: str, method: Method) -> None:
    """Flat weights want equal steps, heavy tails want exponents."""
    stats = LayerStats(torch.eye(64).double(), 64)
    found = quantize_weight(method, weights(kind), parse_format(CHOICE), stats)
    assert str(found.qtensor.fmt) == want
    each = {text: quantize_weight(method, weights(kind), parse_format(text), stats) for text in CHOICE.split("|")}
    assert found.proxy_error == min(q.proxy_error for q in each.values())
    line = entry("a.q_proj", found, stats, 0.0)
    assert line.format == want, "the report shows what was chosen"
    assert all(text in line.notes[-1] for text in each if text != want)


def test_ties_go_to_the_first() -> None:
    zeros = torch.zeros(4, 32)
    assert str(quantize_weight(Rtn(), zeros, parse_format("e2m3.ch|int6.ch.sym"), None).qtensor.fmt) == "e2m3.ch"


def test_text_form_and_scheme() -> None:
    fmt = parse_format(CHOICE)
    assert isinstance(fmt, ChoiceFormat)
    assert str(fmt) == CHOICE
    assert fmt.bits_per_weight(64, 64) == 6 + 16 / 64
    assert Scheme.from_dict(Scheme("s", fmt).to_dict()).weight == fmt
    for text in ("e3m2.ch|e3m2.ch", "e3m2.ch|", "int6.ch.sym|vq.d4.k256"):
        with pytest.raises(FormatError, match="LB021"):
            parse_format(text)
    with pytest.raises(FormatError, match="LB0213"):
        parse_format("e3m2.ch|e3m2.g128").check(8, 64, "x")
