"""One matrix on its way through VPTQ: books by k-means, the column loop with re-fitted books, and refinement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lowbit.compiler.errors import RunError
from lowbit.quantizers.codebooks import store_books
from lowbit.quantizers.factor import Prepared
from lowbit.quantizers.formats import VectorFormat
from lowbit.quantizers.methods.vptq import row_stages, stages
from lowbit.quantizers.methods.vptq.kmeans import kmeans
from lowbit.quantizers.methods.vptq.layout import make_norm, make_parts, make_problem, to_vqtensor
from lowbit.quantizers.methods.vptq.norms import fit_row_norm
from lowbit.quantizers.methods.vptq.problem import Part, Solution
from lowbit.quantizers.methods.vptq.stages import fit_books
from lowbit.quantizers.vqtensor import VQTensor

__all__ = ["Settings", "Solver", "Weighting"]

Weighting: TypeAlias = Literal["none", "diagonal", "conditional"]

_RESTART_ITERATIONS = 3  # of k-means, each time the books are re-fitted to the columns as compensated
_FIT_STEPS = 6  # of conjugate gradients per round of refinement
_SAMPLES_PER_CENTROID = 16  # that k-means looks at, at least


@dataclass(frozen=True)
class Settings:
    """Numbers the stages need; see `Vptq` for what they mean."""

    block: int
    iterations: int
    tolerance: float
    seed: int
    sample: int
    weighting: Weighting
    restarts: int
    refit: int
    beam: int


class Solver:
    """The problem of quantizing `weight` [N, K] into `fmt`, and the stages applied to it.

    Raises RunError (LB0512) for weights that codebooks of the format's type cannot hold.
    """

    def __init__(self, settings: Settings, weight: Tensor, fmt: VectorFormat, prepared: Prepared | None) -> None:
        largest = torch.finfo(fmt.scale_dtype).max
        if weight.numel() and float(weight.abs().max()) > largest:
            raise RunError(
                "LB0512",
                f"a weight of {float(weight.abs().max()):.3g} does not fit {fmt.table} (at most {largest:.3g})",
                hint=f"use f32 codebooks: {replace(fmt, table='f32')}",
            )
        self._settings, self._fmt, self._shape = settings, fmt, weight.shape
        self._norm = make_norm(weight, fmt)
        self._order = torch.arange(weight.shape[1]) if prepared is None else prepared.order
        self.problem = make_problem(weight, fmt, self._norm, prepared)
        self._cost = self._column_cost()
        rows = fmt.axis == "in"
        self._assign = row_stages.assign if rows else stages.assign
        self._feedback = row_stages.feedback if rows else stages.feedback
        self._descend = row_stages.descend if rows else stages.descend

    def stored(self, solution: Solution) -> VQTensor:
        """The solution as it is stored."""
        return to_vqtensor(solution, self._fmt, self._order, self._shape[0], self._norm)

    def plain(self) -> Solution:
        """Weighted k-means of the weights themselves, each vector at its nearest centroid: no feedback."""
        parts = tuple(self._with_books(part, self.problem.target) for part in make_parts(self._fmt, *self._shape))
        return self._assign(self.problem, parts, self._settings.beam)

    def loop(self, parts: tuple[Part, ...]) -> Solution:
        """The column loop, then again with books fitted to the columns as they had become; the best of these."""
        s = self._settings
        best, seen = self._feedback(self.problem, parts, s.block, s.beam)
        lowest = self.loss(best)
        for _ in range(s.restarts):
            parts = tuple(self._with_books(part, seen) for part in parts)
            again, seen = self._feedback(self.problem, parts, s.block, s.beam)
            if (loss := self.loss(again)) < lowest:
                best, lowest = again, loss
        return best

    def refine(self, solution: Solution) -> Solution:
        """Rounds of codebook fit, coordinate descent and a fit of row norms, until books and indices stay. Never raises
        the loss."""
        s = self._settings
        for _ in range(s.refit):
            before = solution
            solution = fit_books(self.problem, solution, _FIT_STEPS, self._store)
            solution = self._descend(self.problem, solution, s.block, s.beam, 1)
            if self._norm is not None and self._norm.axis == 0:
                self.problem, self._norm = fit_row_norm(self.problem, solution, self._norm)
            if solution is before:
                break
        return solution

    def loss(self, solution: Solution) -> float:
        """The damped objective."""
        return self.problem.loss(solution.decode(*self.problem.target.shape))

    def _store(self, books: Sequence[Tensor], uses: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(store_books(self._fmt, books, uses))

    def _column_cost(self) -> Tensor:
        """What the squared error of every column counts in k-means: [K] in processing order, mean one."""
        upper = self.problem.upper
        if self._fmt.axis == "in":
            kept = row_stages.inverse_blocks(upper, self._fmt.dim).square().sum(2).flatten()
        else:
            kept = upper.diagonal().square().reciprocal()
        cost = {
            "none": torch.ones(self._shape[1]),
            "diagonal": self.problem.hessian.diagonal(),
            "conditional": kept,
        }[self._settings.weighting]
        return cost / cost.mean()

    def _sizes(self, part: Part) -> tuple[int, ...]:
        fmt = self._fmt
        if fmt.outliers is not None and part.start == 0:
            return (fmt.outliers.centroids,)
        return (fmt.centroids, fmt.residual) if fmt.residual else (fmt.centroids,)

    def _with_books(self, part: Part, columns: Tensor) -> Part:
        """The part with books fitted to its vectors in `columns` [K, P]: new ones, or on from those it has."""
        s, sizes = self._settings, self._sizes(part)
        x, weight = self._sample(part.cells(columns), self._vector_weights(part), max(sizes))
        books: list[Tensor] = []
        uses: list[Tensor] = []
        for stage, size in enumerate(sizes):
            start = part.books[stage] if part.books else None
            count = _RESTART_ITERATIONS if part.books else s.iterations
            found = kmeans(x, weight, size, count, s.tolerance, s.seed + stage, start)
            books.append(found.book)
            uses.append(torch.bincount(found.index, weight.mean(1), size)[:, None])
            x = x - self._store(books[-1:], uses[-1:])[0][found.index]
        return replace(part, books=self._store(books, uses))

    def _vector_weights(self, part: Part) -> Tensor:
        """Of all vectors of a part, column by column: [vectors, 1], or [vectors, dim] when their elements differ."""
        if part.axis == "in":
            ones = torch.ones(self.problem.target.shape[1])
            return part.cells(self._cost[:, None] * (ones if self.problem.rows is None else self.problem.rows))
        cost, elements = self._cost[part.start : part.stop], part.element_weights(self.problem.rows)
        if elements is None:
            return cost.repeat_interleave(part.vectors)[:, None]
        return (cost[:, None, None] * elements).reshape(-1, part.dim)

    def _sample(self, x: Tensor, weight: Tensor, centroids: int) -> tuple[Tensor, Tensor]:
        """Every s-th vector, when there are more than asked for."""
        limit = max(self._settings.sample, _SAMPLES_PER_CENTROID * centroids)
        stride = -(-len(x) // limit) if self._settings.sample else 1
        return (x, weight) if stride <= 1 else (x[::stride].contiguous(), weight[::stride].contiguous())
