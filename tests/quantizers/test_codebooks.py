"""Codebooks of signed bytes under a scale: rounding, and what quantizers and tuning make of them."""

from __future__ import annotations

import pytest
import torch
from _vq_cases import correlated_stats, random_weight

from lowbit.quantizers.codebooks import TOP_LEVEL, store_books, to_levels
from lowbit.quantizers.formats import VectorFormat, parse_format
from lowbit.quantizers.methods import Vptq
from lowbit.quantizers.tunable import tunable
from lowbit.quantizers.vqtensor import VQTensor

S8 = VectorFormat(4, 32, table="s8")


def book(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03


def test_what_is_stored_is_exact_and_stays_when_it_is_stored_again() -> None:
    values = book(3, 64, 5)
    (levels,), scale = to_levels([values])
    assert levels.dtype == torch.int8
    assert scale.shape == (3,)
    assert int(levels.int().abs().max()) == TOP_LEVEL
    (stored,) = store_books(S8, [values])
    assert torch.equal(stored.double(), levels.double() * scale.double()[:, None, None])
    assert float((stored - values).abs().max()) <= 0.52 * float(values.abs().max()) / TOP_LEVEL
    (again,), same = to_levels([stored])
    assert torch.equal(again, levels)
    assert torch.equal(same, scale)
    assert torch.equal(store_books(S8, [torch.zeros(2, 4)])[0], torch.zeros(2, 4))


@pytest.mark.parametrize("size", [1.0, 0.4, 0.001, 0.0])
def test_sums_of_books_are_bytes_and_both_stay_when_they_are_stored_again(size: float) -> None:
    values = [book(3, 64, 5), size * book(3, 16, 5, seed=1)]
    levels, scale = to_levels(values)
    largest = torch.stack([x.int().abs().amax((1, 2)) for x in levels])
    assert bool((largest.sum(0) <= TOP_LEVEL).all())
    stored = store_books(S8, values)
    for level, x, value in zip(levels, stored, values, strict=True):
        assert torch.equal(x.double(), level.double() * scale.double()[:, None, None])
        assert float((x - value).abs().max()) <= 1.1 * float(scale.max())
    again, same = to_levels(stored)
    assert all(torch.equal(a, b) for a, b in zip(again, levels, strict=True))
    assert torch.equal(same, scale)


def test_a_book_of_nothing_leaves_all_levels_to_the_other() -> None:
    nothing, values = torch.zeros(2, 16, 4), book(2, 16, 4)
    for pair in ([nothing, values], [values, nothing]):
        alone, together = to_levels([values]), to_levels(pair)
        assert torch.equal(alone[1], together[1])
        assert any(torch.equal(alone[0][0], x) for x in together[0])


def test_a_scale_for_what_is_used() -> None:
    values = book(64, 4)
    values[0] *= 20  # one centroid far out
    use = torch.ones(64, 1)
    use[0] = 1e-6  # that nothing points to
    plain, weighted = (to_levels([values], u)[1] for u in (None, [use]))
    assert float(weighted) < float(plain)
    errors = [float((store_books(S8, [values], u)[0] - values)[1:].square().sum()) for u in (None, [use])]
    assert errors[1] < errors[0]
    full = values / (values.abs().max() / TOP_LEVEL)
    nearest = float(((full.round() - full) * values.abs().max() / TOP_LEVEL).square().sum())
    assert float((store_books(S8, [values])[0] - values).square().sum()) <= 1.001 * nearest


@pytest.mark.parametrize("rest", ["", ".r16", ".c2.o4v2k16.cn"])
def test_the_quantizer_loses_little_beside_float_codebooks(rest: str) -> None:
    weight, stats = random_weight(32, 48), correlated_stats(48)
    found = {
        table: Vptq(iterations=5, restarts=1, refit=2).quantize(weight, parse_format(f"vq.d4.k32{rest}{table}"), stats)
        for table in ("", ".s8")
    }
    q = found[".s8"].qtensor
    assert isinstance(q, VQTensor)
    assert q.centroids.dtype == torch.int8
    # A byte loses less than one in a thousand; the rest is where different books lead the column loop.
    assert found[".s8"].proxy_error < 1.15 * found[""].proxy_error
    assert q.centroids_scale is not None
    (near,) = store_books(q.fmt, [book := found[""].qtensor.centroids.float()])
    assert float((near - book).norm() / book.norm()) < 0.01


def test_tuning_moves_levels_and_scales() -> None:
    q = Vptq(iterations=3, restarts=0, refit=0).quantize(random_weight(32, 48), S8, None).qtensor
    assert isinstance(q, VQTensor)
    t = tunable(q)
    assert torch.equal(t.weight().detach(), q.dequantize())
    assert torch.equal(t.result().dequantize(), q.dequantize())
    target = q.dequantize() * 1.3
    before = float((t.weight().detach() - target).square().mean())
    optimizer = torch.optim.Adam(t.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        (t.weight() - target).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = t.result()
    assert isinstance(found, VQTensor)
    assert found.centroids.dtype == torch.int8
    assert found.centroids_scale is not None
    assert found.centroids_scale.dtype == torch.float32
    assert torch.equal(found.dequantize(), t.weight().detach())
    assert float((found.dequantize() - target).square().mean()) < 0.05 * before
