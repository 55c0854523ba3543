"""Vectors along the input in VPTQ: the stages against brute force, and what they must never do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from _vq_cases import correlated_stats, random_weight, vector_format, with_books
from torch import Tensor

from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.factor import Prepared, prepare
from lowbit.quantizers.methods import Vptq
from lowbit.quantizers.methods.vptq import stages
from lowbit.quantizers.methods.vptq.layout import Norm, make_norm, make_problem, to_vqtensor
from lowbit.quantizers.methods.vptq.norms import fit_row_norm
from lowbit.quantizers.methods.vptq.problem import Problem, Solution
from lowbit.quantizers.methods.vptq.row_stages import assign, descend, feedback
from lowbit.quantizers.methods.vptq.stages import fit_books
from lowbit.quantizers.vqtensor import VQTensor

KINDS = ["vq.d4.k16.in", "vq.d4.k16.in.cn", "vq.d4.k16.r8.in.rn"]


def prepared_of(stats: LayerStats, dim: int) -> Prepared:
    prepared = prepare(stats, 0.01, act_order=True, run=dim)
    assert prepared is not None
    return prepared


def problem_of(weight: Tensor, text: str, stats: LayerStats) -> tuple[Problem, Norm | None, Prepared]:
    fmt = vector_format(text)
    prepared, norm = prepared_of(stats, fmt.dim), make_norm(weight, fmt)
    return make_problem(weight, fmt, norm, prepared), norm, prepared


def loss(problem: Problem, solution: Solution) -> float:
    return problem.loss(solution.decode(*problem.target.shape))


def exactly(book: Tensor, use: Tensor) -> Tensor:
    return book


def test_runs_of_columns_stay_together_in_order_of_importance() -> None:
    stats = correlated_stats(48)
    order = prepared_of(stats, 4).order.view(12, 4)
    assert torch.equal(order, order[:, :1] + torch.arange(4))
    assert sorted(order.flatten().tolist()) == list(range(48))
    size = stats.hessian.diagonal()[order].sum(1)
    assert bool((size[:-1] >= size[1:]).all())


def test_vectors_of_one_are_the_same_along_both_axes() -> None:
    weight, stats = random_weight(12, 32), correlated_stats(32)
    problem = problem_of(weight, "vq.d1.k16.in", stats)[0]
    (along,), (across,) = with_books(problem, "vq.d1.k16.in", 12), with_books(problem, "vq.d1.k16", 12)
    rows, columns = feedback(problem, (along,), 8, 1)[0], stages.feedback(problem, (across,), 8, 1)[0]
    assert torch.equal(rows.indices[0][0], columns.indices[0][0])
    assert torch.equal(rows.decode(32, 12), columns.decode(32, 12))


def slow_choice(problem: Problem, book: Tensor, dim: int) -> Tensor:
    """Indices [K / dim, rows]: a run at a time, the centroid with the least loss when all later columns are free, by
    solving for these in float64."""
    hessian, target = problem.hessian.double(), problem.target.double()
    k, rows = target.shape
    fixed = torch.zeros(0, rows, dtype=torch.float64)
    chosen = []
    for start in range(0, k, dim):
        costs = []
        for centroid in book.double():
            delta = torch.cat([fixed, centroid[:, None] - target[start : start + dim]])
            known = hessian[: len(delta), : len(delta)]
            if len(delta) < k:  # what the best errors of the columns that follow leave
                cross, rest = hessian[: len(delta), len(delta) :], hessian[len(delta) :, len(delta) :]
                known = known - cross @ torch.linalg.solve(rest, cross.T)
            costs.append((delta * (known @ delta)).sum(0))
        index = torch.stack(costs).argmin(0)
        chosen.append(index)
        fixed = torch.cat([fixed, book.double()[index].T - target[start : start + dim]])
    return torch.stack(chosen)


@pytest.mark.parametrize("block", [3, 8, 100])
def test_feedback_is_the_best_choice_given_that_later_columns_make_up_for_it(block: int) -> None:
    problem = problem_of(random_weight(10, 24), "vq.d4.k16.in", correlated_stats(24))[0]
    parts = with_books(problem, "vq.d4.k16.in", 10)
    found, _ = feedback(problem, parts, block, 1)
    assert torch.equal(found.indices[0][0], slow_choice(problem, parts[0].books[0], 4))
    assert loss(problem, found) < 0.95 * loss(problem, assign(problem, parts, 1))


def test_a_block_diagonal_hessian_means_no_feedback() -> None:
    mix = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    stats = LayerStats(torch.block_diag(*(mix @ mix.transpose(1, 2))), 1)
    problem = problem_of(random_weight(10, 24), "vq.d4.k16.in", stats)[0]
    parts = with_books(problem, "vq.d4.k16.in", 10)
    looped, seen = feedback(problem, parts, 8, 1)
    assert torch.equal(assign(problem, parts, 1).indices[0][0], looped.indices[0][0])
    assert torch.allclose(seen, problem.target, atol=1e-6)


@pytest.mark.parametrize("text", KINDS)
def test_the_objective_is_that_of_the_weights_themselves(text: str) -> None:
    weight, stats, fmt = random_weight(22, 32) + 0.02, correlated_stats(32), vector_format(f"{text}.f32")
    problem, norm, prepared = problem_of(weight, str(fmt), stats)
    solution, _ = feedback(problem, with_books(problem, text, 22), 8, 4)
    delta = (to_vqtensor(solution, fmt, prepared.order, 22, norm).dequantize() - weight).double()
    expected = float(((delta @ prepared.damped.double()) * delta).sum())
    unit = float(norm.scale.square().mean()) if norm is not None and norm.axis == 0 else 1.0
    assert loss(problem, solution) * unit == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("text", KINDS)
def test_descent_and_fits_never_raise_the_loss(text: str) -> None:
    problem, norm, _ = problem_of(random_weight(22, 48), text, correlated_stats(48))
    solution, _ = feedback(problem, with_books(problem, text, 22), 16, 8)
    losses = [loss(problem, solution)]
    for _ in range(3):
        solution = fit_books(problem, solution, 5, exactly)
        losses.append(loss(problem, solution))
        solution = descend(problem, solution, 16, 8, 1)
        losses.append(loss(problem, solution))
        if norm is not None and norm.axis == 0:
            problem, norm = fit_row_norm(problem, solution, norm)
            losses.append(loss(problem, solution))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.95 * losses[0]


def test_descent_ends_where_no_single_vector_can_improve() -> None:
    problem = problem_of(random_weight(3, 16), "vq.d4.k8.in", correlated_stats(16))[0]
    parts = with_books(problem, "vq.d4.k8.in", 3)
    solution = descend(problem, assign(problem, parts, 1), 5, 1, 50)
    lowest, index = loss(problem, solution), solution.indices[0][0]
    for run, row, other in itertools.product(range(4), range(3), range(8)):
        changed = index.clone()
        changed[run, row] = other
        assert loss(problem, Solution(parts, ((changed,),))) >= lowest * (1 - 1e-5)


def test_row_norms_are_those_of_least_squares() -> None:
    weight, stats, fmt = random_weight(14, 32) + 0.01, correlated_stats(32), vector_format("vq.d4.k8.in.rn.f32")
    problem, norm, prepared = problem_of(weight, str(fmt), stats)
    assert norm is not None
    solution, _ = feedback(problem, with_books(problem, str(fmt), 14), 8, 1)
    fitted, new = fit_row_norm(problem, solution, norm)
    root = torch.linalg.cholesky(prepared.damped.double()).T
    value = to_vqtensor(solution, replace(fmt, norm="none"), prepared.order, 14, None).dequantize().double()
    for row in range(14):
        columns = torch.stack([value[row], torch.ones(32).double()], 1)
        best = torch.linalg.lstsq(root @ columns, (root @ weight[row].double())[:, None]).solution.flatten()
        assert torch.allclose(torch.stack([new.scale[row], new.bias[row]]).double(), best, rtol=1e-4, atol=1e-6)
    assert loss(fitted, solution) < loss(problem, solution)
    assert torch.allclose(make_problem(weight, fmt, new, prepared).target, fitted.target, atol=1e-5)


def test_distinct_vectors_within_the_codebook_are_exact() -> None:
    rng = torch.Generator().manual_seed(0)
    vectors, pick = torch.randn(16, 4, generator=rng).half().float(), torch.randint(0, 16, (12, 10), generator=rng)
    weight = vectors[pick].reshape(12, 40)
    found = Vptq().quantize(weight, vector_format("vq.d4.k16.in"), LayerStats(torch.eye(40), 1))
    assert isinstance(found.qtensor, VQTensor)
    assert torch.equal(found.qtensor.dequantize(), weight)
