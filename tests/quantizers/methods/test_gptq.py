"""GPTQ: better than rounding, exact where it can be, and safe with any Hessian."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.compiler.errors import CheckpointError, FormatError, RunError
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.factor import factor_inverse, prepare
from lowbit.quantizers.formats import catalog, parse_format
from lowbit.quantizers.methods import METHODS, Gptq, Rtn, make_method, proxy_error
from lowbit.quantizers.methods.fit import refit_scales
from lowbit.quantizers.methods.grid import search_grid
from lowbit.quantizers.methods.sweep import ColumnGrid, descend, feedback


def stats_of(k: int, seed: int = 0, tokens: int = 400, spread: float = 1.0) -> LayerStats:
    """Statistics of correlated inputs whose channels differ in size."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=rng) / k**0.5 + torch.eye(k)
    size = torch.exp(spread * torch.randn(k, generator=rng))
    x = (torch.randn(tokens, k, generator=rng) @ mix * size).double()
    return LayerStats(x.T @ x / tokens, tokens)


def weight_of(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("fmt", [f for f in catalog() if f.bits <= 4], ids=str)
@pytest.mark.parametrize("granularity", ["ch", "g16", "t"])
def test_beats_rounding(fmt: object, granularity: str) -> None:
    chosen = parse_format(str(fmt).replace(".ch", f".{granularity}", 1))
    found = Gptq().quantize(weight_of(24, 48), chosen, stats_of(48))
    assert found.proxy_error < 0.95 * found.rtn_error


def test_reported_errors_are_those_of_the_result() -> None:
    weight, stats, fmt = weight_of(24, 48), stats_of(48), parse_format("int3.g16.asym")
    found = Gptq().quantize(weight, fmt, stats)
    assert found.proxy_error == pytest.approx(proxy_error(weight, found.qtensor.dequantize(), stats.hessian), rel=1e-3)
    plain = Rtn().quantize(weight, fmt, stats)
    assert found.rtn_error == pytest.approx(plain.proxy_error, rel=1e-3)


def mean_error(seeds: int = 6, text: str = "int3.g16.sym", **options: object) -> float:
    method, fmt = Gptq(**options), parse_format(text)  # type: ignore[arg-type]
    found = [method.quantize(weight_of(32, 64, s), fmt, stats_of(64, s)).proxy_error for s in range(seeds)]
    return sum(found) / seeds


def test_orderings_between_options() -> None:
    plain = mean_error(refits=0, act_order=False)
    ordered = mean_error(refits=0)
    assert ordered < plain, "activation order helps"
    once = mean_error(refits=1)
    assert once < 0.97 * ordered, "re-fitting and coordinate descent help"
    assert mean_error(refits=3) <= once * 1.001


def test_groups_that_follow_the_updates() -> None:
    free = mean_error(act_order=False, static_groups=False)
    assert free < mean_error(seeds=6, act_order=False, refits=0)


def test_the_block_size_changes_nothing_but_rounding() -> None:
    weight, stats, fmt = weight_of(16, 64), stats_of(64), parse_format("int4.g16.sym")
    results = [Gptq(block=block, refits=0).quantize(weight, fmt, stats).proxy_error for block in (1, 16, 33, 64, 500)]
    assert max(results) < 1.02 * min(results)


def test_feedback_matches_the_textbook_loop() -> None:
    """Column by column with the inverse Hessian itself, as in Optimal Brain Compression."""
    weight, stats, fmt = weight_of(3, 10), stats_of(10), parse_format("int3.ch.sym")
    prepared = prepare(stats, 0.01, act_order=True)
    assert prepared is not None
    grid = search_grid(weight, fmt)
    codes = feedback(weight, ColumnGrid.of(grid, weight.shape), prepared.upper, prepared.order, 4)
    left, inverse = weight.double().clone(), torch.linalg.inv(prepared.damped.double())
    levels = (fmt.element.levels().double()[None] * grid.scale.double())[:, None]
    expected = torch.empty_like(codes)
    for c in prepared.order.tolist():
        expected[:, c] = (left[:, c, None] - levels[:, 0]).abs().argmin(1).to(torch.uint8)
        error = (left[:, c] - levels[:, 0].gather(1, expected[:, c, None].long())[:, 0]) / inverse[c, c]
        left -= error[:, None] * inverse[c][None]
        inverse = inverse - torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
        inverse[c, c] = torch.inf
        inverse = inverse.nan_to_num(nan=0.0, posinf=1.0)
    assert (codes == expected).float().mean() > 0.95


def test_close_to_the_best_codes_there_are() -> None:
    """Against every combination of codes of a small row."""
    fmt, k = parse_format("int2.ch.sym"), 6
    ratios = []
    for seed in range(8):
        weight, stats = weight_of(1, k, seed), stats_of(k, seed)
        found = Gptq().quantize(weight, fmt, stats)
        scale = found.qtensor.scale.float().item()
        levels = fmt.element.levels().tolist()
        rows = torch.tensor(list(itertools.product(levels, repeat=k))) * scale
        delta = (rows - weight).double()
        best = float(((delta @ stats.hessian) * delta).sum(1).min())
        got = found.proxy_error * float((weight.double() @ stats.hessian @ weight.double().T).item())
        assert got >= best * 0.999
        ratios.append(got / max(best, 1e-12))
    assert sorted(ratios)[4] < 1.5


def test_descent_and_refit_never_raise_the_loss() -> None:
    weight, stats = weight_of(16, 40), stats_of(40)
    hessian = stats.hessian.float()
    for text in ("int3.g16.asym", "int1.ch.sym", "int4.t.sym"):
        fmt = parse_format(text)
        grid = search_grid(weight, fmt)
        codes = grid.encode(weight).codes
        losses = [proxy_error(weight, grid.qtensor(codes).dequantize(), hessian)]
        for _ in range(3):
            grid = refit_scales(weight, grid, codes, hessian)
            losses.append(proxy_error(weight, grid.qtensor(codes).dequantize(), hessian))
            codes = descend(weight, grid, codes, hessian, torch.arange(40), 16, 1)
            losses.append(proxy_error(weight, grid.qtensor(codes).dequantize(), hessian))
        assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses)), (text, losses)
        assert losses[-1] < losses[0]


def test_representable_weights_are_kept_exactly() -> None:
    fmt = parse_format("int4.g16.sym")
    levels = torch.randint(-8, 8, (8, 48), generator=torch.Generator().manual_seed(0)).float()
    levels[:, ::16] = -7.0  # the range of every group is known
    levels[:, 1::16] = 7.0
    weight = levels * 0.5
    found = Gptq().quantize(weight, fmt, stats_of(48))
    assert found.proxy_error < 1e-10


def test_dead_columns_are_rounded_and_cost_nothing() -> None:
    weight, stats, fmt = weight_of(8, 32), stats_of(32), parse_format("int4.g16.sym")
    dead = torch.tensor([3, 17, 18])
    hessian = stats.hessian.clone()
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = Gptq().quantize(weight, fmt, LayerStats(hessian, stats.tokens))
    assert any("3 input channels" in note for note in found.notes)
    assert found.proxy_error <= found.rtn_error
    q = found.qtensor
    step = q.scale.float().repeat_interleave(16, 1)[:, dead]
    inside = weight[:, dead].abs() <= 7 * step
    assert bool(((q.dequantize() - weight)[:, dead].abs() <= step * 0.501)[inside].all())


def awkward_hessians() -> list[tuple[str, torch.Tensor]]:
    """Over a hundred: conditions up to 1e20, low rank, asymmetric, indefinite, zero, infinite, NaN."""
    out = []
    for index, power in enumerate(range(0, 21)):
        for rank in (24, 23, 12, 1):
            rng = torch.Generator().manual_seed(100 * index + rank)
            basis = torch.linalg.qr(torch.randn(24, 24, generator=rng, dtype=torch.float64))[0]
            values = torch.logspace(0, -power, 24, dtype=torch.float64)
            values[rank:] = 0
            out.append((f"cond 1e{power} rank {rank}", basis * values @ basis.T))
    base = out[0][1]
    for scale in (1e-30, 1e-12, 1e12, 1e30, 1e300):
        out.append((f"scaled {scale}", base * scale))
    skew = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for size in (1e-6, 1e-2, 1.0, 100.0):
        out.append((f"asymmetric {size}", base + size * skew))
        out.append((f"indefinite {size}", base + size * (skew + skew.T)))
    out += [("zero", torch.zeros(24, 24)), ("negative", -base), ("inf", base.clone().fill_diagonal_(torch.inf))]
    nan = base.clone()
    nan[3, 5] = torch.nan
    return [
        *out,
        ("nan", nan),
        ("one channel", torch.zeros(24, 24).index_put((torch.tensor(2),) * 2, torch.tensor(1.0))),
    ]


def test_any_hessian_gives_a_finite_result_no_worse_than_rounding() -> None:
    weight, fmt = weight_of(6, 24), parse_format("int3.g8.asym")
    cases = awkward_hessians()
    assert len(cases) > 100
    for name, hessian in cases:
        before = hessian.clone()
        found = Gptq().quantize(weight, fmt, LayerStats(hessian, 100))
        assert torch.equal(hessian, before) or name == "nan", f"{name}: the caller's matrix was written to"
        assert bool(found.qtensor.dequantize().isfinite().all()), name
        assert found.proxy_error <= found.rtn_error, name
        if name in ("zero", "inf", "nan", "negative"):
            assert any("rounded to nearest" in note for note in found.notes), name


def test_damping_is_raised_until_a_factor_exists() -> None:
    hessian = stats_of(24).hessian
    values, basis = torch.linalg.eigh(hessian / hessian.diagonal().mean())
    values[0] = -0.05  # 1 % damping is not enough, 10 % is
    broken = (basis * values) @ basis.T
    prepared = prepare(LayerStats(broken, 10), 0.01, act_order=True)
    assert prepared is not None
    assert any("damping raised to 0.1" in note for note in prepared.notes)
    values[0] = -1e9
    hopeless = prepare(LayerStats((basis * values) @ basis.T + torch.eye(24) * 1e9, 10), 1e-12, act_order=True)
    assert hopeless is None or bool(hopeless.upper.isfinite().all())


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = stats_of(30).hessian
    upper = factor_inverse(hessian)
    assert upper is not None
    assert torch.allclose(upper.T @ upper @ hessian, torch.eye(30, dtype=torch.float64), atol=1e-8)
    assert torch.equal(upper, upper.triu())
    assert factor_inverse(-hessian) is None


def test_same_input_same_bits() -> None:
    weight, stats, fmt = weight_of(32, 64), stats_of(64), parse_format("int3.g16.asym")
    first, second = (Gptq().quantize(weight.clone(), fmt, stats).qtensor for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert first.zero is not None
    assert second.zero is not None
    assert torch.equal(first.zero, second.zero)


@given(st.sampled_from([str(f) for f in catalog()]), st.integers(1, 12), st.integers(8, 40), st.integers(0, 999))
def test_never_worse_than_rounding(text: str, n: int, k: int, seed: int) -> None:
    fmt = parse_format(text.replace(".ch", ".g8", 1))
    found = Gptq(block=16).quantize(weight_of(n, k, seed), fmt, stats_of(k, seed, tokens=2 * k, spread=2.0))
    assert found.proxy_error <= found.rtn_error
    assert found.qtensor.shape == (n, k)


def test_without_statistics_it_rounds_and_says_so() -> None:
    found = Gptq().quantize(weight_of(4, 16), parse_format("int4.ch.sym"), None)
    assert "no calibration" in found.notes[0]


@pytest.mark.parametrize("method", [Rtn(), Gptq()], ids=["rtn", "gptq"])
def test_bad_weights_are_refused(method: Rtn | Gptq) -> None:
    weight = weight_of(4, 16)
    weight[2, 5], weight[3, 1] = torch.nan, torch.inf
    with pytest.raises(CheckpointError, match=r"LB0107.*2 values.*\[2, 5\]"):
        method.quantize(weight, parse_format("int4.ch.sym"), stats_of(16))
    with pytest.raises(FormatError, match="LB0213"):
        method.quantize(weight_of(4, 16), parse_format("int4.g64.sym"), stats_of(16))


def test_options_are_checked() -> None:
    assert make_method("gptq", {"damping": 1, "sweeps": 0}) == Gptq(damping=1, sweeps=0)
    assert set(METHODS) == {"rtn", "gptq", "decoupleq", "vptq", "fmpq"}
    for name, options, code in [
        ("magic", {}, "LB0501"),
        ("gptq", {"dampening": 0.1}, "LB0502"),
        ("gptq", {"block": 1.5}, "LB0503"),
        ("gptq", {"block": True}, "LB0503"),
        ("gptq", {"damping": 0.0}, "LB0503"),
        ("gptq", {"weighting": "guess"}, "LB0503"),
        ("gptq", {"static_groups": False}, "LB0503"),
        ("rtn", {"clip_search": "yes"}, "LB0503"),
    ]:
        with pytest.raises(RunError, match=code):
            make_method(name, options)
