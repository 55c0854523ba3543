"""Elements given by a table: `nf4` is the normal float of QLoRA, and what is no table is refused."""

from __future__ import annotations

import pytest
import torch

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats import LevelElement, scalar_format
from lowbit.quantizers.formats.levels import NORMAL_FLOAT4
from lowbit.quantizers.methods import Rtn
from lowbit.quantizers.qtensor import QTensor


def test_normal_floats_are_quantiles_of_the_normal_distribution() -> None:
    # The outermost quantile is the mean of those that leave half a level of 15 and of 16 beyond the end.
    end = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1), above]).sort().values
    assert torch.allclose(torch.tensor(NORMAL_FLOAT4, dtype=torch.float64), levels / levels.max(), rtol=0, atol=5e-7)


def test_nf4_serves_normal_weights_better_than_integers() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))

    def loss(text: str) -> float:
        q = Rtn(clip_search=False).quantize(weight, scalar_format(text), None).qtensor
        assert isinstance(q, QTensor)
        return float((q.dequantize() - weight).square().mean())

    assert loss("nf4.g64") < 0.85 * loss("int4.g64.sym")


@pytest.mark.parametrize("table", [(0.0, 1.0, 2.0), (0.0, float("nan")), (1.0,)])
def test_tables_of_other_sizes_or_without_numbers_are_refused(table: tuple[float, ...]) -> None:
    with pytest.raises(FormatError, match="LB0210"):
        LevelElement("odd", table)


def test_nf4_has_no_zero_points() -> None:
    with pytest.raises(FormatError, match=r"LB0210.*nf4"):
        scalar_format("nf4.g64.asym")
