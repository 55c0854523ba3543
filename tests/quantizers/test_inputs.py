"""What layers do with their inputs, how many groups get eight bits, and schemes that say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit.compiler.errors import FormatError, RunError
from lowbit.quantizers.formats import parse_activation
from lowbit.quantizers.inputs import LayerInput, input_hooks, static_scales, wide_share
from lowbit.quantizers.methods import make_method
from lowbit.quantizers.methods.fmpq import group_gains, wide_groups
from lowbit.quantizers.observe import SiteObserver, SiteStats
from lowbit.quantizers.scheme import PRESETS, Scheme, load_scheme

RNG = torch.Generator().manual_seed(0)
LOUD = torch.ones(64)
LOUD[[5, 17, 40, 63]] = 30.0
X = torch.randn(48, 64, generator=RNG) * LOUD


def stats_of(x: torch.Tensor) -> SiteStats:
    """Statistics of [tokens, K]."""
    layer = nn.Identity()
    with SiteObserver({"x": layer}, len(x)) as seen:
        layer(x)
    return seen.stats()["x"]


def error(what: LayerInput) -> float:
    """Relative squared error of X rounded."""
    return float((what.rounded(X) - X).square().sum() / X.square().sum())


def test_observed_statistics() -> None:
    stats = stats_of(X)
    assert torch.equal(stats.absmax, X.abs().amax(0))
    torch.testing.assert_close(stats.moment, X.square().mean(0))
    assert torch.equal(stats.rows, X)
    assert stats.tokens == 48


def test_the_sample_is_spread_over_batches() -> None:
    layer = nn.Identity()
    x = torch.arange(2000.0)[:, None]
    with SiteObserver({"x": layer}, 2000) as seen:
        for part in x.split(300):
            layer(part[None])
    assert seen.stats()["x"].rows.flatten().tolist() == list(range(0, 2000, 7))


def test_mixed_groups_need_an_order() -> None:
    order = torch.argsort(X.abs().amax(0), descending=True)
    mixed = parse_activation("int4.g16.w1")
    sorted_, plain = (error(LayerInput(mixed, o)) for o in (order, None))
    assert sorted_ < plain / 20
    assert error(LayerInput(parse_activation("int4.token"))) > plain
    assert torch.equal(LayerInput(mixed, order).rounded(X)[:, order], mixed.apply(X[:, order]))


def test_static_scales_cost_more_than_dynamic_ones() -> None:
    static = parse_activation("int4.g16.static")
    scales = static_scales(stats_of(X), static)
    assert float(static.round(X, scales)[0].abs().max()) <= 7  # what was seen does not saturate
    assert error(LayerInput(static, None, scales)) > error(LayerInput(parse_activation("int4.g16")))


def test_hooks_give_siblings_one_tensor() -> None:
    seen: list[torch.Tensor] = []
    layers = nn.ModuleDict({n: nn.Linear(64, 4) for n in "abc"})
    what = LayerInput(parse_activation("int4.g16"), None, None, 64)
    with input_hooks(layers, {"a": what, "b": what}, rounding=True):
        for layer in layers.values():
            layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
            layer(X)
    assert seen[0] is seen[1]
    assert torch.equal(seen[0], what.apply(X))
    assert seen[2] is X
    fresh = nn.Identity()
    with input_hooks({"a": fresh}, {"a": what}, rounding=False):
        assert torch.equal(fresh(X), what.rotated(X))
    assert fresh(X) is X


def test_gains_fall_along_a_sorted_site() -> None:
    stats = stats_of(X).gathered(torch.argsort(X.abs().amax(0), descending=True))
    gains = group_gains(stats, parse_activation("int4.g16"), [torch.randn(8, 64, generator=RNG)])
    assert float(gains[0]) > 20 * float(gains[1:].max()) > 0
    static = group_gains(stats, parse_activation("int4.g16.static"), [torch.ones(8, 64)])
    assert static.shape == gains.shape  # judged as if scales were dynamic


def test_wide_groups_go_where_they_help_most() -> None:
    gains = {"a": torch.tensor([9.0, 1.0, 0.1, 0.1]), "b": torch.tensor([2.0, 1.5]), "c": torch.tensor([0.0, 8.0])}
    sizes = dict.fromkeys(gains, 16)
    assert wide_groups(gains, sizes, 0.13) == {"a": 1, "b": 0, "c": 0}
    # The second group of c is worth more than two others, and takes its first along.
    assert wide_groups(gains, sizes, 0.5) == {"a": 1, "b": 1, "c": 2}
    assert wide_groups(gains, sizes, 1.0) == {"a": 4, "b": 2, "c": 2}
    assert wide_groups(gains, sizes, 0.0) == dict.fromkeys(gains, 0)
    formats = dict.fromkeys(gains, parse_activation("int4.g16"))
    assert make_method("fmpq", {"share": 0.3}).widths(gains, formats) == {"a": 1, "b": 1, "c": 1}  # type: ignore[attr-defined]


def test_the_share_of_eight_bits_counts_sites_once() -> None:
    wide, narrow = LayerInput(parse_activation("int4.g16.w1")), LayerInput(parse_activation("int8.token"))
    inputs = {"q": wide, "k": wide, "down": narrow, "kept": LayerInput(rotation=4)}
    assert wide_share(inputs, {"q": 64, "k": 64, "down": 32, "kept": 32}) == (16 + 32) / 96


@pytest.mark.parametrize("options", [{"share": 2.0}, {"budget": "fair"}])
def test_fmpq_checks_its_options(options: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="LB0503"):
        make_method("fmpq", options)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_round_trip(name: str) -> None:
    assert Scheme.from_dict(PRESETS[name].to_dict()) == PRESETS[name]


def test_a_scheme_file_says_what_is_rounded(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'weight = "int4.g64.sym"\nactivation = "int8.token"\nkv = "kv4.kc64.vt.w64"\nrewrites = ["smooth{alpha=0.6}"]\n'
        '[activations]\n"*.o_proj" = "int8.g64"\n"*.0.*" = "keep"\n'
    )
    scheme = load_scheme(str(path))
    assert str(scheme.activation_for("model.layers.1.mlp.up_proj")) == "int8.token"
    assert str(scheme.activation_for("model.layers.1.self_attn.o_proj")) == "int8.g64"
    assert scheme.activation_for("model.layers.0.mlp.up_proj") is None
    assert scheme.activation_for("lm_head") is None  # its weights are kept
    assert str(scheme.kv) == "kv4.kc64.vt.w64"
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    plain = load_scheme(str(path), activation="none", kv="none", rewrites=["none"])
    assert (plain.activation, plain.kv, plain.rewrites) == (None, None, ())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "int4"}, "LB0240"),
    "no text": ({"activation": 8}, "LB0231"),
    "rewrites": ({"rewrites": "smooth"}, "LB0231"),
    "rewrite": ({"rewrites": ["smoth"]}, "LB0245"),
    "exceptions": ({"activations": {"*": 4}}, "LB0231"),
    "kv": ({"kv": "kv5"}, "LB02"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_schemes_are_refused(case: str) -> None:
    values, code = BAD[case]
    with pytest.raises(FormatError, match=code):
        Scheme.from_dict({"weight": "int4.g64.sym", **values})
