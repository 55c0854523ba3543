"""VPTQ as a method: every kind of vector format, what it reports, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from _vq_cases import correlated_stats, random_weight

from lowbit.compiler.errors import CheckpointError, FormatError, RunError
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.methods import METHODS, Vptq, make_method, proxy_error
from lowbit.quantizers.methods.vptq.kmeans import kmeans
from lowbit.quantizers.vqtensor import VQTensor

FORMATS = [
    "vq.d2.k16",
    "vq.d4.k32",
    "vq.d4.k16.r8",
    "vq.d5.k16",
    "vq.d5.k16.r16.bf16",
    "vq.d4.k16.c3",
    "vq.d4.k16.o4v2k32",
    "vq.d4.k16.c2.o7pv3k16",
    "vq.d4.k16.cn",
    "vq.d4.k16.rn.f32",
    "vq.d5.k16.r8.c2.o2v4k16.rn",
    "vq.d3.k16.c2.o2v4k16.cn",
    "vq.d4.k16.r8.c2.o2v4k16.s8",
    "vq.d4.k16.in",
    "vq.d8.k16.r16.in.rn",
    "vq.d3.k16.in.cn.s8",
]
QUICK = {"iterations": 5, "restarts": 1, "refit": 2}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("text", FORMATS)
def test_every_kind_of_format_beats_plain_kmeans(text: str) -> None:
    weight, stats = random_weight(24, 48), correlated_stats(48)
    found = Vptq(**QUICK).quantize(weight, parse_format(text), stats)
    q = found.qtensor
    assert isinstance(q, VQTensor)
    assert q.shape == (24, 48)
    assert found.proxy_error < 0.9 * found.rtn_error
    assert found.proxy_error == pytest.approx(proxy_error(weight, q.dequantize(), stats.hessian), rel=1e-3)
    assert found.notes == ()


def test_reported_baseline_is_kmeans_without_feedback() -> None:
    weight, stats = random_weight(24, 48), correlated_stats(48)
    found = Vptq(**QUICK, weighting="none").quantize(weight, parse_format("vq.d4.k32"), stats)
    order = stats.hessian.diagonal().argsort(descending=True)
    vectors = weight.T[order].reshape(-1, 4)
    book = kmeans(vectors, torch.ones(len(vectors), 1), 32, QUICK["iterations"], 1e-4, 0).book.half().float()
    nearest = book[torch.cdist(vectors, book).argmin(1)].view(48, 24)
    plain = torch.empty(24, 48)
    plain[:, order] = nearest.T
    assert found.rtn_error == pytest.approx(proxy_error(weight, plain, stats.hessian), rel=1e-3)


def test_without_statistics_the_result_is_plain_kmeans() -> None:
    plain = Vptq(**QUICK).quantize(random_weight(24, 48), parse_format("vq.d4.k64"), None)
    assert plain.notes == ("no calibration statistics; plain k-means",)
    assert plain.proxy_error == plain.rtn_error
    assert 0 < plain.proxy_error < 0.3


def test_the_stored_order_is_by_importance() -> None:
    stats = correlated_stats(48)
    q = Vptq(**QUICK).quantize(random_weight(16, 48), parse_format("vq.d4.k16.o4v2k16"), stats).qtensor
    assert isinstance(q, VQTensor)
    assert q.perm is not None
    diagonal = stats.hessian.diagonal()[q.perm]
    assert bool((diagonal[:-1] >= diagonal[1:]).all())


def test_distinct_vectors_within_the_codebook_are_exact() -> None:
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(16, 4, generator=rng).half().float()
    pick = torch.randint(0, 16, (6, 40), generator=rng)
    weight = vectors[pick].transpose(1, 2).reshape(24, 40)
    found = Vptq().quantize(weight, parse_format("vq.d4.k16"), LayerStats(torch.eye(40), 1))
    assert torch.allclose(found.qtensor.dequantize(), weight, atol=2e-3)
    assert found.proxy_error < 1e-6


def test_a_few_more_rows_or_columns_change_nothing_much() -> None:
    """Padding rows must not pull on centroids: 25 rows in vectors of 4 are about as good as 24."""
    stats, method = correlated_stats(48), Vptq(**QUICK)
    full, ragged = (
        method.quantize(random_weight(n, 48), parse_format("vq.d4.k32"), stats).proxy_error for n in (24, 25)
    )
    assert ragged < 1.3 * full


def mean_error(text: str, seeds: int = 3, **options: object) -> float:
    method = Vptq(**options)  # type: ignore[arg-type]
    cases = [(random_weight(32, 64, s), correlated_stats(64, s)) for s in range(seeds)]
    return sum(method.quantize(w, parse_format(text), s).proxy_error for w, s in cases) / seeds


def test_orderings_between_options() -> None:
    paper = mean_error("vq.d4.k64", weighting="diagonal", restarts=0, refit=0)
    refined = mean_error("vq.d4.k64", restarts=0, refit=2)
    assert refined < 0.95 * paper
    assert mean_error("vq.d4.k64", restarts=0, refit=5) < refined
    assert mean_error("vq.d4.k64", restarts=2, refit=0) < mean_error("vq.d4.k64", restarts=0, refit=0)
    greedy, joint = (mean_error("vq.d4.k16.r16", refit=1, beam=b) for b in (1, 16))
    assert joint < 0.95 * greedy


def test_more_bits_are_better() -> None:
    ladder = ["vq.d8.k16", "vq.d4.k16", "vq.d4.k16.r4", "vq.d4.k16.r64", "vq.d2.k64"]
    errors = [mean_error(text, 2, **QUICK) for text in ladder]
    assert all(b < a for a, b in itertools.pairwise(errors)), errors


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("text", ["vq.d4.k64", "vq.d4.k16.r16.c2.o2pv4k16.cn", "vq.d4.k16.r16.in.rn"])
def test_same_bits_for_any_number_of_threads(text: str) -> None:
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        q = (
            Vptq(**QUICK)
            .quantize(random_weight(128, 160), parse_format(text), correlated_stats(160, tokens=600))
            .qtensor
        )
        assert isinstance(q, VQTensor)
        found.append(q)
    assert torch.equal(found[0].indices, found[1].indices)
    assert torch.equal(found[0].centroids, found[1].centroids)
    assert torch.equal(found[0].dequantize(), found[1].dequantize())


@pytest.mark.parametrize("text", ["vq.d4.k32", "vq.d4.k32.in"])
def test_dead_columns_are_noted_and_cost_nothing(text: str) -> None:
    weight, stats = random_weight(16, 32), correlated_stats(32)
    dead = torch.tensor([3, 17])
    hessian = stats.hessian.clone()
    hessian[dead] = 0
    hessian[:, dead] = 0
    weight[:, dead] = 40.0  # books that cared about these would be useless for the others
    found = Vptq(**QUICK).quantize(weight, parse_format(text), LayerStats(hessian, stats.tokens))
    assert found.notes == ("2 input channels were always zero",)
    alive = Vptq(**QUICK).quantize(random_weight(16, 32), parse_format(text), stats)
    assert found.proxy_error < 3 * alive.proxy_error


@pytest.mark.parametrize("hessian", [torch.zeros(32, 32), torch.full((32, 32), torch.nan)])
def test_unusable_hessians_give_plain_kmeans(hessian: torch.Tensor) -> None:
    weight, fmt = random_weight(16, 32), parse_format("vq.d4.k32")
    found = Vptq().quantize(weight, fmt, LayerStats(hessian, 0))
    assert found.notes == ("the Hessian is zero or not finite; plain k-means",)
    plain = Vptq().quantize(weight, fmt, None)
    assert torch.equal(found.qtensor.dequantize(), plain.qtensor.dequantize())


def test_singular_hessians_still_work() -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).double()
    found = Vptq(**QUICK).quantize(random_weight(16, 32), parse_format("vq.d4.k32"), LayerStats(x.T @ x, 5))
    assert found.proxy_error < 0.5 * found.rtn_error


def test_sampling_sees_fewer_vectors() -> None:
    weight, stats, fmt = random_weight(32, 256), correlated_stats(256, tokens=900), parse_format("vq.d4.k4")
    whole, part = (Vptq(**QUICK, sample=s).quantize(weight, fmt, stats) for s in (0, 256))
    assert not torch.equal(whole.qtensor.dequantize(), part.qtensor.dequantize())
    assert part.proxy_error < 1.2 * whole.proxy_error


def test_siblings_share_the_factor() -> None:
    stats = correlated_stats(32)
    for seed in (0, 1):
        Vptq(**QUICK).quantize(random_weight(8, 32, seed), parse_format("vq.d4.k4"), stats)
    assert len(stats.derived) == 1


def test_is_registered() -> None:
    assert METHODS["vptq"] is Vptq
    assert make_method("vptq", {"refit": 2, "damping": 1}) == Vptq(refit=2, damping=1)


@pytest.mark.parametrize(
    "options",
    [{"damping": 0.0}, {"block": 0}, {"beam": 0}, {"refit": -1}, {"tolerance": float("nan")}, {"weighting": "much"}],
    ids=str,
)
def test_impossible_options(options: dict[str, object]) -> None:
    with pytest.raises(RunError, match="LB0503"):
        make_method("vptq", options)


def test_refusals() -> None:
    stats = correlated_stats(16)
    with pytest.raises(RunError, match=r"LB0515.*int4"):
        Vptq().quantize(random_weight(16, 16), parse_format("int4.ch.sym"), stats)
    with pytest.raises(FormatError, match="LB0213"):
        Vptq().quantize(random_weight(16, 16), parse_format("vq.d4.k16.c3"), stats)
    with pytest.raises(CheckpointError, match="LB0107"):
        Vptq().quantize(torch.full((16, 16), torch.nan), parse_format("vq.d4.k16"), stats)
    large = random_weight(16, 16) * 1e8
    with pytest.raises(RunError, match=r"LB0512.*vq\.d4\.k16\.f32"):
        Vptq().quantize(large, parse_format("vq.d4.k16"), stats)
    assert Vptq(**QUICK).quantize(large, parse_format("vq.d4.k16.f32"), stats).proxy_error < 0.3
