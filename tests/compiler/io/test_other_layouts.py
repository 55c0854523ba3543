"""Reading AWQ and block FP8 checkpoints: tensors made by hand as their programs make them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import dequantized, random_qtensor, tiny_llama
from safetensors.torch import save_file
from torch import nn

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import awq, block_fp8
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.io.load import load_quantized
from lowbit.compiler.io.safetensors_file import SafetensorsFile
from lowbit.quantizers.qtensor import QTensor

Tensors = dict[str, torch.Tensor]
Make = Callable[[int, int], tuple[Tensors, torch.Tensor]]


def awq_words(numbers: torch.Tensor) -> torch.Tensor:
    """[A, B] -> int32 [A, B / 8] as AutoAWQ's `WQLinear_GEMM.from_linear` packs them, a number at a time."""
    order, out = [0, 2, 4, 6, 1, 3, 5, 7], torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
    for col in range(out.shape[1]):
        for i in range(8):
            out[:, col] |= numbers[:, col * 8 + order[i]].long() << (4 * i)
    return out.to(torch.int32)


def awq_layer(n: int, k: int) -> tuple[Tensors, torch.Tensor]:
    """Tensors of a layer with groups of 32, and the dense weight they stand for."""
    q = random_qtensor("int4.g32.asym", n, k)
    assert q.zero is not None
    small = QTensor(q.fmt, q.codes, q.scale * 0.02, q.zero)
    tensors = {"qweight": awq_words(q.codes.t()), "qzeros": awq_words(q.zero.t()), "scales": small.scale.t()}
    return tensors, small.dequantize()


def fp8_layer(n: int, k: int) -> tuple[Tensors, torch.Tensor]:
    """Tensors of a layer with blocks of 48 x 48, whose last ones are smaller, and the dense weight."""
    rng = torch.Generator().manual_seed(n)
    weight = torch.randn(n, k, generator=rng).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // 48), -(-k // 48), generator=rng) * 0.05 + 0.01
    wide = scale.repeat_interleave(48, 0)[:n].repeat_interleave(48, 1)[:, :k]
    return {"weight": weight, "weight_scale_inv": scale}, weight.float() * wide


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(("config", "make"), [(AWQ, awq_layer), (FP8, fp8_layer)], ids=["awq", "fp8"])
def test_models_load_and_run(config: dict[str, Any], make: Make, tmp_path: Path) -> None:
    model = tiny_llama()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            tensors, dense = make(*state.pop(f"{path}.weight").shape)
            module.weight.data.copy_(dense)
            state |= {f"{path}.{name}": t.contiguous() for name, t in tensors.items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "quantization_config": config}))
    checkpoint, loaded = read_checkpoint(tmp_path), load_quantized(tmp_path, dtype=torch.float32)
    for path in checkpoint.modules:
        weight = model.get_submodule(path).weight
        assert checkpoint.shape(path) == tuple(weight.shape)
        assert torch.equal(checkpoint.qtensor(path).dequantize(), weight)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        got, want = loaded(ids).logits, model(ids).logits
        assert torch.allclose(dequantized(loaded)(ids).logits, want, atol=1e-5 * float(want.abs().max()))
    assert torch.allclose(got, want, atol=1e-3 * float(want.abs().max()))


def refused(module: Any, config: dict[str, Any], tensors: Tensors, folder: Path, why: str) -> None:
    path = folder / "model.safetensors"
    save_file({f"layer.{name}": t.contiguous() for name, t in tensors.items()}, path)
    files = dict.fromkeys((f"layer.{name}" for name in tensors), SafetensorsFile(path))
    with pytest.raises(CheckpointError, match=f"LB0122.*{why}"):
        module.read_layers(config, files, "x")[0].weight("layer", tensors, "x")


def test_what_is_refused(tmp_path: Path) -> None:
    four, _ = awq_layer(16, 64)
    for change, why in (({"bits": 8}, "only 4 bits"), ({"version": "gemv"}, "gemm"), ({"zero_point": False}, "zero"),
                        ({"group_size": 0}, "group size")):  # fmt: skip
        refused(awq, {**AWQ, **change}, four, tmp_path, why)
    refused(awq, AWQ, {**four, "qzeros": four["qzeros"][:1]}, tmp_path, r"qzeros .* must be \[2, 2\]")
    refused(awq, AWQ, {**four, "qweight": four["qweight"].float()}, tmp_path, "qweight")
    refused(awq, AWQ, {"other": four["scales"]}, tmp_path, "no tensor")
    eight, _ = fp8_layer(50, 100)
    refused(block_fp8, {**FP8, "weight_block_size": [0, 3]}, eight, tmp_path, "blocks")
    refused(block_fp8, {**FP8, "fmt": "e5m2"}, eight, tmp_path, "not e4m3")
    refused(block_fp8, FP8, {**eight, "weight": eight["weight"].float()}, tmp_path, "float8_e4m3fn")
    refused(block_fp8, FP8, {**eight, "weight_scale_inv": torch.ones(2, 2)}, tmp_path, r"must be \[2, 3\]")
    broken = eight["weight"].clone()
    broken.view(torch.uint8)[0, 0] = 0x7F
    refused(block_fp8, FP8, {**eight, "weight": broken}, tmp_path, "not a number")
