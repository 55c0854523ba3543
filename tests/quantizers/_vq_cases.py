"""Small random problems for the tests of vector quantization."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.factor import Prepared, prepare
from lowbit.quantizers.formats import VectorFormat, parse_format
from lowbit.quantizers.methods.vptq.kmeans import kmeans
from lowbit.quantizers.methods.vptq.layout import make_norm, make_parts, make_problem
from lowbit.quantizers.methods.vptq.problem import Part, Problem

__all__ = ["correlated_stats", "prepared_of", "problem_of", "random_weight", "vector_format", "with_books"]


def correlated_stats(k: int, seed: int = 0, tokens: int = 400, spread: float = 1.0) -> LayerStats:
    """Statistics of correlated inputs whose channels differ in size."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=rng) / k**0.5 + torch.eye(k)
    size = torch.exp(spread * torch.randn(k, generator=rng))
    x = (torch.randn(tokens, k, generator=rng) @ mix * size).double()
    return LayerStats(x.T @ x / tokens, tokens)


def random_weight(n: int, k: int, seed: int = 0) -> Tensor:
    """Gaussian weights [n, k]."""
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def vector_format(text: str) -> VectorFormat:
    """A vector format by its text."""
    fmt = parse_format(text)
    assert isinstance(fmt, VectorFormat)
    return fmt


def prepared_of(stats: LayerStats) -> Prepared:
    """The Hessian of `stats`, damped by 1 percent and factored."""
    prepared = prepare(stats, 0.01, act_order=True)
    assert prepared is not None
    return prepared


def problem_of(weight: Tensor, text: str, stats: LayerStats) -> Problem:
    """The problem of quantizing `weight` into a format."""
    fmt = vector_format(text)
    return make_problem(weight, fmt, make_norm(weight, fmt), prepared_of(stats))


def with_books(problem: Problem, text: str, n: int, iterations: int = 4) -> tuple[Part, ...]:
    """The parts of a format, with books by unweighted k-means of the target (and of what it leaves)."""
    fmt, out = vector_format(text), []
    for part in make_parts(fmt, n, len(problem.target)):
        x = part.cells(problem.target)
        own = fmt.outliers is not None and part.start == 0
        sizes = (
            [fmt.outliers.centroids]
            if own and fmt.outliers
            else [fmt.centroids, *([fmt.residual] * bool(fmt.residual))]
        )
        books = []
        for size in sizes:
            found = kmeans(x, torch.ones(len(x), 1), size, iterations, 0.0, 0)
            books.append(found.book)
            x = x - found.book[found.index]
        out.append(replace(part, books=tuple(books)))
    return tuple(out)
