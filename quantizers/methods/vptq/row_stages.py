"""The stages of `stages` for vectors along the input: runs of `dim` columns, the same for every row of the weight.

A vector's elements meet different inputs, so its nearest centroid is that of a metric: (x - c) M (x - c)^T, where M is
a block of the Hessian, or what is left of it once later columns make up for the error. With M = T T^T that is the plain
nearest one after x and the codebook are multiplied by T, which all rows share. The update is GPTQ's for a run of
columns, as in "GPTVQ: The Blessing of Dimensionality for LLM Quantization" (van Baalen et al.).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.quantizers.methods.vptq.problem import Part, PartSearch, Problem, Solution

__all__ = ["assign", "descend", "diagonal_blocks", "feedback", "inverse_blocks"]


def diagonal_blocks(matrix: Tensor, dim: int) -> Tensor:
    """[K / dim, dim, dim]: the blocks on the diagonal of a matrix [K, K]."""
    runs = len(matrix) // dim
    return matrix.view(runs, dim, runs, dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def inverse_blocks(upper: Tensor, dim: int) -> Tensor:
    """T [K / dim, dim, dim] of the metric that holds while later columns make up for errors: of the upper triangular
    factor U of the inverse Hessian, the inverses of the diagonal blocks."""
    blocks, eye = diagonal_blocks(upper, dim).double(), torch.eye(dim, dtype=torch.float64)
    inverse: Tensor = torch.linalg.solve_triangular(blocks, eye, upper=True)
    return inverse.float()


def _search(part: Part, turn: Tensor, beam: int) -> PartSearch:
    """Nearest centroids of one run of columns for vectors that were multiplied by `turn`."""
    return PartSearch(replace(part, books=tuple(book @ turn for book in part.books), axis="out"), None, beam)


def _roots(problem: Problem, dim: int) -> Tensor:
    """T of the blocks of the Hessian itself: what an error costs while all other columns stay."""
    roots: Tensor = torch.linalg.cholesky(diagonal_blocks(problem.hessian, dim).double())
    return roots.float()


def _only(parts: tuple[Part, ...]) -> Part:
    (part,) = parts
    return part


def _run(part: Part, found: tuple[Tensor, ...]) -> Tensor:
    """Values [dim, P] of the indices [P] into each book."""
    return part.decode(tuple(index[None] for index in found))


def assign(problem: Problem, parts: tuple[Part, ...], beam: int) -> Solution:
    """The centroids nearest to the target itself, in terms of the Hessian's own blocks."""
    part = _only(parts)
    indices = tuple(torch.empty(part.slots, dtype=torch.int64) for _ in part.books)
    for i, turn in enumerate(_roots(problem, part.dim)):
        x = problem.target[i * part.dim : (i + 1) * part.dim].T @ turn
        for slot, index in zip(indices, _search(part, turn, beam)(x.reshape(-1))[0], strict=True):
            slot[i] = index
    return Solution(parts, (indices,))


def feedback(problem: Problem, parts: tuple[Part, ...], block: int, beam: int) -> tuple[Solution, Tensor]:
    """As `stages.feedback`, a run of columns at a time."""
    if bool(problem.upper.tril(-1).any()):
        raise ValueError("the factor of the inverse Hessian must be upper triangular")
    part, upper, left = _only(parts), problem.upper, problem.target.clone()
    dim, (k, p) = part.dim, left.shape
    indices = tuple(torch.empty(part.slots, dtype=torch.int64) for _ in part.books)
    turns = inverse_blocks(upper, dim)
    width = max(1, block // dim) * dim
    for start in range(0, k, width):
        stop = min(start + width, k)
        errors = torch.zeros(stop - start, p)
        for c in range(start, stop, dim):
            turn, own = turns[c // dim], left[c : c + dim]
            found, _ = _search(part, turn, beam)((own.T @ turn).reshape(-1))
            for slot, index in zip(indices, found, strict=True):
                slot[c // dim] = index
            error = errors[c - start : c - start + dim]
            torch.matmul(turn.T, own - _run(part, found), out=error)
            left[c + dim : stop].addmm_(upper[c : c + dim, c + dim : stop].T, error, alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return Solution(parts, (indices,)), left


def descend(problem: Problem, solution: Solution, block: int, beam: int, sweeps: int) -> Solution:
    """As `stages.descend`: every vector in turn gets its best centroid given all other columns."""
    part, hessian = _only(solution.parts), problem.hessian
    dim, (k, p) = part.dim, problem.target.shape
    indices = tuple(i.clone() for i in solution.indices[0])
    current, roots = solution.decode(k, p), _roots(problem, dim)
    before, width = problem.loss(current), max(1, block // dim) * dim
    gradient = hessian @ (current - problem.target)
    for start in (s for _ in range(sweeps) for s in range(0, k, width)):
        stop = min(start + width, k)
        old, local = current[start:stop].clone(), gradient[start:stop].clone()
        for c in range(start, stop, dim):
            run, turn, pull = c // dim, roots[c // dim], local[c - start : c - start + dim]
            own = current[c : c + dim]
            aim = ((own - torch.cholesky_solve(pull, turn)).T @ turn).reshape(-1)
            present = tuple(slot[run] for slot in indices)
            found, _ = _search(part, turn, beam).improve(aim, present, (own.T @ turn).reshape(-1))
            for slot, index in zip(indices, found, strict=True):
                slot[run] = index
            value = _run(part, found)
            step = value - own
            own.copy_(value)
            local[c + dim - start :].addmm_(hessian[c + dim : stop, c : c + dim], step)
        gradient.addmm_(hessian[:, start:stop], current[start:stop] - old)
    found_solution = Solution(solution.parts, (indices,))
    return found_solution if problem.loss(found_solution.decode(k, p)) <= before else solution
