"""Weighted k-means that gives the same bits for any number of threads.

Sums over clusters run in the order of the vectors (`bincount`, in float64), ties go to the lowest index, and random
numbers come from a seeded generator, so a codebook depends on its inputs only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Clusters", "SearchTable", "kmeans", "ordered_sum", "spread_points"]

_CHUNK = 1 << 19  # distances computed at a time: 2 MB, which stays in the second-level cache
_ROUNDS = 64  # batches in which the starting points are drawn


@dataclass(frozen=True, eq=False)
class Clusters:
    """A codebook [k, d], the index of every vector's centroid [n], and the weighted squared error (inertia)."""

    book: Tensor
    index: Tensor
    inertia: float


def ordered_sum(values: Tensor) -> float:
    """The sum in float64, added up in order: the same for any number of threads."""
    return float(values.double().flatten().cumsum(0)[-1])


def _features(x: Tensor, weight: Tensor | None) -> Tensor:
    """What a search multiplies a table with: [n, d + 1] without element weights [n, d], else [n, 2 d]."""
    if weight is None:
        out = torch.ones(len(x), x.shape[1] + 1)
        out[:, : x.shape[1]] = x
        return out
    return torch.cat([weight * x, weight], 1)


class SearchTable:
    """A codebook [k, d] prepared for nearest-centroid search under element weights, or none."""

    def __init__(self, book: Tensor, weighted: bool) -> None:
        self.book = book
        squares = book.square()
        self._table = torch.cat([-2 * book, squares if weighted else squares.sum(1, keepdim=True)], 1).T.contiguous()

    def scores(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Squared distances [n, k] of vectors [n, d] to all centroids, less the vectors' own squared norms."""
        return _features(x, weight) @ self._table

    def nearest(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Index [n] of the nearest centroid; the lowest one of equals."""
        return self.search(_features(x, weight))

    def search(self, features: Tensor) -> Tensor:
        """`nearest` for the features of the vectors."""
        rows = max(1, _CHUNK // len(self.book))
        if len(features) <= rows:
            return _argmin(features @ self._table)
        return torch.cat([_argmin(piece @ self._table) for piece in features.split(rows)])

    def nearest_score(self, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """`nearest`, and the scores [n] of those centroids."""
        found = []
        for piece in _features(x, weight).split(max(1, _CHUNK // len(self.book))):
            scores = piece @ self._table
            index = _argmin(scores)
            found.append((index, scores.gather(1, index[:, None])[:, 0]))
        return torch.cat([i for i, _ in found]), torch.cat([s for _, s in found])


def _argmin(scores: Tensor) -> Tensor:
    """Index of each row's lowest score, the first of equals. NumPy's search is ten times as fast as torch's."""
    return torch.from_numpy(np.argmin(scores.numpy(), axis=1))


def kmeans(
    x: Tensor, weight: Tensor, k: int, iterations: int, tolerance: float, seed: int, start: Tensor | None = None
) -> Clusters:
    """Lloyd's algorithm on vectors [n, d] with weights [n, 1], or [n, d] for every element.

    Stops when the inertia falls by less than `tolerance` of itself. Clusters that become empty keep their centroid.
    start: first codebook [k, d]; drawn by `spread_points` when not given.
    """
    book = spread_points(x, weight, k, seed) if start is None else start
    elements = weight if weight.shape[1] > 1 else None
    features = _features(x, elements)
    mass, share = (weight * x).double().T.contiguous(), weight.double().T.contiguous()
    index, inertia = _assign(features, x, weight, book)
    for _ in range(iterations):
        book = _means(mass, share, index, book)
        before = inertia
        index, inertia = _assign(features, x, weight, book)
        if before - inertia <= tolerance * before:
            break
    return Clusters(book, index, inertia)


def _assign(features: Tensor, x: Tensor, weight: Tensor, book: Tensor) -> tuple[Tensor, float]:
    index = SearchTable(book, weight.shape[1] > 1).search(features)
    return index, ordered_sum(((x - book[index]).square() * weight).sum(1))


def _means(mass: Tensor, weight: Tensor, index: Tensor, book: Tensor) -> Tensor:
    """Mean of every cluster, element by element, of float64 weights [1 or d, n] and weighted vectors [d, n]; `book`
    where there is no weight."""
    total, share = (torch.stack([torch.bincount(index, row, len(book)) for row in part], 1) for part in (mass, weight))
    return torch.where(share > 0, (total / share.clamp(min=1e-300)).float(), book)


def spread_points(x: Tensor, weight: Tensor, k: int, seed: int) -> Tensor:
    """k of the vectors [n, d] as a first codebook: drawn in batches, each in proportion to its weighted squared
    distance from those already drawn.

    After "Scalable K-Means++" (Bahmani et al.), with exactly k points. Points run out when there are fewer than k
    different vectors; the rest of the codebook then repeats the first one.
    """
    generator = torch.Generator().manual_seed(seed)
    size, plain = weight.mean(1).double(), _features(x, None)
    chosen = x[_draw(size, 1, generator)]
    distance = (x - chosen[0]).square().sum(1)
    while len(chosen) < k:
        cost = distance * size
        if not bool((cost > 0).any()):
            chosen = torch.cat([chosen, chosen[:1].expand(k - len(chosen), -1)])
            break
        count = min(k - len(chosen), max(1, k // _ROUNDS))
        fresh = x[_draw(cost, count, generator)]
        near = fresh[SearchTable(fresh, False).search(plain)] if count > 1 else fresh
        distance = torch.minimum(distance, (x - near).square().sum(1))
        chosen = torch.cat([chosen, fresh])
    return chosen.clone()


def _draw(cost: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices [count] drawn in proportion to `cost` [n], with replacement, one from each of `count` equal shares."""
    edges = cost.cumsum(0)
    at = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count * edges[-1]
    return torch.searchsorted(edges, at, right=True).clamp_(max=len(cost) - 1)
