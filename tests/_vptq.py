"""Vector-quantized layers and models in VPTQ's layout, for tests."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from _models import tiny_llama
from safetensors.torch import save_file
from torch import nn

from lowbit.compiler.io import vptq
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.io.vptq_tensors import to_tensors
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import VectorFormat, parse_format
from lowbit.quantizers.vqtensor import VQTensor
from lowbit.quantizers.weights import random_weight

__all__ = ["PATH", "folder_of", "random_model", "random_vq", "read_one", "same", "settings_of", "unpacked"]

PATH = "model.layers.0.self_attn.q_proj"


def random_vq(text: str | VectorFormat, n: int, k: int, seed: int = 0) -> VQTensor:
    q = random_weight(parse_format(str(text)), n, k, torch.Generator().manual_seed(seed))
    assert isinstance(q, VQTensor)
    return q


def same(a: VQTensor, b: VQTensor) -> bool:
    """Equal in every tensor and in format, but for how outliers are counted."""
    names = [f.name for f in fields(VQTensor) if f.name != "fmt"]
    exact = [vptq.exact_format(q.fmt, q.k) for q in (a, b)]
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    return exact[0] == exact[1] and all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y for x, y in pairs
    )


def settings_of(q: VQTensor, **changes: object) -> dict[str, Any]:
    config = vptq.quantization_config({"x": q.fmt}, {"x": q.shape}, [], [])
    return {**config["config_for_layers"]["x"], **changes}


def folder_of(folder: Path, tensors: dict[str, torch.Tensor], layer: dict[str, Any], **config: object) -> Path:
    """A checkpoint folder with one quantized layer."""
    folder.mkdir(exist_ok=True)
    save_file({f"{PATH}.{name}": t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    quant = {"quant_method": "vptq", "config_for_layers": {PATH: layer}, **config}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quant}))
    return folder


def read_one(folder: Path) -> VQTensor:
    q = read_checkpoint(folder).qtensor(PATH)
    assert isinstance(q, VQTensor)
    return q


def unpacked(q: VQTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`q` with one 16-bit index per element, seen as `dtype`."""
    size = q.fmt.partition(q.k)[1]
    tensors = to_tensors(q)
    for name, index in (("indices", q.indices), ("res_indices", q.residual)):
        if index is not None:
            grouped = index.reshape(len(index), q.fmt.groups, size).transpose(0, 1)
            tensors[name] = grouped.to(torch.int16).contiguous().view(dtype)
    if "outlier_indices" in tensors:
        tensors["outlier_indices"] = tensors["outlier_indices"].view(dtype)
    if "perm" in tensors and q.perm is not None:
        tensors["perm"] = q.perm
    return tensors


def random_model(text: str, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    model = tiny_llama(attention_bias=True, tie_word_embeddings=True)
    for seed, (path, old) in enumerate(list(model.named_modules())):
        if isinstance(old, nn.Linear) and not path.endswith(skip):
            rng = torch.Generator().manual_seed(seed)
            q = random_weight(parse_format(text), old.out_features, old.in_features, rng)
            bias = None if old.bias is None else torch.randn(old.out_features, generator=rng)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, QuantLinear.from_qtensor(q, bias))
    return model
