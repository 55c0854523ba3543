"""decoupleQ on layers of a real model: the orderings of the losses."""

from __future__ import annotations

import itertools

import pytest
from torch import Tensor

from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.factor import prepare
from lowbit.quantizers.formats import parse_format, scalar_format
from lowbit.quantizers.methods import DecoupleQ, Gptq, Method

pytestmark = pytest.mark.slow

Matrices = dict[str, tuple[Tensor, LayerStats]]
PAPER_GPTQ = Gptq(clip_search=False, weighting="none", refits=0)


@pytest.fixture(scope="module")
def small(real_matrices: Matrices) -> Matrices:
    """The square ones: what is measured on them holds for the others, at a third of the time."""
    return {name: case for name, case in real_matrices.items() if case[0].shape[0] <= 576}


def errors(method: Method, text: str, matrices: Matrices) -> list[float]:
    """Normalised loss of every matrix."""
    return [method.quantize(w, parse_format(text), stats).proxy_error for w, stats in matrices.values()]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_far_better_than_gptq_with_groups(small: Matrices) -> None:
    ours, gptq = errors(DecoupleQ(), "int2.g64.fz", small), errors(PAPER_GPTQ, "int2.g64.fz", small)
    assert all(a < 0.5 * b for a, b in zip(ours, gptq, strict=True))


def test_far_better_than_gptq_per_channel(small: Matrices) -> None:
    ours, gptq = errors(DecoupleQ(), "int2.ch.fz", small), errors(PAPER_GPTQ, "int2.ch.fz", small)
    assert all(a < 0.4 * b for a, b in zip(ours, gptq, strict=True))


def test_better_than_the_alternation_alone(small: Matrices) -> None:
    """The paper's integer step (GPTQ), then feedback inside the box, then annealed coordinate descent."""
    gptq, box, cd = (errors(DecoupleQ(rounding=r), "int2.g64.fz", small) for r in ("gptq", "box", "cd"))
    assert mean(box) < 0.93 * mean(gptq)
    assert mean(cd) < 0.98 * mean(box)
    refined = errors(Gptq(), "int2.g64.fz", small)
    assert mean(cd) < 0.93 * mean(refined)


def test_smaller_groups_and_more_bits_lower_the_loss(small: Matrices) -> None:
    method = DecoupleQ()
    losses = [errors(method, text, small) for text in ("int3.g64.fz", "int2.g64.fz", "int2.g128.fz", "int2.ch.fz")]
    for finer, coarser in itertools.pairwise(losses):
        assert all(a < b for a, b in zip(finer, coarser, strict=True))


@pytest.mark.parametrize("rounding", ["gptq", "box"])
def test_the_loss_of_a_row_never_rises_with_iterations(small: Matrices, rounding: str) -> None:
    weight, stats = next(iter(small.values()))
    prepared = prepare(stats, 0.01, act_order=True)
    assert prepared is not None
    fmt = scalar_format("int2.g64.fz")
    found = [DecoupleQ(rounding=rounding, iterations=i).solve(weight, fmt, prepared).errors for i in range(1, 5)]
    assert all(bool((b <= a).all()) for a, b in itertools.pairwise(found))
    assert found[-1].sum() < 0.7 * found[0].sum()
