"""Rewrites leave the function of a model as it is, whatever its architecture, in memory and as a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _families import FAMILIES, random_model
from _rewrites import applied, difference, observed, scene_of, with_run_time
from torch import nn

from lowbit.compiler.errors import FormatError
from lowbit.compiler.frontend.structure import model_structure
from lowbit.compiler.io.rewritten import RewrittenSource, rewrite_module
from lowbit.compiler.io.source import open_model
from lowbit.compiler.ir.sites import Norm, Rows, Values
from lowbit.compiler.job.models import load_dense
from lowbit.quantizers.rewrites import Decisions, Outcome, Scene, parse_rewrite, parse_rewrites, rewrite_text
from lowbit.quantizers.rewrites.scaling import readers_of, rounding_error

FULL = {"smooth": "smooth{outputs=0.3}", "rotate": "rotate", "awq": "awq{grid=4}", "permute": "permute"}


@pytest.mark.parametrize("name", list(FULL))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_function_stays(family: str, name: str) -> None:
    model = random_model(family)
    changed, outcome = applied(model, parse_rewrite(FULL[name]))
    assert outcome.edits or outcome.orders
    assert difference(model, with_run_time(changed, outcome)) < 1e-4


@pytest.mark.parametrize("family", ["llama-tied", "gemma", "opt"])
def test_one_after_the_other_and_through_a_checkpoint(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    source, changed, online = open_model(tmp_path / "model"), copy.deepcopy(model), {}
    structure = model_structure(model)
    for rewrite in parse_rewrites(["smooth{alpha=0.7}", "rotate{seed=3}", "awq{grid=4}", "permute"]):
        scene = scene_of(changed, structure=structure, online=online)
        outcome = rewrite.outcome(scene, rewrite.decide(scene))
        rewrite_module(changed, outcome.edits)
        with_run_time(changed, outcome)
        source = RewrittenSource(source, outcome.edits)
        online.update(outcome.online)
    loaded = with_run_time(load_dense(source), Outcome(online=online))
    assert loaded.config.tie_word_embeddings is False
    assert difference(model, changed) < 1e-4
    assert difference(changed, loaded) < 1e-5


def test_without_rounded_activations_nothing_is_rotated_at_run_time() -> None:
    model = random_model("llama-tied")
    with torch.no_grad():  # a channel of values that is large in all heads
        model.get_submodule("model.layers.0.self_attn.v_proj").weight[::12] *= 30  # type: ignore[operator]
    scene = replace(scene_of(model), activation=lambda path: None)
    outcome = parse_rewrite("rotate").outcome(scene, {})
    assert (outcome.online, outcome.declined) == ({}, [])
    changed = copy.deepcopy(model)
    rewrite_module(changed, outcome.edits)
    assert difference(model, changed) < 1e-4
    rows = changed.get_submodule("model.layers.0.self_attn.v_proj").weight.norm(dim=1)  # type: ignore[operator]
    assert float(rows.max()) < 4 * float(rows.min())


def test_what_a_llama_is_made_of() -> None:
    structure = model_structure(random_model("llama"))
    layer = "model.layers.0."
    first = structure.sites[0]
    assert first.consumers == tuple(f"{layer}self_attn.{n}_proj" for n in "qkv")
    assert first.producer == Norm(f"{layer}input_layernorm", f"{layer}input_layernorm.weight")
    assert structure.sites[1].producer == Values(f"{layer}self_attn.v_proj", 4, 2, 12)
    assert structure.sites[3].producer == Rows((f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"), f"{layer}mlp.up_proj")
    assert structure.stream is not None
    assert structure.stream.writers == tuple(
        f"model.layers.{i}.{p}" for i in (0, 1) for p in ("self_attn.o_proj", "mlp.down_proj")
    )


def test_gemma_norms_multiply_by_one_plus_their_weight() -> None:
    structure = model_structure(random_model("gemma"))
    assert {s.producer.offset for s in structure.sites if isinstance(s.producer, Norm)} == {1.0}


def test_what_cannot_be_rewritten_is_declined_with_a_reason() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 80}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    gemma2 = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, head_dim=16)).eval()
    _, outcome = applied(gemma2, parse_rewrite("rotate{online=false,heads=false}"))
    assert outcome.declined[0].startswith("the residual stream is not rotated: lb.rms_norm in model.layers.0.post_att")
    assert not outcome.edits
    phi = Phi3ForCausalLM(Phi3Config(**sizes, **heads, pad_token_id=0)).eval()
    _, outcome = applied(phi, parse_rewrite("smooth{outputs=0.5}"))
    assert any("mlp.down_proj is not smoothed: it is made by chunk" in line for line in outcome.declined)


def test_smoothing_flattens_and_rotation_spreads() -> None:
    model = random_model("llama")
    site = "model.layers.1.mlp.gate_proj"

    def peak(m: nn.Module) -> float:
        stats = observed(m, [site])[site]
        return float(stats.absmax.max() / stats.absmax.median())

    before = peak(model)
    smoothed, rotated = (applied(model, parse_rewrite(text))[0] for text in ("smooth", "rotate"))
    assert before > 8
    assert peak(smoothed) < before / 2
    assert peak(rotated) < before / 3


def test_searching_alpha_lowers_the_error_it_looks_at() -> None:
    scene = scene_of(random_model("llama"), "int4.ch.sym")
    fixed, searched = (errors_of(scene, parse_rewrite(t).decide(scene)) for t in ("smooth", "smooth{search=true}"))
    assert all(searched[name] <= fixed[name] for name in fixed)
    assert sum(searched.values()) < sum(fixed.values())


def errors_of(scene: Scene, found: Decisions) -> dict[str, float]:
    """What rounding to nearest costs each site after it is divided by the factors found."""
    sites = {s.name: s for s in scene.structure.sites}
    return {name: rounding_error(scene.stats[name], readers_of(scene, sites[name]), s) for name, s in found.items()}


@pytest.mark.parametrize(
    "text",
    ["smooth", "smooth{alpha=0.8,search=true}", "rotate{seed=4,online=false}", "awq{grid=5,outputs=false}", "permute"],
)
def test_texts_round_trip(text: str) -> None:
    assert rewrite_text(parse_rewrite(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "smoth",
        "smooth{beta=1}",
        "smooth{alpha=x}",
        "smooth{alpha=2}",
        "rotate{online=1}",
        "awq{grid=0}",
        "permute{rank=sum}",
    ],
)
def test_bad_texts_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match="LB0245"):
        parse_rewrite(text)


def test_the_order_of_rewrites_is_checked() -> None:
    with pytest.raises(FormatError, match=r"LB0245.*order"):
        parse_rewrites(["permute", "smooth"])
