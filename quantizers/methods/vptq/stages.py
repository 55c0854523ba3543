"""The stages of VPTQ on matrices in processing order: the column loop, coordinate descent, and the codebook fit.

The column loop is that of "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models" (Liu et
al.): since all elements of a vector belong to one input column, its best centroid is the plain nearest one, and GPTQ's
update makes up for the error in the columns that follow. The other two lower the same objective further and never
raise it: each vector re-chosen given all others, and books that solve the least-squares problem for fixed indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lowbit.quantizers.methods.vptq.kmeans import ordered_sum
from lowbit.quantizers.methods.vptq.problem import Part, PartSearch, Problem, Solution

__all__ = ["assign", "descend", "feedback", "fit_books"]


_CONVERGED = 1e-10  # share of the squared gradient below which float32 products leave only noise


def _empty_indices(parts: tuple[Part, ...]) -> list[tuple[Tensor, ...]]:
    return [tuple(torch.empty(p.slots, dtype=torch.int64) for _ in p.books) for p in parts]


def _column_parts(parts: tuple[Part, ...], columns: int) -> list[int]:
    out = [0] * columns
    for i, part in enumerate(parts):
        out[part.start : part.stop] = [i] * (part.stop - part.start)
    return out


def assign(problem: Problem, parts: tuple[Part, ...], beam: int) -> Solution:
    """The nearest centroids of the target itself."""
    indices = _empty_indices(parts)
    for part, slots in zip(parts, indices, strict=True):
        search = PartSearch(part, problem.rows, beam)
        for c in range(part.start, part.stop):
            for slot, index in zip(slots, search(problem.target[c, : part.length])[0], strict=True):
                slot[c - part.start] = index
    return Solution(parts, tuple(indices))


def feedback(problem: Problem, parts: tuple[Part, ...], block: int, beam: int) -> tuple[Solution, Tensor]:
    """Indices by error feedback along the columns, and the compensated columns [K, P] as they were when chosen.

    block: columns between two updates of all that follow. beam: see `PartSearch`. Raises ValueError for a factor that
    is not upper triangular: one whose columns were re-ordered after factoring, for example.
    """
    if bool(problem.upper.tril(-1).any()):
        raise ValueError("the factor of the inverse Hessian must be upper triangular")
    k, p = problem.target.shape
    left = problem.target.clone()
    searches, of = [PartSearch(part, problem.rows, beam) for part in parts], _column_parts(parts, k)
    indices = _empty_indices(parts)
    upper, diagonal = problem.upper, problem.upper.diagonal().tolist()
    for start in range(0, k, block):
        stop = min(start + block, k)
        errors = torch.zeros(stop - start, p)
        for c in range(start, stop):
            part, length = parts[of[c]], parts[of[c]].length
            found, value = searches[of[c]](left[c, :length])
            for slot, index in zip(indices[of[c]], found, strict=True):
                slot[c - part.start] = index
            error = errors[c - start]
            torch.sub(left[c, :length], value, out=error[:length]).div_(diagonal[c])
            if c + 1 < stop:
                left[c + 1 : stop].addr_(upper[c, c + 1 : stop], error, alpha=-1)
        if stop < k:
            left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return Solution(parts, tuple(indices)), left


def descend(problem: Problem, solution: Solution, block: int, beam: int, sweeps: int) -> Solution:
    """Cyclic coordinate descent over columns: every vector in turn gets its best centroid given all other columns.

    Returns `solution` itself when float32 rounding made things worse.
    """
    k, p = problem.target.shape
    parts, hessian = solution.parts, problem.hessian
    searches, of = [PartSearch(part, problem.rows, beam) for part in parts], _column_parts(parts, k)
    indices = [tuple(i.clone() for i in index) for index in solution.indices]
    current = solution.decode(k, p)
    before = problem.loss(current)
    curvature = hessian.diagonal().tolist()
    gradient = hessian @ (current - problem.target)
    for _ in range(sweeps):
        for start in range(0, k, block):
            stop = min(start + block, k)
            old, local = current[start:stop].clone(), gradient[start:stop].clone()
            for c in range(start, stop):
                part, length = parts[of[c]], parts[of[c]].length
                x = torch.sub(current[c, :length], local[c - start, :length], alpha=1 / curvature[c])
                slots, row = indices[of[c]], c - part.start
                found, value = searches[of[c]].improve(x, tuple(s[row] for s in slots), current[c, :length])
                for slot, index in zip(slots, found, strict=True):
                    slot[row] = index
                step = value - current[c, :length]
                current[c, :length] = value
                if c + 1 < stop:
                    local[c + 1 - start :, :length].addr_(hessian[c, c + 1 : stop], step)
            gradient.addmm_(hessian[:, start:stop], current[start:stop] - old)
    found_loss = problem.loss(current)
    return Solution(parts, tuple(indices)) if found_loss <= before else solution


Store: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]


def fit_books(problem: Problem, solution: Solution, steps: int, store: Store) -> Solution:
    """Books that lower the objective for fixed indices, by preconditioned conjugate gradients on its normal equations.

    store: rounds the books of a part to values that can be stored, given what an error of each element counts by
    itself; the books found are kept when they are better after that.
    """
    k, p = problem.target.shape
    old = [part.books for part in solution.parts]
    current = solution.decode(k, p)
    before = problem.loss(current)
    weight = problem.hessian.diagonal()[:, None].expand(k, p)
    weight = weight if problem.rows is None else weight * problem.rows
    use = _gather(solution, weight)
    scale = [x.reciprocal().nan_to_num_(posinf=0.0) for x in use]

    def pull(delta: Tensor) -> list[Tensor]:
        out = problem.hessian @ delta
        return _gather(solution, out if problem.rows is None else out * problem.rows)

    rest = [-x for x in pull(current - problem.target)]
    found = [book.double() for books in old for book in books]
    ready = [r * s for r, s in zip(rest, scale, strict=True)]
    direction, size = ready, _dot(rest, ready)
    enough = _CONVERGED * size
    for _ in range(steps):
        if size <= enough:
            break
        pulled = pull(solution.decode(k, p, _nest(old, [d.float() for d in direction])))
        length = size / max(_dot(direction, pulled), 1e-300)
        found = [x + length * d for x, d in zip(found, direction, strict=True)]
        rest = [r - length * q for r, q in zip(rest, pulled, strict=True)]
        ready = [r * s for r, s in zip(rest, scale, strict=True)]
        before_size, size = size, _dot(rest, ready)
        direction = [r + size / before_size * d for r, d in zip(ready, direction, strict=True)]
    parts = zip(_nest(old, [x.float() for x in found]), _nest(old, use), strict=True)
    fitted = solution.with_books([store(books, uses) for books, uses in parts])
    return fitted if problem.loss(fitted.decode(k, p)) < before else solution


def _nest(like: list[tuple[Tensor, ...]], flat: list[Tensor]) -> list[tuple[Tensor, ...]]:
    left = iter(flat)
    return [tuple(next(left) for _ in books) for books in like]


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(ordered_sum(x * y) for x, y in zip(a, b, strict=True))


def _gather(solution: Solution, values: Tensor) -> list[Tensor]:
    """For every book float64 [k, dim]: the sum of `values` [K, P] over the places where each centroid is used."""
    out = []
    for part, indices in zip(solution.parts, solution.indices, strict=True):
        cells = part.cells(values).double()
        columns = [cells[:, e].contiguous() for e in range(part.dim)]
        for index, book in zip(indices, part.books, strict=True):
            flat = index.flatten()
            out.append(torch.stack([torch.bincount(flat, column, len(book)) for column in columns], 1))
    return out
