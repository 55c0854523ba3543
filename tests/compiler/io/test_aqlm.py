"""Reading AQLM checkpoints: tensors made and decoded by hand as their program does, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import dequantized, tiny_llama
from safetensors.torch import save_file
from torch import nn

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.io.load import load_quantized

Tensors = dict[str, torch.Tensor]


def settings(group: int, books: int, bits: int) -> dict[str, Any]:
    sizes = {"in_group_size": group, "out_group_size": 1, "num_codebooks": books, "nbits_per_codebook": bits}
    return {"quant_method": "aqlm", **sizes, "linear_weights_not_to_quantize": ["lm_head.weight"]}


def layer(n: int, k: int, group: int, books: int, bits: int) -> tuple[Tensors, torch.Tensor]:
    """Tensors of a layer, and the dense weight they stand for, one vector at a time."""
    rng = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 2**bits, (n, k // group, books), generator=rng)
    book = (torch.randn(books, 2**bits, 1, group, generator=rng) * 0.05).half()
    scales = (torch.rand(n, 1, 1, 1, generator=rng) + 0.5).half()
    dense = torch.empty(n, k)
    for row in range(n):
        for i in range(k // group):
            total = sum(book[b, codes[row, i, b], 0].float() for b in range(books))
            dense[row, i * group : (i + 1) * group] = total * scales[row].float().flatten()
    signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    return {"codes": signed.to(torch.int8 if bits <= 8 else torch.int16), "codebooks": book, "scales": scales}, dense


def saved(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """A checkpoint of one layer."""
    folder.mkdir(exist_ok=True)
    save_file({f"layer.{name}": t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


@pytest.mark.parametrize(
    ("group", "books", "bits", "text"),
    [
        (8, 2, 8, "vq.d8.k256.r256.in.rn"),
        (8, 1, 16, "vq.d8.k65536.in.rn"),
        (4, 1, 12, "vq.d4.k4096.in.rn"),
        (16, 2, 4, "vq.d16.k16.r16.in.rn"),
    ],
)
def test_layers_mean_what_their_program_says(group: int, books: int, bits: int, text: str, tmp_path: Path) -> None:
    tensors, dense = layer(12, 64, group, books, bits)
    checkpoint = read_checkpoint(saved(tmp_path, settings(group, books, bits), tensors))
    assert checkpoint.method == "aqlm"
    assert {path: str(fmt) for path, fmt in checkpoint.modules.items()} == {"layer": text}
    assert checkpoint.shape("layer") == (12, 64)
    assert torch.equal(checkpoint.qtensor("layer").dequantize(), dense)


def test_models_load_and_run(tmp_path: Path) -> None:
    model = tiny_llama()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            tensors, dense = layer(*state.pop(f"{path}.weight").shape, 8, 2, 8)
            module.weight.data.copy_(dense)
            state |= {f"{path}.{name}": t.contiguous() for name, t in tensors.items()}
    save_file(state, tmp_path / "model.safetensors")
    config = {**model.config.to_dict(), "quantization_config": settings(8, 2, 8)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, ids = load_quantized(tmp_path, dtype=torch.float32), torch.arange(12)[None]
    with torch.no_grad():
        got, exact, want = loaded(ids).logits, dequantized(loaded)(ids).logits, model(ids).logits
    assert torch.allclose(exact, want, atol=1e-5 * float(want.abs().max()))
    assert torch.allclose(got, want, atol=1e-3 * float(want.abs().max()))


def test_what_is_refused(tmp_path: Path) -> None:
    good, _ = layer(12, 64, 8, 2, 8)
    config = settings(8, 2, 8)

    def refused(why: str, changed: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> None:
        kept = {name: t for name, t in {**good, **tensors}.items() if t is not None}
        with pytest.raises(CheckpointError, match=f"LB0122.*{why}"):
            read_checkpoint(saved(tmp_path, {**config, **(changed or {})}, kept)).qtensor("layer")

    refused("out_group_size 8", {"out_group_size": 8})
    refused("num_codebooks 4", {"num_codebooks": 4})
    refused("nbits_per_codebook 17", {"nbits_per_codebook": 17})
    refused("num_codebooks True", {"num_codebooks": True})
    refused("in_group_size None", {"in_group_size": None})
    refused("1 to 16 elements", {"in_group_size": 32}, codes=good["codes"][:, :2], codebooks=torch.zeros(2, 256, 1, 32))
    refused("list of names", {"linear_weights_not_to_quantize": "lm_head"})
    refused("not quantized", {"linear_weights_not_to_quantize": ["layer.weight"]})
    refused(r"scales must be .*\[12, 1, 1, 1\], but is .*\[12, 8, 1, 1\]", scales=torch.ones(12, 8, 1, 1))
    refused("scales .*missing", scales=None)
    refused("codes .*missing", codes=None)
    refused("codebooks must be .*int8", codebooks=torch.zeros(2, 256, 1, 8, dtype=torch.int8))
    refused("codes must be .*float", codes=good["codes"].float())
    refused("not finite", scales=torch.full((12, 1, 1, 1), torch.inf))
    refused("no tensor", codes=None, codebooks=None)
    narrow, _ = layer(12, 64, 8, 1, 12)
    wrong = {"num_codebooks": 1, "nbits_per_codebook": 12}
    refused("a code does not fit 12 bits", wrong, **{**narrow, "codes": narrow["codes"].fill_(4096)})


def test_damaged_checkpoints_are_refused_or_read_whole(tmp_path: Path) -> None:
    """Whatever is changed about shapes, types or settings ends in one clear error, or in a weight of its shape."""
    rng, good, codes = random.Random(0), layer(12, 64, 8, 2, 8)[0], []
    types = [torch.int8, torch.int16, torch.int64, torch.float16, torch.float32, torch.uint8, torch.bool]
    for _ in range(150):
        config, tensors = settings(8, 2, 8), dict(good)
        for _ in range(rng.randint(1, 2)):
            name = rng.choice(list(tensors))
            change = rng.choice(["type", "cut", "flatten", "drop", "setting", "setting"])
            if change == "type":
                tensors[name] = tensors[name].to(rng.choice(types))
            elif change == "cut":
                dim = rng.randrange(tensors[name].ndim)
                tensors[name] = tensors[name].narrow(dim, 0, rng.randint(0, tensors[name].shape[dim]))
            elif change == "flatten":
                tensors[name] = tensors[name].flatten(rng.randrange(tensors[name].ndim))
            elif change == "drop" and len(tensors) > 1:
                del tensors[name]
            else:
                key = rng.choice(list(config)[1:])
                config[key] = rng.choice([0, -1, 1, 2, 3, 8, 16, 2**40, 1.5, "8", None, [], True])
        folder = saved(tmp_path, config, tensors)
        try:
            checkpoint = read_checkpoint(folder)
            weight = checkpoint.qtensor("layer").dequantize()
            assert tuple(weight.shape) == checkpoint.shape("layer")
            assert bool(weight.isfinite().all())
        except CheckpointError as e:
            codes.append(e.code)
    assert set(codes) == {"LB0122"}
    assert 75 < len(codes) < 150
