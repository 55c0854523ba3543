"""Models in float formats from quantization to running: files, state dicts, fused kernels, and chosen formats."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _cli import invoke_json
from _jobs import quantize, save_tiny, scheme, token_ids
from _models import dequantized, tiny_llama
from torch import nn

from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.job.inmemory import choose_codes
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.compile import compile_model
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import ALIASES, parse_format
from lowbit.quantizers.methods import Rtn, quantize_weight

CHOICE = "int6.ch.sym|e3m2.ch|e2m3.ch"
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(autouse=True)
def _reference_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dispatch.reset()
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    yield
    dispatch.reset()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("floats") / "model")


def swapped(text: str) -> nn.Module:
    """A small model rounded to `text`; of choices each layer has the best."""
    net: nn.Module = tiny_llama()
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.Linear) and not path.endswith("lm_head"):
            found = quantize_weight(Rtn(), module.weight.detach(), parse_format(text), None)
            parent, _, name = path.rpartition(".")
            setattr(net.get_submodule(parent), name, QuantLinear.from_qtensor(found.qtensor))
    return net


@pytest.mark.parametrize("text", ["nvfp4", "mxfp4", "e3m2.ch", CHOICE])
def test_compiled_models_say_what_the_oracle_says(text: str) -> None:
    net = swapped(text)
    oracle, before = dequantized(copy.deepcopy(net)), net.state_dict()
    compile_model(net, max_tokens=24)
    after = net.state_dict()
    assert set(after) == set(before)
    raw = {
        name: (t.contiguous().view(torch.uint8), after[name].contiguous().view(torch.uint8))
        for name, t in before.items()
    }
    assert all(torch.equal(a, b) for a, b in raw.values())
    with torch.no_grad():
        got, want = net(IDS).logits.double(), oracle(IDS).logits.double()
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("text", ["nvfp4", "mxfp6_e2m3", "e4m3.ch"])
def test_files_hold_what_was_computed(text: str, model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", scheme(text))
    found, checkpoint = choose_codes(tiny_llama(), scheme(text), token_ids()), read_checkpoint(tmp_path / "out")
    assert set(checkpoint.modules) == set(found)
    for path, (q, line) in found.items():
        assert torch.equal(checkpoint.qtensor(path).dequantize(), q.dequantize()), path
        assert line.proxy_error <= line.rtn_error
    written = read_checkpoint(tmp_path / "out").modules
    assert {str(fmt) for fmt in written.values()} == {ALIASES.get(text, text)}


def test_each_layer_keeps_the_format_that_was_chosen(model: Path, tmp_path: Path) -> None:
    result = quantize(model, tmp_path / "out", scheme(CHOICE, "rtn"), calibration=None)
    checkpoint, net = read_checkpoint(tmp_path / "out"), tiny_llama()
    for layer in result.report["layers"]:
        weight = net.get_submodule(layer["path"]).weight.detach()
        best = quantize_weight(Rtn(), weight, parse_format(CHOICE), None).qtensor
        assert layer["format"] == str(best.fmt) == str(checkpoint.qtensor(layer["path"]).fmt)
        assert torch.equal(checkpoint.qtensor(layer["path"]).codes, best.codes)
        assert "chosen over" in " ".join(layer["notes"])


def test_plans_know_floats_and_choices(model: Path) -> None:
    for text in ("nvfp4", CHOICE):
        plan = invoke_json("plan", model, "--format", text, "--samples", 1)
        formats = {layer["format"] for layer in plan["layers"] if layer["format"]}
        assert formats == {ALIASES.get(text, text)}
