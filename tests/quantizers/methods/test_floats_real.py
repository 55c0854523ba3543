"""Float grids on layers of a real model: which wins, and what GPTQ makes of it."""

from __future__ import annotations

import pytest
from torch import Tensor

from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.methods import Gptq, Rtn

pytestmark = pytest.mark.slow

Matrices = dict[str, tuple[Tensor, LayerStats]]


def losses(matrices: Matrices, text: str) -> tuple[list[float], list[float]]:
    """Normalised loss of every matrix by rounding, and by GPTQ."""
    fmt = parse_format(text)
    found = [(Rtn(), []), (Gptq(), [])]
    for method, errors in found:
        errors += [method.quantize(w, fmt, stats).proxy_error for w, stats in matrices.values()]
    return found[0][1], found[1][1]


def below(a: list[float], b: list[float], factor: float = 1.0) -> bool:
    return all(x < factor * y for x, y in zip(a, b, strict=True))


def test_a_mantissa_bit_is_worth_more_than_an_exponent_bit(real_matrices: Matrices) -> None:
    fine, uniform, wide = (losses(real_matrices, t) for t in ("e2m3.ch", "int6.ch.sym", "e3m2.ch"))
    for method in (0, 1):
        assert below(fine[method], uniform[method], 0.75)
        assert below(uniform[method], wide[method], 0.7)
    for rounded, solved in (fine, uniform, wide):
        assert below(solved, rounded, 0.35)


def test_block_scales(real_matrices: Matrices) -> None:
    """Finer scales of fewer bits: NVFP4 beats MXFP4, and FP6 any FP4."""
    nv, mx, six = (losses(real_matrices, t)[1] for t in ("nvfp4", "mxfp4", "mxfp6_e2m3"))
    assert below(nv, mx, 0.75)
    assert below(six, nv, 0.2)
