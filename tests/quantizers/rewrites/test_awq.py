"""Scaling that is aware of activations: what it measures, what it finds, and what it leaves alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from _families import random_model
from _rewrites import IDS, difference, scene_of
from torch import Tensor, nn

from lowbit.compiler.io.rewritten import rewrite_module
from lowbit.compiler.job import observe
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.methods import make_method
from lowbit.quantizers.methods.rtn import Rtn
from lowbit.quantizers.observe import DAMPING, SiteObserver
from lowbit.quantizers.rewrites import Scene, parse_rewrite
from lowbit.quantizers.rewrites.scaling import Reader, rounding_error

DOWN = "model.layers.0.mlp.down_proj"
ATTENTION = "model.layers.1.self_attn.q_proj"


def seen(x: Tensor, costs: bool = True) -> SiteObserver:
    """An observer that saw x [..., K]."""
    layer = nn.Linear(x.shape[-1], 8)
    with SiteObserver({"layer": layer}, x[..., 0].numel(), costs) as observer, torch.no_grad():
        layer(x)
    return observer


def loud(n: int, k: int) -> Tensor:
    """[n, k]: mixed channels, some of them many times as large as the rest, one silent."""
    rng = torch.Generator().manual_seed(n + k)
    x = torch.randn(n, k, generator=rng) @ torch.randn(k, k, generator=rng) / k**0.5
    x[:, ::13] *= 12
    x[:, 7] = 0
    return x


def test_a_column_costs_what_others_cannot_make_up_for() -> None:
    x = loud(200, 16)
    stats = seen(x).stats()["layer"]
    hessian = (x.T @ x / 200).double()
    alive = torch.arange(16) != 7
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(16)
    order = torch.argsort(hessian.diagonal(), descending=True)
    order = order[alive[order]]
    assert stats.cost is not None
    assert stats.cost[7] == 0
    for place, column in enumerate(order):  # the error of a column, those behind it free to move: a Schur complement
        behind = order[place + 1 :]
        cross = damped[column, behind]
        left = damped[column, column] - cross @ torch.linalg.solve(damped[behind][:, behind], cross)
        torch.testing.assert_close(stats.cost[column].double(), left, rtol=1e-3, atol=0)
    turned = stats.gathered(order)
    assert turned.cost is not None
    assert torch.equal(turned.cost, stats.cost[order])
    assert seen(x, costs=False).stats()["layer"].cost is None


def test_the_error_counts_costs_where_they_are_known() -> None:
    x, weight = loud(200, 32), torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    stats, s = seen(x).stats()["layer"], torch.rand(32) + 0.5
    reader = Reader(weight, parse_format("int3.g16.asym"), None)
    off = Rtn(clip_search=False).round(weight * s, reader.fmt).dequantize() / s - weight
    assert stats.cost is not None
    left = float((off.square() * stats.cost).sum())
    assert rounding_error(stats, [reader], s) == pytest.approx(left, rel=1e-5)
    whole = float((stats.rows @ off.T).square().sum() / len(stats.rows))
    assert rounding_error(replace(stats, cost=None), [reader, reader], s) == pytest.approx(2 * whole, rel=1e-4)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_layers_lose_less_where_some_channels_are_loud(method: str) -> None:
    """The loss on the calibration tokens, after the method has done what it can."""
    model = random_model("llama")
    with torch.no_grad():  # a few channels that the layer before makes loud
        model.get_submodule("model.layers.0.mlp.up_proj").weight[::9] *= 25  # type: ignore[operator]
    scene = weights_alone(model, "int3.g32.asym", costs=method == "gptq")
    site = next(s for s in scene.structure.sites if s.name == DOWN)
    s = parse_rewrite("awq").decide(scene)[DOWN]
    assert float(s.max() / s.min()) > 1.5
    x = scene.stats[DOWN].rows
    weight = scene.consumer_weights(site)[0]

    def loss(by: Tensor) -> float:
        h = (x / by).T @ (x / by) / len(x)
        q = make_method(method, {}).quantize(weight * by, parse_format("int3.g32.asym"), LayerStats(h, len(x)))
        return float((x @ (q.qtensor.dequantize() / by - weight).T).square().sum())

    assert loss(s) < 0.9 * loss(torch.ones_like(s))


def weights_alone(model: nn.Module, fmt: str, costs: bool) -> Scene:
    """No inputs are rounded, and the output layer is kept."""
    scene = scene_of(model, fmt)
    stats = observe.observe_model(model, IDS, [s.name for s in scene.structure.sites], {}, costs)
    weight = lambda path: None if path == "lm_head" else parse_format(fmt)  # noqa: E731
    return replace(scene, activation=lambda path: None, weight=weight, stats=stats)


def test_costs_are_the_same_a_few_sites_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    whole = weights_alone(model, "int4.g32.sym", costs=True).stats
    monkeypatch.setattr(observe, "_MOST_PRODUCTS", 2 * 8 * 48**2)
    parts = weights_alone(model, "int4.g32.sym", costs=True).stats
    assert list(parts) == list(whole)
    for name, stats in whole.items():
        cost, other = stats.cost, parts[name].cost
        assert cost is not None
        assert other is not None
        assert torch.equal(cost, other)


def test_what_is_left_alone_is_said() -> None:
    scene = weights_alone(random_model("llama-tied"), "int4.g32.sym", costs=False)
    fmt = parse_format("tcq2.ch")
    odd = replace(scene, weight=lambda path: fmt if path == ATTENTION else scene.weight(path), online={DOWN: 32})
    awq = parse_rewrite("awq{grid=3}")
    found = awq.decide(odd)
    assert not {DOWN, ATTENTION} & set(found)
    assert awq.outcome(odd, found).declined == [
        f"{DOWN} is not scaled: it is rotated when the model runs",
        f"{ATTENTION} is not scaled: weights in tcq2.ch cannot be rounded one by one, to try factors",
    ]
    inputs = parse_rewrite("awq{grid=3,outputs=false}")
    outcome = inputs.outcome(scene, inputs.decide(scene))
    assert (outcome.declined, len(inputs.decide(scene))) == ([], 4)
    model = random_model("llama-tied")
    changed = copy.deepcopy(model)
    rewrite_module(changed, outcome.edits)
    assert difference(model, changed) < 1e-4
