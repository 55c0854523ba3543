"""decoupleQ: losses that never rise, better than GPTQ, and safe on anything."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.compiler.errors import CheckpointError, FormatError, RunError
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.factor import Prepared, prepare
from lowbit.quantizers.formats import parse_format, scalar_format
from lowbit.quantizers.methods import DecoupleQ, Gptq, Rtn, make_method
from lowbit.quantizers.methods.base import row_errors
from lowbit.quantizers.methods.grid import search_grid
from lowbit.quantizers.methods.sweep import ColumnGrid, feedback
from lowbit.quantizers.qtensor import QTensor


def stats_of(k: int, seed: int = 0, tokens: int = 400) -> LayerStats:
    """Statistics of correlated inputs whose channels differ in size."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=rng) / k**0.5 + torch.eye(k)
    x = (torch.randn(tokens, k, generator=rng) @ mix * torch.exp(torch.randn(k, generator=rng))).double()
    return LayerStats(x.T @ x / tokens, tokens)


def weight_of(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def prepared_of(k: int, seed: int = 0) -> Prepared:
    prepared = prepare(stats_of(k, seed), 0.01, act_order=True)
    assert prepared is not None
    return prepared


def mean_error(method: DecoupleQ | Gptq, text: str, seeds: int = 4) -> float:
    found = [method.quantize(weight_of(32, 64, s), parse_format(text), stats_of(64, s)) for s in range(seeds)]
    return sum(f.proxy_error for f in found) / seeds


@pytest.mark.parametrize(
    "text", ["int2.g16.fz", "int2.g24.fz", "int3.ch.fz", "int1.g16.fz", "int2.t.fz", "int2.ch.sym"]
)
@pytest.mark.parametrize("rounding", ["gptq", "box", "cd"])
def test_no_step_raises_the_loss_of_any_row(text: str, rounding: str) -> None:
    fmt, prepared = scalar_format(text), prepared_of(64)
    found = DecoupleQ(rounding=rounding, iterations=4).solve(weight_of(24, 64), fmt, prepared)
    assert len(found.trace) > 3
    for before, after in itertools.pairwise(found.trace):
        if fmt.granularity.kind == "t":
            before, after = before.sum(), after.sum()
        assert bool((after <= before).all())
    recomputed = row_errors(found.grid.qtensor(found.codes).dequantize() - found.weight, prepared.damped)
    assert torch.allclose(recomputed, found.errors, rtol=1e-6)
    assert found.trace[-1].sum() < 0.8 * found.trace[0].sum()


def test_one_iteration_is_the_better_of_rounding_and_gptq() -> None:
    weight, fmt, prepared = weight_of(40, 64), scalar_format("int3.g16.fz"), prepared_of(64)
    found = DecoupleQ(rounding="gptq", iterations=1).solve(weight, fmt, prepared)
    grid = search_grid(weight, fmt, clip=False)
    plain = grid.encode(weight)
    fed = grid.qtensor(feedback(weight, ColumnGrid.of(grid, weight.shape), prepared.upper, prepared.order, 128))
    losses = [row_errors(q.dequantize() - weight, prepared.damped) for q in (plain, fed)]
    assert torch.equal(found.errors, torch.minimum(*losses))
    assert torch.equal(found.codes, torch.where((losses[1] < losses[0])[:, None], fed.codes, plain.codes))
    nothing = DecoupleQ(rounding="gptq", iterations=0).solve(weight, fmt, prepared)
    assert torch.equal(nothing.codes, plain.codes)


def test_more_iterations_never_hurt_a_row() -> None:
    weight, fmt, prepared = weight_of(40, 64), scalar_format("int2.g16.fz"), prepared_of(64)
    for rounding in ("gptq", "box"):
        errors = [DecoupleQ(rounding=rounding, iterations=i).solve(weight, fmt, prepared).errors for i in range(5)]
        assert all(bool((b <= a).all()) for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("text", ["int2.g16.fz", "int2.ch.fz", "int2.ch.sym"])
def test_every_part_lowers_the_loss(text: str) -> None:
    paper = mean_error(Gptq(clip_search=False, weighting="none", refits=0), text)
    alternated = mean_error(DecoupleQ(rounding="gptq"), text)
    boxed = mean_error(DecoupleQ(rounding="box"), text)
    descended = mean_error(DecoupleQ(temperature=0.0), text)
    annealed = mean_error(DecoupleQ(rounds=10), text)
    assert alternated < 0.75 * paper
    assert boxed < 0.99 * alternated
    assert descended < 0.99 * boxed
    assert annealed < descended


def test_close_to_the_best_there_is() -> None:
    """Against every combination of codes of a small row, each with its own best scale and offset."""
    fmt, k, ratios = scalar_format("int2.ch.fz"), 6, []
    combinations = torch.tensor(list(itertools.product(fmt.element.levels().tolist(), repeat=k))).double()
    varied = combinations[(combinations != combinations[:, :1]).any(1)]
    design = torch.stack([varied, torch.ones_like(varied)], 2)  # [C, K, 2]
    for seed in range(8):
        weight, prepared = weight_of(1, k, seed), prepared_of(k, seed)
        root = torch.linalg.cholesky(prepared.damped.double()).T
        target = root @ weight[0].double()
        sides = torch.linalg.lstsq(root @ design, target[None, :, None].expand(len(design), -1, -1)).solution
        best = float((root @ design @ sides - target[:, None]).square().sum((1, 2)).min())
        got = float(DecoupleQ().solve(weight, fmt, prepared).errors)
        assert got >= best * 0.99
        ratios.append(got / best)
    assert sorted(ratios)[4] < 1.5


DEGENERATE = {
    "zeros": torch.zeros(4, 40),
    "constant": torch.full((4, 40), 0.37),
    "one nonzero": torch.zeros(4, 40).index_fill(1, torch.tensor([7]), 3.0),
    "denormal": torch.linspace(-1e-41, 1e-41, 160).reshape(4, 40),
    "outlier": torch.cat([torch.full((4, 39), 1e-3), torch.full((4, 1), 900.0)], 1),
    "two values": torch.tensor([-1.0, 1.0]).repeat(4, 20),
    "shifted": torch.linspace(10, 10.1, 160).reshape(4, 40),
    "zero row": torch.cat([torch.zeros(1, 40), weight_of(3, 40)]),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_weights(kind: str) -> None:
    weight, stats = DEGENERATE[kind], stats_of(40)
    for text in ("int2.g16.fz", "int2.ch.fz", "int3.t.fz", "int1.g16.fz", "int4.g1.fz", "int2.g16.sym"):
        found = DecoupleQ(rounds=2).quantize(weight, parse_format(text), stats)
        out = found.qtensor.dequantize()
        assert bool(out.isfinite().all()), text
        assert found.proxy_error <= found.rtn_error, text
        zero = (weight == 0).all(1)
        if text.split(".")[1] != "t":
            assert bool((out[zero] == 0).all()), f"{text}: rows of zeros must stay zeros"
        if kind == "two values" and "fz" in text:
            assert torch.allclose(out, weight, atol=1e-3), text
        if kind in ("constant", "shifted") and "fz" in text:
            assert found.proxy_error < 1e-4, text


@given(st.sampled_from(["int1", "int2", "int3", "int5"]), st.sampled_from(["g8", "g7", "ch", "t"]), st.integers(1, 9),
       st.integers(8, 40), st.integers(0, 999))  # fmt: skip
def test_never_worse_than_rounding(element: str, granularity: str, n: int, k: int, seed: int) -> None:
    fmt = parse_format(f"{element}.{granularity}.fz")
    found = DecoupleQ(block=16, rounds=2).quantize(weight_of(n, k, seed), fmt, stats_of(k, seed, tokens=2 * k))
    assert found.proxy_error <= found.rtn_error
    assert found.qtensor.shape == (n, k)
    assert isinstance(found.qtensor, QTensor)
    assert int(found.qtensor.codes.max()) < 2 ** int(element[3:])


def test_any_hessian_gives_a_finite_result() -> None:
    weight, fmt, base = weight_of(6, 24), parse_format("int2.g8.fz"), stats_of(24).hessian
    low_rank = base[:, :1] @ base[:1]
    dead = base.clone()
    dead[3], dead[:, 3] = 0, 0
    cases = {"rank one": low_rank, "huge": base * 1e30, "tiny": base * 1e-30, "dead": dead, "identity": torch.eye(24)}
    for name, hessian in cases.items():
        found = DecoupleQ(rounds=2).quantize(weight, fmt, LayerStats(hessian, 100))
        assert bool(found.qtensor.dequantize().isfinite().all()), name
        assert found.proxy_error <= found.rtn_error, name
    for useless in (None, LayerStats(base * 0, 1), LayerStats(base * torch.nan, 1)):
        found = DecoupleQ().quantize(weight, fmt, useless)
        assert "rounded to nearest" in found.notes[0]
        plain = Rtn().quantize(weight, fmt, None).qtensor
        assert torch.equal(found.qtensor.dequantize(), plain.dequantize())


def test_reported_errors_and_determinism() -> None:
    weight, stats, fmt = weight_of(24, 48), stats_of(48), parse_format("int2.g16.fz")
    first, second = (DecoupleQ().quantize(weight, fmt, stats) for _ in range(2))
    assert torch.equal(first.qtensor.dequantize(), second.qtensor.dequantize())
    raw = stats.hessian.float()
    size = row_errors(weight, raw).sum()
    assert first.proxy_error == pytest.approx(
        float(row_errors(first.qtensor.dequantize() - weight, raw).sum() / size), rel=1e-3
    )
    assert first.rtn_error == pytest.approx(Rtn().quantize(weight, fmt, stats).proxy_error, rel=1e-3)


def test_offsets_can_be_multiples_of_their_scales() -> None:
    weight, fmt = weight_of(24, 48), parse_format("int3.g16.fz.f32")
    free, tied = (DecoupleQ(integer_zero=z).quantize(weight, fmt, stats_of(48)) for z in (False, True))
    ratios = []
    for q in (free.qtensor, tied.qtensor):
        assert isinstance(q, QTensor)
        assert q.offset is not None
        ratios.append(q.offset / q.scale)
    assert bool(((ratios[1] - ratios[1].round()).abs() < 1e-4).all())
    assert not bool(((ratios[0] - ratios[0].round()).abs() < 1e-4).all())
    assert free.proxy_error < tied.proxy_error < tied.rtn_error


def test_formats_it_cannot_produce_are_refused() -> None:
    weight, stats = weight_of(8, 16), stats_of(16)
    with pytest.raises(RunError, match=r"LB0515.*int2\.g8\.fz"):
        DecoupleQ().quantize(weight, parse_format("int2.g8.asym"), stats)
    with pytest.raises(RunError, match="LB0515"):
        DecoupleQ().quantize(weight, parse_format("vq.d4.k256"), stats)
    with pytest.raises(FormatError, match="LB0213"):
        DecoupleQ().quantize(weight, parse_format("int2.g64.fz"), stats)
    with pytest.raises(RunError, match=r"LB0512.*fz\.f32"):
        DecoupleQ().quantize(weight * 1e8, parse_format("int2.g8.fz"), stats)
    weight[2, 5] = torch.nan
    with pytest.raises(CheckpointError, match=r"LB0107.*\[2, 5\]"):
        DecoupleQ().quantize(weight, parse_format("int2.g8.fz"), stats)


def test_options_are_checked() -> None:
    assert make_method("decoupleq", {"rounding": "box", "damping": 1}) == DecoupleQ(rounding="box", damping=1)
    for options in ({"rounding": "guess"}, {"damping": 0.0}, {"rounds": -1}, {"shrinks": 0}, {"temperature": -1.0}):
        with pytest.raises(RunError, match="LB0503"):
            make_method("decoupleq", options)
