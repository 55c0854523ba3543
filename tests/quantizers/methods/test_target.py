"""Asymmetric calibration: what the float model's layer puts out is met better, by every method that has a Hessian."""

from __future__ import annotations

import pytest
import torch

from lowbit.compiler.errors import CheckpointError, RunError
from lowbit.quantizers.calibration import HessianAccumulator, LayerStats
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.methods import METHODS, make_method, quantize_weight
from lowbit.quantizers.methods.target import aim

FORMATS = {"gptq": "int2.g16.asym", "decoupleq": "int2.g16.fz", "vptq": "vq.d4.k16"}
WEIGHT = torch.randn(24, 48, generator=torch.Generator().manual_seed(3))


def inputs(seed: int, tokens: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer reads in the float model, and behind errors that partly follow from it: [tokens, 48] each."""
    rng, same = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
    mix = torch.randn(48, 48, generator=same) / 7 + torch.eye(48)
    wrong = torch.eye(48) + 0.05 * torch.randn(48, 48, generator=same)
    r = torch.randn(tokens, 48, generator=rng) @ mix
    return r, r @ wrong + 0.1 * torch.randn(tokens, 48, generator=rng)


def stats_of(r: torch.Tensor, x: torch.Tensor) -> LayerStats:
    accumulator = HessianAccumulator(x.shape[-1])
    for a, b in zip(r.split(500), x.split(500), strict=True):
        accumulator.add(b, a)
    return accumulator.stats()


def error(q: torch.Tensor, r: torch.Tensor, x: torch.Tensor) -> float:
    """E |W r - Q x|^2."""
    return float((r @ WEIGHT.T - x @ q.T).double().square().sum(1).mean())


def test_the_shift_is_the_mean_product_of_what_differs() -> None:
    r, x = inputs(0)
    stats = stats_of(r, x)
    assert stats.shift is not None
    torch.testing.assert_close(stats.shift, ((r - x).double().T @ x.double()) / len(x), rtol=1e-4, atol=1e-5)
    skipping, parts = HessianAccumulator(48, skip_first=2), (x.view(4, 500, 48), r.view(4, 500, 48))
    skipping.add(*parts)
    rest = [p[:, 2:].reshape(-1, 48).double() for p in parts]
    expected = (rest[1] - rest[0]).T @ rest[0] / len(rest[0])
    torch.testing.assert_close(skipping.stats().shift, expected, rtol=1e-4, atol=1e-5)
    assert skipping.nbytes == 2 * HessianAccumulator(48).nbytes


def test_the_target_minimises_the_error_against_the_float_output() -> None:
    r, x = inputs(0)
    stats = stats_of(r, x)
    target, notes = aim(make_method("gptq", {"asymmetric": 1.0, "damping": 1e-9}), WEIGHT, stats)
    gradient = (x @ target.T - r @ WEIGHT.T).double().T @ x.double() / len(x)
    assert float(gradient.abs().max()) < 1e-4 * float(stats.hessian.diagonal().max())
    assert not notes
    best = error(target, r, x)
    rng = torch.Generator().manual_seed(1)
    nearby = (target + 1e-2 * torch.randn(24, 48, generator=rng) for _ in range(5))
    assert all(error(other, r, x) > best for other in nearby)
    assert best < 0.5 * error(WEIGHT, r, x)


@pytest.mark.parametrize("name", FORMATS)
def test_the_output_comes_nearer_also_on_other_tokens(name: str) -> None:
    r, x = inputs(0)
    fmt, fresh = parse_format(FORMATS[name]), inputs(1)
    found = [
        quantize_weight(make_method(name, {"asymmetric": share}), WEIGHT, fmt, stats_of(r, x)).qtensor.dequantize()
        for share in (0.0, 0.5, 1.0)
    ]
    for tokens in ((r, x), fresh):
        errors = [error(q, *tokens) for q in found]
        assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", FORMATS)
def test_a_share_of_zero_changes_no_bit(name: str) -> None:
    r, x = inputs(0)
    both, method, fmt = stats_of(r, x), make_method(name, {}), parse_format(FORMATS[name])
    assert aim(method, WEIGHT, both)[0] is WEIGHT
    found = quantize_weight(method, WEIGHT, fmt, both)
    plain = method.quantize(WEIGHT, fmt, LayerStats(both.hessian, both.tokens))
    assert torch.equal(found.qtensor.dequantize(), plain.qtensor.dequantize())
    assert (found.proxy_error, found.notes) == (plain.proxy_error, plain.notes)


def test_reordered_channels_have_the_reordered_target() -> None:
    stats, order = stats_of(*inputs(0)), torch.randperm(48, generator=torch.Generator().manual_seed(2))
    method = make_method("gptq", {"asymmetric": 0.7})
    expected = aim(method, WEIGHT, stats)[0][:, order]
    torch.testing.assert_close(aim(method, WEIGHT[:, order], stats.in_order(order))[0], expected)


def test_channels_that_are_always_zero_keep_their_weights() -> None:
    r, x = inputs(0)
    x[:, 5] = 0
    target, _ = aim(make_method("gptq", {"asymmetric": 1.0}), WEIGHT, stats_of(r, x))
    assert torch.equal(target[:, 5], WEIGHT[:, 5])
    assert not torch.equal(target[:, 6], WEIGHT[:, 6])


def test_without_inputs_to_compare_it_is_said() -> None:
    r, x = inputs(0)
    fmt, method = parse_format("int3.g16.asym"), make_method("gptq", {"asymmetric": 0.5})
    partly = HessianAccumulator(48)
    partly.add(x, r)
    partly.add(x, r[:7])  # rows of other tokens, as experts have them
    stats = partly.stats()
    assert stats.shift is None
    found = quantize_weight(method, WEIGHT, fmt, stats)
    assert "is not known" in found.notes[-1]
    plain = make_method("gptq", {}).quantize(WEIGHT, fmt, stats)
    assert torch.equal(found.qtensor.codes, plain.qtensor.codes)  # type: ignore[union-attr]
    assert quantize_weight(method, WEIGHT, fmt, None).notes == ("no calibration statistics; rounded to nearest",)


def test_what_cannot_be_is_refused() -> None:
    for name in FORMATS:
        for share in (-0.1, 1.5, float("nan")):
            with pytest.raises(RunError, match="LB0503"):
                make_method(name, {"asymmetric": share})
    assert "asymmetric" not in METHODS["rtn"].__dataclass_fields__  # type: ignore[attr-defined]
    r, x = inputs(0)
    bad, stats = WEIGHT.clone(), stats_of(r, x)
    bad[1, 2] = torch.nan
    with pytest.raises(CheckpointError, match=r"LB0107.*\[1, 2\]"):
        quantize_weight(make_method("gptq", {"asymmetric": 1.0}), bad, parse_format("int4.g16.sym"), stats)
    r[3, 4] = torch.inf
    with pytest.raises(RunError, match="LB0510"):
        HessianAccumulator(48).add(x, r)
