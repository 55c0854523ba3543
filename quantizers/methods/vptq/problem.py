"""What VPTQ minimises, and the state of a solution: books, indices and the matrix they decode to.

Matrices are transposed and in processing order: a row is an input column of the weight, so that its vectors lie one
after the other. Each row of the weight matrix counts with a weight of its own (see `Problem.rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lowbit.quantizers.methods.vptq.kmeans import SearchTable, ordered_sum

__all__ = ["Part", "PartSearch", "Problem", "Solution"]

_SCORES = 1 << 24  # distances held at a time: 64 MB


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise sum over r of rows[r] * D_r H D_r^T, D = quantized - target.

    target [K, P]: the transposed weight, rows (of the weight) padded with zeros to P. hessian [K, K], damped; upper
    [K, K] with upper^T upper = hessian^-1, upper triangular. rows [P]: 0 for padding; None when all count the same.
    """

    target: Tensor
    hessian: Tensor
    upper: Tensor
    rows: Tensor | None

    def loss(self, current: Tensor) -> float:
        """The objective of a quantized matrix [K, P]."""
        delta = current - self.target
        pulled = (self.hessian @ delta).double() * delta.double()
        return ordered_sum((pulled if self.rows is None else pulled * self.rows).sum(1))


@dataclass(frozen=True, eq=False)
class Part:
    """Columns start..stop of the processing order, with codebooks of their own: one, or two that are added up.

    dim: vector length; vectors: number of vectors a column is cut into. Vectors along the input (axis `in`) are `dim`
    neighbouring columns of one row of the weight; `vectors` is then the number of those rows.
    """

    start: int
    stop: int
    dim: int
    vectors: int
    books: tuple[Tensor, ...]
    axis: Literal["out", "in"] = "out"

    @property
    def length(self) -> int:
        """Elements of a column that belong to vectors."""
        return self.vectors if self.axis == "in" else self.dim * self.vectors

    @property
    def slots(self) -> tuple[int, int]:
        """Shape of the indices: columns, or runs of `dim` of them, by vectors."""
        columns = self.stop - self.start
        return (columns // self.dim if self.axis == "in" else columns, self.vectors)

    def cells(self, values: Tensor) -> Tensor:
        """This part's vectors [count, dim] of a matrix [K, P], in the order of the indices."""
        own = values[self.start : self.stop, : self.length]
        if self.axis == "in":
            own = own.reshape(-1, self.dim, self.vectors).transpose(1, 2)
        return own.reshape(-1, self.dim)

    def element_weights(self, rows: Tensor | None) -> Tensor | None:
        """`rows` cut into vectors [vectors, dim]."""
        return None if rows is None else rows[: self.length].view(self.vectors, self.dim)

    def decode(self, indices: tuple[Tensor, ...], books: tuple[Tensor, ...] | None = None) -> Tensor:
        """Values [columns, length] of indices `slots`, one tensor of them per book."""
        books = books if books is not None else self.books
        total = books[0][indices[0]]
        for index, book in zip(indices[1:], books[1:], strict=True):
            total = total + book[index]
        return total.transpose(1, 2).flatten(0, 1) if self.axis == "in" else total.flatten(1)


class PartSearch:
    """Nearest centroids, or sums of two, for the columns of one part.

    beam: first-stage centroids tried with every residual centroid; 1 is the greedy choice of one after the other.
    """

    def __init__(self, part: Part, rows: Tensor | None, beam: int) -> None:
        self._books, self._shape = part.books, (part.vectors, part.dim)
        self._tables = [SearchTable(book, rows is not None) for book in part.books]
        self._beam = min(beam, len(part.books[0]))
        self._weights = part.element_weights(rows)

    def __call__(self, column: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Indices [vectors] into each book, and the values [vectors * dim], for a column [vectors * dim]."""
        x = column.view(self._shape)
        if len(self._tables) == 1:
            index = self._tables[0].nearest(x, self._weights)
            return (index,), self._books[0][index].view(-1)
        first, second = self._joint_split(x)
        return (first, second), (self._books[0][first] + self._books[1][second]).view(-1)

    def improve(self, column: Tensor, indices: tuple[Tensor, ...], value: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Like a call, but a vector keeps its present indices and value where the search finds nothing nearer."""
        found, new = self(column)
        if len(indices) == 1:  # that search is exact
            return found, new
        before, after = (self._distance(column, v) for v in (value, new))
        keep = before <= after
        mixed = torch.where(keep[:, None], value.view(self._shape), new.view(self._shape)).view(-1)
        return tuple(torch.where(keep, i, j) for i, j in zip(indices, found, strict=True)), mixed

    def _distance(self, column: Tensor, value: Tensor) -> Tensor:
        squares = (column - value).square_().view(self._shape)
        return (squares if self._weights is None else squares * self._weights).sum(1)

    def _joint_split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`_joint`, a bounded number of distances at a time."""
        rows = max(1, _SCORES // len(self._books[0]))
        if len(x) <= rows:
            return self._joint(x, self._weights)
        weights = [None] * -(-len(x) // rows) if self._weights is None else self._weights.split(rows)
        found = [self._joint(piece, weight) for piece, weight in zip(x.split(rows), weights, strict=True)]
        return torch.cat([f for f, _ in found]), torch.cat([s for _, s in found])

    def _joint(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """The best pair among the `beam` first-stage centroids nearest to each vector, and all residual ones."""
        table, rest = self._tables
        if self._beam == 1:
            first = table.nearest(x, weights)
            return first, rest.nearest(x - table.book[first], weights)
        lowest, candidates = table.scores(x, weights).topk(self._beam, 1, largest=False)
        left = (x[:, None] - table.book[candidates]).flatten(0, 1)
        repeated = None if weights is None else weights.repeat_interleave(self._beam, 0)
        second, value = rest.nearest_score(left, repeated)
        pick = (lowest + value.view(-1, self._beam)).argmin(1, keepdim=True)
        return candidates.gather(1, pick)[:, 0], second.view(-1, self._beam).gather(1, pick)[:, 0]


@dataclass(frozen=True, eq=False)
class Solution:
    """Parts with their books, and per part the indices [columns, vectors] into each book."""

    parts: tuple[Part, ...]
    indices: tuple[tuple[Tensor, ...], ...]

    def decode(self, columns: int, length: int, books: list[tuple[Tensor, ...]] | None = None) -> Tensor:
        """The quantized matrix [columns, length]; zero where there are no vectors."""
        out = torch.zeros(columns, length)
        for i, (part, index) in enumerate(zip(self.parts, self.indices, strict=True)):
            out[part.start : part.stop, : part.length] = part.decode(index, books[i] if books else None)
        return out

    def with_books(self, books: list[tuple[Tensor, ...]]) -> Solution:
        """The same indices into other books."""
        parts = tuple(replace(part, books=b) for part, b in zip(self.parts, books, strict=True))
        return Solution(parts, self.indices)
