"""Weighted k-means: what it lowers, what weights mean, and that it repeats itself to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from lowbit.quantizers.methods.vptq.kmeans import SearchTable, kmeans, spread_points


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def points(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_inertia_never_rises_with_iterations() -> None:
    x, weight = points(400, 3), points(400, 1, 1).exp()
    inertia = [kmeans(x, weight, 16, i, 0.0, 0).inertia for i in range(12)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(inertia))
    assert inertia[-1] < 0.9 * inertia[0]


def test_a_weight_counts_like_repetition() -> None:
    x, counts = points(100, 2), torch.randint(1, 5, (100,), generator=torch.Generator().manual_seed(2))
    start = x[:8].clone()
    weighted = kmeans(x, counts[:, None].float(), 8, 10, 0.0, 0, start)
    repeated = kmeans(x.repeat_interleave(counts, 0), torch.ones(int(counts.sum()), 1), 8, 10, 0.0, 0, start)
    assert torch.allclose(weighted.book, repeated.book, atol=1e-6)
    assert weighted.inertia == pytest.approx(repeated.inertia)


def test_equal_element_weights_are_one_weight() -> None:
    x, weight, start = points(200, 4), points(200, 1, 1).exp(), points(16, 4, 2)
    one, each = (kmeans(x, w, 16, 6, 0.0, 0, start) for w in (weight, weight.expand(-1, 4).contiguous()))
    assert torch.allclose(one.book, each.book, atol=1e-5)


def test_elements_without_weight_do_not_count() -> None:
    """The last element of half the vectors is padding: their centroids are the means of the real elements."""
    x = torch.tensor([[1.0, 5.0], [1.0, 0.0], [-1.0, -5.0], [-1.0, 0.0]])
    weight = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    found = kmeans(x, weight, 2, 5, 0.0, 0, torch.tensor([[0.5, 0.1], [-0.5, -0.1]]))
    assert found.book.tolist() == [[1.0, 5.0], [-1.0, -5.0]]
    assert found.index.tolist() == [0, 0, 1, 1]
    assert found.inertia == 0.0


def test_empty_clusters_keep_their_centroid() -> None:
    x, far = points(50, 2), torch.tensor([[100.0, 100.0]])
    found = kmeans(x, torch.ones(50, 1), 3, 5, 0.0, 0, torch.cat([far, x[:2]]))
    assert torch.equal(found.book[:1], far)


def test_ties_go_to_the_lowest_index() -> None:
    book = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert SearchTable(book, False).nearest(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), None).tolist() == [0, 1]


def test_search_in_pieces_finds_the_same() -> None:
    book, x = points(4096, 3), points(1000, 3, 1)
    expected = torch.cdist(x.double(), book.double()).argmin(1)
    found = SearchTable(book, False).nearest(x, None)
    assert (found == expected).float().mean() > 0.999


def test_more_centroids_than_vectors_reproduce_them() -> None:
    x = points(5, 4)
    found = kmeans(x, torch.ones(5, 1), 8, 3, 0.0, 0)
    assert torch.equal(found.book[found.index], x)


def test_spread_points_cover_separate_clusters() -> None:
    centers = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    x = (centers[:, None] + 0.1 * points(200, 2).view(4, 50, 2)).view(-1, 2)
    for seed in range(5):
        drawn = spread_points(x, torch.ones(len(x), 1), 4, seed)
        assert torch.cdist(drawn, centers).argmin(1).sort().values.tolist() == [0, 1, 2, 3]


def test_spread_points_beat_random_ones() -> None:
    x, weight = points(2000, 4).sinh(), torch.ones(2000, 1)
    for seed in range(3):
        some = x[torch.randperm(2000, generator=torch.Generator().manual_seed(seed))[:64]]
        assert kmeans(x, weight, 64, 5, 0.0, seed).inertia < kmeans(x, weight, 64, 5, 0.0, seed, some).inertia


@pytest.mark.usefixtures("threads")
def test_same_bits_for_any_number_of_threads() -> None:
    x, weight = points(40_000, 4), points(40_000, 1, 1).exp()
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(kmeans(x, weight, 64, 4, 0.0, 3))
    assert all(torch.equal(f.book, found[0].book) and torch.equal(f.index, found[0].index) for f in found)
    assert len({f.inertia for f in found}) == 1
