"""Runs whose layers round their inputs: rewrites, formats and orders end up in the checkpoint, and in memory alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _jobs import contents, quantize, save_tiny, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.compiler.errors import FormatError, RunError
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.io.rewritten import rewrite_module
from lowbit.compiler.io.source import open_model
from lowbit.compiler.job import journal
from lowbit.compiler.job.blocks import linears_in
from lowbit.compiler.job.inmemory import choose
from lowbit.compiler.job.models import load_dense
from lowbit.compiler.runtime import dispatch
from lowbit.quantizers.formats import parse_activation
from lowbit.quantizers.inputs import LayerInput, input_hooks
from lowbit.quantizers.observe import SiteStats
from lowbit.quantizers.rewrites import Permute, parse_rewrite
from lowbit.quantizers.scheme import Scheme

SCHEMES: dict[str, dict[str, Any]] = {
    "w8a8": {"weight": "int8.ch.sym", "method": "rtn", "activation": "int8.token", "rewrites": ["smooth"]},
    "w4a4": {
        "weight": "int4.g32.sym", "method": "fmpq", "activation": "int4.g32.asym", "rewrites": ["permute"],
        "options": {"share": 0.25, "budget": "greedy", "refits": 0},
    },
    "outliers": {
        "weight": "int8.ch.sym", "method": "rtn", "activation": "int8.token.w32x16",
        "rewrites": ["permute{outliers=2.6}"],
    },
    "rotated": {
        "weight": "int4.ch.sym", "activation": "int4.token.c90", "rewrites": ["rotate"], "options": {"refits": 0},
    },
    "weights alone": {"weight": "int4.g32.sym", "rewrites": ["rotate"], "options": {"refits": 0}},
    "scaled weights": {"weight": "int4.g32.sym", "rewrites": ["awq{grid=6}"], "options": {"refits": 0}},
    "static": {
        "weight": "int8.g32.sym", "method": "rtn", "activation": "int8.token.static",
        "rewrites": ["smooth", "rotate", "permute"], "activations": {"*.o_proj": "int8.g32", "*.1.mlp.*": "keep"},
    },
}  # fmt: skip
IDS = token_ids(2, 24, seed=5)


@pytest.fixture(autouse=True)
def _no_compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is tested here is not the kernels."""
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    dispatch.reset()
    yield
    dispatch.reset()


def scheme_of(name: str, **changes: Any) -> Scheme:
    """One of the schemes above."""
    return Scheme.from_dict({"name": name, **SCHEMES[name], **changes})


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """float32 [2, 24, vocabulary]."""
    out: torch.Tensor = model(IDS).logits
    return out


def emulated(folder: Path, scheme: Scheme) -> torch.Tensor:
    """Logits of the float model with the chosen weights, inputs rounded by hooks: no kernel involved."""
    model = load_dense(open_model(folder))
    choice = choose(model, scheme, token_ids())
    for edits in choice.edits:
        rewrite_module(model, edits)
    for path, (q, _) in choice.layers.items():
        model.get_submodule(path).weight.data.copy_(q.dequantize())  # type: ignore[operator, union-attr]
    with input_hooks(linears_in(model, ""), choice.inputs, rounding=True):
        return logits(model)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_checkpoint_computes_what_was_chosen(name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    quantize(source, tmp_path / "out", scheme_of(name))
    expected, float_logits = emulated(source, scheme_of(name)), logits(load_dense(open_model(source)))
    loaded = logits(lowbit.load(tmp_path / "out"))
    scale = float(float_logits.norm())
    assert float((loaded - expected).norm()) < 2e-3 * scale
    assert 2e-3 * scale < float((expected - float_logits).norm()) < 0.3 * scale
    if name == "outliers":  # as many as calibration found in each place, 16 bits for no more than these
        inputs = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["inputs"]
        found = {what["activation"] for what in inputs.values()}
        assert {"int8.token"} < found <= {"int8.token", "int8.token.w32x16", "int8.token.w64x16", "int8.token.w96x16"}
    by_transformers = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    if name in ("weights alone", "scaled weights"):  # all of it is in the weights: nothing is left to do at run time
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "compressed-tensors"
    if name == "w8a8":  # read by compressed-tensors, which divides by 127.5 where the largest level is 127
        assert float((by_transformers - loaded).norm()) < 1e-2 * scale
    else:
        torch.testing.assert_close(by_transformers, loaded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["w4a4", "static", "weights alone", "scaled weights"])
def test_in_memory_is_the_same(name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    quantize(source, tmp_path / "out", scheme_of(name))
    model = lowbit.quantize(load_dense(open_model(source)), scheme_of(name), calibration=token_ids())
    assert torch.equal(logits(model), logits(lowbit.load(tmp_path / "out")))
    lowbit.save(model, tmp_path / "saved")
    assert torch.equal(logits(lowbit.load(tmp_path / "saved")), logits(model))


def test_the_report_and_the_checkpoint_say_what_is_rounded(tmp_path: Path) -> None:
    result = quantize(save_tiny(tmp_path / "model"), tmp_path / "out", scheme_of("w4a4"))
    assert result.report["rewrites"] == {"done": ["permute"], "declined": []}
    assert 0.15 < result.report["activations"]["share_of_8_bits"] <= 0.25
    checkpoint = read_checkpoint(tmp_path / "out")
    path = "model.layers.0.mlp."
    assert str(checkpoint.modules[f"{path}gate_proj"]) == "int4.g32.sym.perm"
    assert str(checkpoint.modules[f"{path}down_proj"]) == "int4.g32.sym"  # folded into the rows of gate and up
    layers = {layer["path"]: layer for layer in result.report["layers"]}
    assert layers[f"{path}up_proj"]["activation"].startswith("int4.g32")
    assert layers[f"{path}up_proj"]["activation"] == layers[f"{path}gate_proj"]["activation"]
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["inputs"]
    assert declared[f"{path}up_proj"]["activation"] == layers[f"{path}up_proj"]["activation"]


def test_a_rotated_head_is_untied_in_the_config(tmp_path: Path) -> None:
    quantize(save_tiny(tmp_path / "model", tie_word_embeddings=True), tmp_path / "out", scheme_of("rotated"))
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in checkpoint.plain_names()
    assert bool((checkpoint.tensor("model.norm.weight") == 1).all())


@pytest.mark.parametrize("name", ["w8a8", "w4a4"])
def test_the_cache_format_comes_back_with_the_model(name: str, tmp_path: Path) -> None:
    source, scheme = save_tiny(tmp_path / "model"), scheme_of(name, kv="kv4.kc32.vt.w32")
    quantize(source, tmp_path / "out", scheme)
    model = lowbit.load(tmp_path / "out")
    assert model.kv_format == "kv4.kc32.vt.w32"
    lowbit.save(model, tmp_path / "again")
    assert read_checkpoint(tmp_path / "again").kv == "kv4.kc32.vt.w32"
    in_memory = lowbit.quantize(load_dense(open_model(source)), scheme, calibration=token_ids())
    assert in_memory.kv_format == "kv4.kc32.vt.w32"


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("after", [2, 4, 7])
def test_a_killed_run_goes_on_with_the_same_decisions(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, scheme = save_tiny(tmp_path / "model"), scheme_of("static", method="gptq", options={"refits": 0})
    quantize(source, tmp_path / "whole", scheme)
    plain, count = journal.Journal.append, 0

    def dying(self: journal.Journal, record: Any) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise Killed
        plain(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "append", dying)
        with pytest.raises(Killed):
            quantize(source, tmp_path / "resumed", scheme)
    quantize(source, tmp_path / "resumed", scheme)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_aware_calibration_changes_the_weights(tmp_path: Path) -> None:
    model = load_dense(open_model(save_tiny(tmp_path / "model")))
    plain, aware = (
        choose(model, scheme_of("w4a4", options={"share": 0.25, "refits": 0, "aware": a}), token_ids()).layers
        for a in (False, True)
    )
    path = "model.layers.1.mlp.down_proj"
    assert not torch.equal(plain[path][0].dequantize(), aware[path][0].dequantize())


def test_outlier_channels_keep_their_precision() -> None:
    """Channels beyond the threshold are rounded to 16 bits and leave the scale of the others alone (LLM.int8())."""
    x, order = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)), torch.randperm(96)
    x[:, 5], x[:, 70] = 80 * x[:, 5], 30 * x[:, 70]
    rewrite = parse_rewrite("permute{outliers=6.0}")
    assert isinstance(rewrite, Permute)
    fmt = parse_activation("int8.token.w32x16")
    stats = SiteStats(x.abs().amax(0), x.square().mean(0), x, 40)
    assert (rewrite.wide(stats, fmt), rewrite.wide(stats, parse_activation("int8.g16.w1x16"))) == (32, 1)
    order = torch.argsort(stats.absmax, descending=True)
    error = (LayerInput(replace(fmt, wide=32), order).apply(x) - x).abs()
    assert float(error[:, order[:2]].max()) < 80 * 5 / 32639
    narrow = x[:, order[32:]].abs().amax(1)
    assert (error[:, order[32:]] <= narrow[:, None] / 127 * 0.501).all()
    plain = (parse_activation("int8.token").apply(x) - x).abs()
    assert float(plain[:, order[32:]].mean()) > 5 * float(error[:, order[32:]].mean())


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fmpq without groups": ({"method": "fmpq"}, RunError, "LB0516"),
    "a rewrite for nothing": ({"rewrites": ["smooth"]}, RunError, "LB0516"),
    "two ways to say what is wide": (
        {"method": "fmpq", "activation": "int4.g32", "rewrites": ["permute{outliers=6.0}"]},
        RunError,
        "LB0516",
    ),
    "vectors": ({"weight": "vq.d4.k16", "method": "vptq", "activation": "int8.token"}, FormatError, "LB0243"),
    "groups that do not fit": ({"weight": "int4.g32.sym", "activation": "int8.g48"}, FormatError, "LB0243"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_work_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    values, error, code = REFUSED[case]
    scheme = Scheme.from_dict({"name": "x", "weight": "int4.g32.sym", **values})
    with pytest.raises(error, match=code):
        quantize(save_tiny(tmp_path / "model"), tmp_path / "out", scheme)
    assert not (tmp_path / "out").exists()
