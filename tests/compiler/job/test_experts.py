"""Mixture-of-experts models through a run, in memory and from files, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _cli import invoke_json
from _experts import mixture
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.compiler.io.source import open_model
from lowbit.compiler.job.run import run
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.experts import expert_layers
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.scheme import load_scheme

IDS = torch.randint(0, 80, (3, 16), generator=torch.Generator().manual_seed(1))
SCHEME = replace(load_scheme("w4a16"), weight=parse_format("int4.g32.sym"))


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    dispatch.reset()
    yield
    dispatch.reset()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS, use_cache=False).logits
    return out


@pytest.mark.parametrize("name", ["Mixtral", pytest.param("Qwen3Moe", marks=pytest.mark.slow)])
def test_in_memory_and_from_files_are_the_same(name: str, tmp_path: Path) -> None:
    model = mixture(name)
    model.save_pretrained(tmp_path / "float")  # type: ignore[operator]  # under the names of published checkpoints
    want = _logits(lowbit.quantize(model, SCHEME, calibration=IDS))
    layers = expert_layers(model)
    assert layers
    assert all(isinstance(m, QuantLinear) for m in layers.values())
    result = run(str(tmp_path / "float"), tmp_path / "run", SCHEME, IDS)
    assert {x["path"] for x in result.report["layers"]} >= set(layers)
    lowbit.save(model, tmp_path / "saved")
    for folder in ("run", "saved"):
        assert torch.equal(_logits(lowbit.load(tmp_path / folder)), want)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.equal(_logits(stock), want)
    stock.save_pretrained(tmp_path / "again")
    assert torch.equal(_logits(lowbit.load(tmp_path / "again")), want)


def test_stacked_files_are_read_a_layer_at_a_time(tmp_path: Path) -> None:
    model = mixture("GptOss")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    source = open_model(tmp_path)
    stack = model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"]  # [E, K, 2 x N], rows in turns
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    assert torch.equal(source.tensor(name), stack[2].T[1::2])
    assert source.shape(name) == (96, 64)


def test_experts_no_token_reached_are_rounded_to_nearest_and_reported(tmp_path: Path) -> None:
    model: Any = mixture("Mixtral")
    gate = model.model.layers[0].mlp.gate
    gate.forward = lambda x: _always_the_first_two(x)
    lowbit.quantize(model, SCHEME, calibration=IDS)
    del gate.forward
    plain = mixture("Mixtral")
    lowbit.quantize(plain, SCHEME, method="rtn")
    for path in ("model.layers.0.mlp.experts.3.down_proj", "model.layers.0.mlp.experts.3.up_proj"):
        assert torch.equal(_codes(model, path), _codes(plain, path))
    assert not torch.equal(
        _codes(model, "model.layers.0.mlp.experts.0.up_proj"), _codes(plain, "model.layers.0.mlp.experts.0.up_proj")
    )
    # From files: one token has two of four experts.
    mixture("Mixtral").save_pretrained(tmp_path / "float")  # type: ignore[operator]
    one = run(str(tmp_path / "float"), tmp_path / "run", SCHEME, IDS[:1, :1].repeat(1, 2)).report
    blind = [x["path"] for x in one["layers"] if "no calibration statistics; rounded to nearest" in x["notes"]]
    assert len(blind) == 3 * 2
    assert all(".experts." in path for path in blind)
    assert any(note.endswith("no calibration statistics; rounded to nearest") for note in one["notes"])


def _always_the_first_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = x.reshape(-1, x.shape[-1]).shape[0]
    return torch.zeros(tokens, 4), torch.full((tokens, 2), 0.5), torch.tensor([[0, 1]]).expand(tokens, 2)


def _codes(model: nn.Module, path: str) -> torch.Tensor:
    layer = model.get_submodule(path)
    assert isinstance(layer, QuantLinear)
    q: Any = layer.qtensor()
    codes: torch.Tensor = q.codes
    return codes


def test_a_scheme_without_experts_leaves_them_stacked() -> None:
    model = mixture("Mixtral")
    lowbit.quantize(model, replace(SCHEME, ignore=(*SCHEME.ignore, "*experts*")), method="rtn")
    assert "model.layers.0.mlp.experts.gate_up_proj" in model.state_dict()


def test_plan_counts_experts_and_says_who_reads_them(tmp_path: Path) -> None:
    mixture("Mixtral").save_pretrained(tmp_path)  # type: ignore[operator]
    found = invoke_json("plan", tmp_path, "-s", "w4a16")
    assert sum(".experts." in x["path"] and bool(x["format"]) for x in found["layers"]) == 3 * 4
    assert "lowbit's own layout" in found["consumers"]["transformers"]
