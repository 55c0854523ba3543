"""What layers do to their inputs survives checkpoints: rounding, static scales, rotation, order of columns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _models import round_to_nearest, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import native
from lowbit.compiler.io.checkpoint import read_checkpoint, write_checkpoint
from lowbit.compiler.io.load import load_quantized, module_inputs, save_quantized
from lowbit.compiler.io.source import open_model
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import scalar_format
from lowbit.quantizers.scheme import load_scheme

IDS = torch.arange(10)[None]
PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on the kernels, so none are compiled."""
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    dispatch.reset()


def rounding_model() -> nn.Module:
    """Every linear layer rounds its inputs; the first gate and up share static scales, an order and a rotation."""
    model = tiny_llama(num_hidden_layers=1)
    perm = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for path, old in list(model.named_modules()):
        if not isinstance(old, nn.Linear) or path == "lm_head":
            continue
        q, more = round_to_nearest(old.weight, scalar_format("int8.ch.sym")), {"activation": "int8.token"}
        if path.endswith(("gate_proj", "up_proj")):
            q = q.in_order(perm)
            scale = torch.tensor([0.03, 0.4])
            more = {"activation": "int4.g32.w1.static", "input_scale": scale, "rotate": 16}  # type: ignore[dict-item]
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, QuantLinear.from_qtensor(q, **more))  # type: ignore[arg-type]
    return model


def test_models_come_back_as_they_were(tmp_path: Path) -> None:
    model = rounding_model()
    out = save_quantized(model, tmp_path / "out")
    loaded, again = load_quantized(out), AutoModelForCausalLM.from_pretrained(out)
    again.save_pretrained(tmp_path / "again")
    third = load_quantized(tmp_path / "again")
    with torch.no_grad():
        want = model(IDS).logits
        for other in (loaded, again, third):
            assert torch.equal(other(IDS).logits, want)
    assert module_inputs(third)[PATH] == native.StoredInput("int4.g32.w1.static", 16)
    checkpoint = read_checkpoint(out)
    assert checkpoint.method == "lowbit"
    assert checkpoint.quantization_config["schema"] == 2
    assert torch.equal(checkpoint.layer_input(PATH).scale, torch.tensor([0.03, 0.4]))
    assert f"{PATH}.input_scale" not in checkpoint.plain_names()


def test_a_run_writes_what_layers_do_to_their_inputs(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    source, scheme = open_model(tmp_path / "base"), load_scheme("w4a16", format="int4.g32.sym", method="rtn")
    q = round_to_nearest(source.tensor(f"{PATH}.weight"), scalar_format("int4.g32.sym"))
    given = native.StoredInput("int8.g32.static", 0, torch.tensor([0.1, 0.2]))
    out = write_checkpoint(tmp_path / "out", source, {PATH: lambda: q}, scheme, report={}, inputs={PATH: given})
    found = read_checkpoint(out).layer_input(PATH)
    assert (found.activation, found.rotate) == ("int8.g32.static", 0)
    assert torch.equal(found.scale, given.scale)
    assert load_quantized(out).get_submodule(PATH).activation == "int8.g32.static"


@pytest.mark.parametrize(
    "bad", [{"activation": "int9.token"}, {"rotate": 22}, {"rotate": "8"}, {"scale": 1}, {"more": 1}, "int8.token"]
)
def test_inputs_that_cannot_be_read_are_refused(bad: object) -> None:
    with pytest.raises(CheckpointError, match="LB0114"):
        native.inputs_from_config({"inputs": {"a": bad}}, "here")
