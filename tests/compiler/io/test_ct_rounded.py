"""8-bit weights and activations in compressed-tensors' layouts, checked by the package itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _jobs import quantize, save_tiny, token_ids
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.runtime import dispatch
from lowbit.quantizers.scheme import PRESETS, Scheme

IDS = token_ids(2, 24, seed=5)
CASES = {"int8": ("w8a8", torch.int8, "int-quantized"), "e4m3": ("fp8", torch.float8_e4m3fn, "float-quantized")}


@pytest.fixture(autouse=True)
def _no_compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    dispatch.reset()
    yield
    dispatch.reset()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """float32 [2, 24, vocabulary]."""
    out: torch.Tensor = model.eval()(IDS).logits.float()
    return out


@pytest.mark.parametrize("element", list(CASES))
def test_compressed_tensors_computes_the_same(element: str, tmp_path: Path) -> None:
    preset, dtype, layout = CASES[element]
    quantize(save_tiny(tmp_path / "model"), tmp_path / "out", PRESETS[preset])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", layout)
    checkpoint = read_checkpoint(tmp_path / "out")
    path = "model.layers.0.mlp.up_proj"
    assert checkpoint.tensor(f"{path}.weight").dtype == dtype
    assert checkpoint.shape(path) == (96, 64)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).requires_grad_(False)
    ours = lowbit.load(tmp_path / "out")
    assert ours.get_submodule(path).activation == f"{element}.token"  # type: ignore[union-attr]
    original = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    scale = float(original.norm())
    got = theirs(IDS).logits, theirs.get_submodule(path).weight  # decompressed by the first call at the latest
    torch.testing.assert_close(got[1].float(), ours.get_submodule(path).qtensor().dequantize(), rtol=0, atol=0)  # type: ignore[operator, union-attr]
    # The package divides the largest int8 activation by 127.5, lowbit and vLLM's kernels by 127.
    slack = 1.2e-2 if element == "int8" else 2e-3
    assert float((got[0] - logits(ours)).norm()) < slack * scale
    assert 4e-3 * scale < float((logits(ours) - original).norm()) < 5e-2 * scale


def test_other_roundings_use_lowbits_own_layout(tmp_path: Path) -> None:
    scheme = Scheme.from_dict(
        {"name": "x", "weight": "int8.ch.sym", "method": "rtn", "activation": "int8.token",
         "activations": {"*.o_proj": "int8.g32"}}
    )  # fmt: skip
    quantize(save_tiny(tmp_path / "model"), tmp_path / "out", scheme)
    assert read_checkpoint(tmp_path / "out").method == "lowbit"


@pytest.mark.parametrize(
    "change", [{"input_activations": None}, {"weights": {"num_bits": 8, "type": "int", "strategy": "tensor"}}]
)
def test_what_lowbit_does_not_run_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    quantize(save_tiny(tmp_path / "model"), tmp_path / "out", PRESETS["w8a8"])
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="LB0114"):
        read_checkpoint(tmp_path / "out")
