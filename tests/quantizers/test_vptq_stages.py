"""The stages of VPTQ against what they must equal, or must never do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from _vq_cases import correlated_stats, prepared_of, problem_of, random_weight, vector_format, with_books

from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import scalar_format
from lowbit.quantizers.methods.grid import Grid
from lowbit.quantizers.methods.sweep import ColumnGrid
from lowbit.quantizers.methods.sweep import feedback as scalar_feedback
from lowbit.quantizers.methods.vptq.layout import make_norm, make_problem, to_vqtensor
from lowbit.quantizers.methods.vptq.problem import Part, PartSearch, Problem, Solution
from lowbit.quantizers.methods.vptq.stages import assign, descend, feedback, fit_books

KINDS = ["vq.d4.k16", "vq.d5.k16", "vq.d4.k16.r8", "vq.d5.k8.r8.rn", "vq.d3.k16.c2.o4v2k16.cn"]


def loss(problem: Problem, solution: Solution) -> float:
    return problem.loss(solution.decode(*problem.target.shape))


def exactly(book: torch.Tensor, use: torch.Tensor) -> torch.Tensor:
    return book


def test_diagonal_hessian_means_no_feedback() -> None:
    weight = random_weight(16, 24)
    stats = LayerStats(torch.diag(torch.arange(1.0, 25.0)), 1)
    problem = problem_of(weight, "vq.d4.k16", stats)
    parts = with_books(problem, "vq.d4.k16", 16)
    plain, (looped, seen) = assign(problem, parts, 1), feedback(problem, parts, 8, 1)
    assert torch.equal(plain.indices[0][0], looped.indices[0][0])
    assert torch.equal(seen, problem.target)


def test_vectors_of_one_with_a_uniform_book_are_gptq() -> None:
    """The same order, damping and levels: the same integers."""
    weight, stats = random_weight(24, 64), correlated_stats(64)
    prepared, fmt = prepared_of(stats), scalar_format("int3.t.sym.f32")
    grid = Grid(fmt, torch.full((1, 1), 0.03), None)
    expected = scalar_feedback(weight, ColumnGrid.of(grid, weight.shape), prepared.upper, prepared.order, 16)
    problem = problem_of(weight, "vq.d1.k8", stats)
    book = fmt.element.levels().float()[:, None] * 0.03
    solution, _ = feedback(problem, (Part(0, 64, 1, 24, (book,)),), 16, 1)
    found = to_vqtensor(solution, vector_format("vq.d1.k8"), prepared.order, 24, None).indices
    assert torch.equal(found, expected.to(torch.int32))


def test_the_factor_is_of_the_inverse() -> None:
    for text in ("vq.d4.k16", "vq.d4.k16.cn"):
        problem = problem_of(random_weight(16, 64), text, correlated_stats(64))
        identity = problem.upper.double().T @ problem.upper.double() @ problem.hessian.double()
        assert float((identity - torch.eye(64)).abs().max()) < 1e-4


def test_factors_in_another_order_are_refused() -> None:
    problem = problem_of(random_weight(16, 32), "vq.d4.k16", correlated_stats(32))
    mixed = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    wrong = replace(problem, upper=problem.upper[mixed][:, mixed])
    with pytest.raises(ValueError, match="upper triangular"):
        feedback(wrong, with_books(problem, "vq.d4.k16", 16), 8, 1)


@pytest.mark.parametrize("text", ["vq.d4.k16", "vq.d5.k16", "vq.d4.k16.cn", "vq.d4.k16.rn", "vq.d3.k16.c2.o4v2k16.cn"])
def test_the_objective_is_that_of_the_weights_themselves(text: str) -> None:
    """Norms are folded into the Hessian or into the weights of rows, and padding counts nothing."""
    weight, stats, fmt = random_weight(22, 32) + 0.02, correlated_stats(32), vector_format(f"{text}.f32")
    prepared, norm = prepared_of(stats), make_norm(weight, fmt)
    problem = make_problem(weight, fmt, norm, prepared)
    solution, _ = feedback(problem, with_books(problem, text, 22), 8, 1)
    delta = (to_vqtensor(solution, fmt, prepared.order, 22, norm).dequantize() - weight).double()
    expected = float(((delta @ prepared.damped.double()) * delta).sum())
    unit = float(norm.scale.square().mean()) if norm is not None and norm.axis == 0 else 1.0
    assert loss(problem, solution) * unit == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("text", KINDS)
def test_the_block_size_changes_nothing_but_rounding(text: str) -> None:
    weight, stats = random_weight(22, 48), correlated_stats(48)
    problem = problem_of(weight, text, stats)
    parts = with_books(problem, text, 22)
    losses = [loss(problem, feedback(problem, parts, block, 8)[0]) for block in (1, 7, 48, 500)]
    assert max(losses) < 1.05 * min(losses)
    assert max(losses) < 0.95 * loss(problem, assign(problem, parts, 8))


@pytest.mark.parametrize("text", KINDS)
def test_descent_and_fit_never_raise_the_loss(text: str) -> None:
    problem = problem_of(random_weight(22, 48), text, correlated_stats(48))
    solution, _ = feedback(problem, with_books(problem, text, 22), 16, 8)
    losses = [loss(problem, solution)]
    for _ in range(3):
        solution = fit_books(problem, solution, 5, exactly)
        losses.append(loss(problem, solution))
        solution = descend(problem, solution, 16, 8, 1)
        losses.append(loss(problem, solution))
    assert all(b <= a for a, b in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.95 * losses[0]


def test_descent_ends_where_no_single_vector_can_improve() -> None:
    problem = problem_of(random_weight(8, 12), "vq.d4.k8", correlated_stats(12))
    parts = with_books(problem, "vq.d4.k8", 8)
    solution = descend(problem, assign(problem, parts, 1), 5, 1, 50)
    lowest, index = loss(problem, solution), solution.indices[0][0]
    for column, vector, other in itertools.product(range(12), range(2), range(8)):
        changed = index.clone()
        changed[column, vector] = other
        assert loss(problem, Solution(parts, ((changed,),))) >= lowest * (1 - 1e-5)


def test_descent_keeps_pairs_that_a_narrow_search_would_lose() -> None:
    problem = problem_of(random_weight(16, 32), "vq.d4.k16.r16", correlated_stats(32))
    parts = with_books(problem, "vq.d4.k16.r16", 16)
    good = descend(problem, feedback(problem, parts, 8, 16)[0], 8, 16, 4)
    assert loss(problem, descend(problem, good, 8, 1, 1)) <= loss(problem, good)


@pytest.mark.parametrize("text", ["vq.d4.k8", "vq.d5.k8", "vq.d4.k8.r4", "vq.d4.k8.rn", "vq.d4.k8.c2"])
def test_fitted_books_solve_the_normal_equations(text: str) -> None:
    """Against least squares with one unknown per element of every book."""
    problem = problem_of(random_weight(14, 20), text, correlated_stats(20))
    solution, _ = feedback(problem, with_books(problem, text, 14), 8, 4)
    fitted = fit_books(problem, solution, 300, exactly)
    k, p = problem.target.shape
    root = torch.linalg.cholesky(problem.hessian.double()).T
    rows = torch.ones(p).double() if problem.rows is None else problem.rows.double()

    def pulled(x: torch.Tensor) -> torch.Tensor:
        return ((root @ x.double()) * rows.sqrt()).flatten()

    flat = torch.cat([b.flatten() for part in solution.parts for b in part.books])
    columns = []
    for i in range(len(flat)):
        unit = torch.zeros(len(flat))
        unit[i] = 1
        books, at = [], 0
        for part in solution.parts:
            own = []
            for b in part.books:
                own.append(unit[at : at + b.numel()].view_as(b))
                at += b.numel()
            books.append(tuple(own))
        columns.append(pulled(solution.decode(k, p, books)))
    matrix, target = torch.stack(columns, 1), pulled(problem.target)
    best = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution
    lowest = float((matrix @ best - target[:, None]).square().sum())
    assert loss(problem, fitted) == pytest.approx(lowest, rel=1e-3)
    assert lowest < loss(problem, solution)


def test_books_are_stored_values() -> None:
    problem = problem_of(random_weight(16, 32), "vq.d4.k8", correlated_stats(32))
    solution, _ = feedback(problem, with_books(problem, "vq.d4.k8", 16), 8, 1)
    fitted = fit_books(problem, solution, 10, lambda books, _: tuple(b.bfloat16().float() for b in books))
    assert fitted is not solution
    book = fitted.parts[0].books[0]
    assert torch.equal(book, book.bfloat16().float())
    # Books so coarse that they are worse than before are not taken.
    assert fit_books(problem, solution, 10, lambda books, _: tuple(b.round() for b in books)) is solution


def pair_cost(part: Part, column: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Distance [vectors] to the nearest of all sums of two centroids, by trying every one."""
    sums = (part.books[0][:, None] + part.books[1]).reshape(-1, part.dim)
    squares = (column.view(-1, 1, part.dim) - sums).square()
    return (squares if rows is None else squares * rows.view(-1, 1, part.dim)).sum(2).amin(1)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_full_beam_is_the_exact_joint_search(weighted: bool) -> None:
    rng = torch.Generator().manual_seed(5)
    books = (torch.randn(16, 4, generator=rng), torch.randn(8, 4, generator=rng) * 0.7)
    part, column = Part(0, 1, 4, 200, books), torch.randn(800, generator=rng) * 1.5
    rows = torch.rand(800, generator=rng) + 0.1 if weighted else None
    best = pair_cost(part, column, rows)

    def cost(beam: int) -> torch.Tensor:
        (first, second), value = PartSearch(part, rows, beam)(column)
        assert torch.equal(value, (books[0][first] + books[1][second]).flatten())
        squares = (column - value).square()
        return (squares if rows is None else squares * rows).view(-1, 4).sum(1)

    assert torch.allclose(cost(16), best, atol=1e-5)
    totals = [float(cost(beam).sum()) for beam in (1, 2, 4, 16)]
    assert all(b <= a for a, b in itertools.pairwise(totals))
    assert totals[0] > 1.05 * totals[-1]
