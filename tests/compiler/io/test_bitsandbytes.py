"""Reading bitsandbytes checkpoints: bytes that the package wrote, and whole models made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import dequantized, random_qtensor, tiny_llama
from safetensors.torch import save_file
from torch import nn

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.bitsandbytes import read_layers
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.io.load import load_quantized
from lowbit.compiler.io.safetensors_file import SafetensorsFile
from lowbit.quantizers.formats.levels import NORMAL_FLOAT4
from lowbit.quantizers.qtensor import QTensor

WEIGHT = (torch.arange(128).reshape(2, 64) * 37 % 101 - 50).float() / 64
CODES = bytes.fromhex(
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1"
    "6d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18"
)
"""What bitsandbytes 0.50.2 makes of that weight, with one scale, 50 / 64, for each row."""
Tensors = dict[str, torch.Tensor]


def text(**values: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def nf4(q: QTensor, nested: bool = False) -> tuple[Tensors, torch.Tensor]:
    """The tensors bitsandbytes would store for the codes of `q`, and the scales they stand for."""
    n, k = q.shape
    size, scale = q.fmt.granularity.group, q.scale.float().reshape(-1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": size, "dtype": "float32", "shape": [n, k]}
    pairs = q.codes.reshape(-1, 2)
    tensors = {"weight": (pairs[:, :1] << 4 | pairs[:, 1:]), "weight.quant_map": torch.tensor(NORMAL_FLOAT4)}
    if nested:
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.25}
        table = torch.linspace(-1, 1, 256)
        outer = torch.linspace(0.5, 1.5, -(-len(scale) // 4))
        index = torch.arange(len(scale)) * 7 % 256
        scale = table[index] * outer.repeat_interleave(4)[: len(scale)] + 0.25
        tensors |= {"weight.nested_quant_map": table, "weight.nested_absmax": outer}
        tensors["weight.absmax"] = index.to(torch.uint8)
    else:
        tensors["weight.absmax"] = scale
    tensors["weight.quant_state.bitsandbytes__nf4"] = text(**state)
    return tensors, scale.reshape(q.scale.shape)


def int8(weight: torch.Tensor) -> Tensors:
    top = weight.abs().amax(1)
    codes = (weight / top[:, None] * 127).round().to(torch.int8)
    return {"weight": codes, "SCB": top, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def layers(tensors: Tensors, folder: Path) -> QTensor:
    """What is read of one layer with these tensors."""
    path = folder / "model.safetensors"
    save_file({f"layer.{name}": t.contiguous() for name, t in tensors.items()}, path)
    file = SafetensorsFile(path)
    reader, _ = read_layers({}, dict.fromkeys((f"layer.{name}" for name in tensors), file), "x")
    return reader.weight("layer", tensors, "x")


def test_what_bitsandbytes_wrote(tmp_path: Path) -> None:
    state = text(quant_type="nf4", blocksize=64, dtype="float32", shape=[2, 64])
    q = layers(
        {
            "weight": torch.tensor(list(CODES), dtype=torch.uint8)[:, None],
            "weight.absmax": torch.tensor([0.78125, 0.78125]),
            "weight.quant_map": torch.tensor(NORMAL_FLOAT4),
            "weight.quant_state.bitsandbytes__nf4": state,
        },
        tmp_path,
    )
    assert str(q.fmt) == "nf4.g64.f32"
    nearest = (WEIGHT[..., None] / 0.78125 - torch.tensor(NORMAL_FLOAT4)).abs().argmin(-1)
    assert torch.equal(q.dequantize(), torch.tensor(NORMAL_FLOAT4)[nearest] * 0.78125)


@pytest.mark.parametrize("nested", [False, True])
def test_scales_of_blocks_and_of_blocks_of_blocks(nested: bool, tmp_path: Path) -> None:
    q = random_qtensor("nf4.g32.f32", 6, 96)
    tensors, scale = nf4(q, nested)
    got = layers(tensors, tmp_path)
    assert torch.equal(got.codes, q.codes)
    assert torch.equal(got.scale, scale)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_models_load_and_run(kind: str, tmp_path: Path) -> None:
    model = tiny_llama()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            weight = state.pop(f"{path}.weight")
            q = random_qtensor("nf4.g32.f32", *weight.shape)
            small = QTensor(q.fmt, q.codes, q.scale * 0.05)
            found = nf4(small)[0] if kind == "nf4" else int8(weight)
            state |= {f"{path}.{name}": t for name, t in found.items()}
    save_file(state, tmp_path / "model.safetensors")
    config = model.config.to_dict()
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        f"load_in_{'4' if kind == 'nf4' else '8'}bit": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint, loaded = read_checkpoint(tmp_path), load_quantized(tmp_path, dtype=torch.float32)
    assert checkpoint.method == "bitsandbytes"
    path = "model.layers.0.mlp.down_proj"
    assert checkpoint.shape(path) == checkpoint.qtensor(path).shape
    ids = torch.arange(12)[None]
    with torch.no_grad():
        got, want = loaded(ids).logits, dequantized(loaded)(ids).logits
        close = model(ids).logits
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
    if kind == "int8":
        assert torch.allclose(got, close, atol=0.05 * float(close.abs().max()))


def test_what_is_refused(tmp_path: Path) -> None:
    tensors, _ = nf4(random_qtensor("nf4.g32.f32", 4, 64))
    name = "weight.quant_state.bitsandbytes__nf4"
    other = {"weight.quant_state.bitsandbytes__fp4": tensors[name]}
    changes: list[tuple[Tensors, str]] = [
        ({"weight": tensors["weight"][:5]}, "must be 128 numbers"),
        ({"weight.absmax": tensors["weight.absmax"] * torch.inf}, "not finite"),
        ({"weight.quant_map": torch.linspace(-1, 1, 16)}, "levels"),
        ({name: tensors[name][:9]}, "quant_state"),
        ({name: text(quant_type="nf4", blocksize=48, shape=[4, 64])}, "cross rows"),
        ({name: text(quant_type="nf4", blocksize=0, shape=[4, 64])}, "contradicts"),
    ]
    for change, why in changes:
        with pytest.raises(CheckpointError, match=f"LB0122.*{why}"):
            layers({**tensors, **change}, tmp_path)
    with pytest.raises(CheckpointError, match=r"LB0122.*fp4, not nf4"):
        layers(other, tmp_path)
    eight = int8(WEIGHT)
    with pytest.raises(CheckpointError, match=r"LB0122.*SCB"):
        layers({**eight, "SCB": torch.ones(3)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"LB0122.*tiles"):
        layers({**eight, "weight_format": torch.tensor(1, dtype=torch.uint8)}, tmp_path)
