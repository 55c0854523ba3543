"""Orderings that hold on real matrices: VPTQ against GPTQ, k-means, itself, and two well-known ways to get it wrong.

Errors are tr(D H D^T) / tr(W H W^T) on the calibration Hessian; requirements are on the mean over the matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from _vq_cases import prepared_of, vector_format
from torch import Tensor

from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.methods import Gptq, Method, Vptq, proxy_error
from lowbit.quantizers.methods.vptq.kmeans import kmeans
from lowbit.quantizers.methods.vptq.layout import make_norm, make_parts, make_problem, to_vqtensor
from lowbit.quantizers.methods.vptq.problem import Problem
from lowbit.quantizers.methods.vptq.stages import feedback

pytestmark = pytest.mark.slow

PAPER_GPTQ = Gptq(refits=0, sweeps=0, clip_search=False, weighting="none", signed_scale=False)
PAPER = Vptq(weighting="diagonal", restarts=0, refit=0, beam=1, iterations=8)
FAST = Vptq(iterations=6, restarts=1, refit=2, beam=8)

Cases = dict[str, tuple[Tensor, LayerStats]]
Errors = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def errors(real_matrices: Cases) -> Errors:
    """errors(method, format, names): proxy error of every matrix; each is computed once."""
    known: dict[tuple[Method, str, str], float] = {}

    def of(method: Method, text: str, names: tuple[str, ...] = ("3.q", "14.o")) -> dict[str, float]:
        for name in names:
            if (method, text, name) not in known:
                weight, stats = real_matrices[name]
                known[method, text, name] = method.quantize(weight, parse_format(text), stats).proxy_error
        return {name: known[method, text, name] for name in names}

    return of


def mean(found: dict[str, float]) -> float:
    return sum(found.values()) / len(found)


def test_two_bits_against_gptq(errors: Errors) -> None:
    """At 2.05 bits, against 2.28 with groups of 64 and 2.03 per channel."""
    names = ("3.q", "14.o", "20.gate")
    vector = mean(errors(FAST, "vq.d4.k256", names))
    assert vector < 0.75 * mean(errors(PAPER_GPTQ, "int2.g64.asym", names))
    assert vector < 0.5 * mean(errors(PAPER_GPTQ, "int2.ch.asym", names))


def test_the_additions_pay(errors: Errors) -> None:
    assert mean(errors(FAST, "vq.d4.k256")) < 0.95 * mean(errors(PAPER, "vq.d4.k256"))
    assert mean(errors(FAST, "vq.d8.k256.r256")) < 0.85 * mean(errors(PAPER, "vq.d8.k256.r256"))
    weighted = replace(PAPER, weighting="conditional")
    assert mean(errors(weighted, "vq.d4.k256")) < mean(errors(PAPER, "vq.d4.k256"))


def test_vectors_along_the_input_are_as_good(errors: Errors) -> None:
    for text in ("vq.d4.k256", "vq.d8.k256.r256"):
        along, across = (mean(errors(FAST, f"{text}{axis}.rn")) for axis in (".in", ""))
        assert 0.9 * across < along < 1.15 * across


def test_feedback_beats_weighted_beats_unweighted_kmeans(real_matrices: Cases) -> None:
    found = {"feedback": 0.0, "weighted": 0.0, "unweighted": 0.0}
    for name in ("3.q", "14.o"):
        weight, stats = real_matrices[name]
        weighted = PAPER.quantize(weight, parse_format("vq.d4.k256"), stats)
        found["feedback"] += weighted.proxy_error
        found["weighted"] += weighted.rtn_error
        plain = replace(PAPER, weighting="none").quantize(weight, parse_format("vq.d4.k256"), stats)
        found["unweighted"] += plain.rtn_error
    assert found["feedback"] < found["weighted"] < found["unweighted"]


def test_longer_vectors_at_two_bits_are_better(errors: Errors) -> None:
    """The books grow with the vectors, so this is a statement about index bits only."""
    ladder = [mean(errors(FAST, text, ("3.q",))) for text in ("vq.d2.k16", "vq.d4.k256", "vq.d6.k4096")]
    assert ladder[0] > ladder[1] > ladder[2]


def test_a_residual_book_halves_the_error(errors: Errors) -> None:
    assert mean(errors(FAST, "vq.d8.k256.r256")) < 0.5 * mean(errors(FAST, "vq.d8.k256"))


def test_outliers_with_three_bits_lower_the_error(errors: Errors) -> None:
    plain = mean(errors(FAST, "vq.d4.k256"))
    for percent in (2, 5):
        assert mean(errors(FAST, f"vq.d4.k256.o{percent}pv4k1024")) < plain


def loop_error(weight: Tensor, stats: LayerStats, problem: Problem, text: str, order: Tensor) -> float:
    """Error of the column loop on `problem`, with books by k-means weighted with its Hessian's diagonal."""
    fmt = vector_format(text)
    (part,) = make_parts(fmt, *weight.shape)
    cost = problem.hessian.diagonal().repeat_interleave(part.vectors)[:, None]
    book = kmeans(problem.target.reshape(-1, part.dim), cost, fmt.centroids, 8, 0.0, 0).book
    solution, _ = feedback(problem, (replace(part, books=(book.half().float(),)),), 128, 1)
    q = to_vqtensor(solution, fmt, order, weight.shape[0], make_norm(weight, fmt))
    return proxy_error(weight, q.dequantize(), stats.hessian)


def test_a_factor_reordered_after_factoring_is_worse(real_matrices: Cases) -> None:
    right, wrong = 0.0, 0.0
    for name in ("3.q", "14.o"):
        weight, stats = real_matrices[name]
        order = prepared_of(stats).order
        problem = make_problem(weight, vector_format("vq.d4.k256"), None, prepared_of(stats))
        right += loop_error(weight, stats, problem, "vq.d4.k256", order)
        back = torch.argsort(order)
        upper, hessian = problem.upper[back][:, back].triu(), problem.hessian[back][:, back]
        natural = Problem(problem.target[back].contiguous(), hessian, upper, None)
        wrong += loop_error(weight, stats, natural, "vq.d4.k256", torch.arange(len(order)))
    assert wrong > 1.3 * right


def test_a_norm_that_is_not_folded_into_the_hessian_is_worse(real_matrices: Cases) -> None:
    folded, forgotten = 0.0, 0.0
    fmt = vector_format("vq.d4.k256.cn")
    for name in ("3.q", "14.o"):
        weight, stats = real_matrices[name]
        prepared = prepared_of(stats)
        problem = make_problem(weight, fmt, make_norm(weight, fmt), prepared)
        plain = make_problem(weight, vector_format("vq.d4.k256"), None, prepared)
        folded += loop_error(weight, stats, problem, str(fmt), prepared.order)
        wrong = replace(problem, hessian=plain.hessian, upper=plain.upper)
        forgotten += loop_error(weight, stats, wrong, str(fmt), prepared.order)
    assert forgotten > 1.05 * folded
