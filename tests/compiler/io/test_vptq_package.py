"""Against the vptq package itself: its layer computes with our tensors, and we read what its packer writes.

Its CUDA kernels need a GPU and its transformers integration too; this uses its PyTorch path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import tiny_llama
from _vptq import folder_of, random_model, random_vq, read_one, same, settings_of, unpacked
from safetensors.torch import load_file
from torch import nn

from lowbit.compiler.io.load import load_quantized, save_quantized
from lowbit.compiler.io.vptq_tensors import to_tensors

package = pytest.importorskip("vptq", reason="the vptq package is not installed")

IDS = torch.arange(10)[None]
FORMATS = [
    "vq.d4.k256", "vq.d8.k256.r256", "vq.d6.k64.r16.c4.cn", "vq.d4.k16.o2pv4k32", "vq.d12.k16.r16.c2.o6v4k16.cn",
    "vq.d3.k4096.r512.f32", "vq.d8.k65536.r65536", "vq.d5.k2.cn",
]  # fmt: skip


def their_layer(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    layer: nn.Module = package.VQuantLinear(**settings, enable_proxy_error=False)
    wide = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    layer.load_state_dict(wide, strict=True, assign=True)
    return layer


@pytest.mark.parametrize(("n", "k"), [(64, 64), (50, 96)])
@pytest.mark.parametrize("text", FORMATS)
def test_their_layer_has_our_weight(text: str, n: int, k: int) -> None:
    q = random_vq(text, n, k)
    with torch.no_grad():
        weight = their_layer(settings_of(q), to_tensors(q))(torch.eye(q.k)).T
    assert torch.equal(weight, q.dequantize())


@pytest.mark.parametrize("text", FORMATS)
def test_their_packer_writes_our_words(text: str, tmp_path: Path) -> None:
    from vptq.utils.pack import pack_index

    q = random_vq(text, 50, 64)
    loose, ours = unpacked(q, torch.int16), to_tensors(q)
    packed = pack_index(
        loose["indices"], q.fmt.index_bits, loose.get("res_indices"), q.fmt.residual_bits, index_dtype=torch.uint16
    )
    assert torch.equal(packed, ours["indices"])
    perm = loose.get("perm")
    theirs = {**loose, "indices": packed, **({} if perm is None else {"perm": perm.to(torch.int16)})}
    theirs.pop("res_indices", None)
    layer = their_layer(settings_of(q), theirs)
    state = {name: t.to(q.fmt.scale_dtype) if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    assert same(read_one(folder_of(tmp_path, state, settings_of(q))), q)


@pytest.mark.parametrize("text", FORMATS[:5])
def test_their_model_predicts_what_ours_predicts(text: str, tmp_path: Path) -> None:
    from vptq.layers.model_base import make_quant_linear

    out = save_quantized(random_model(text, skip=("lm_head", "k_proj")), tmp_path / "out")
    quant = json.loads((out / "config.json").read_text())["quantization_config"]
    model = tiny_llama(attention_bias=True, tie_word_embeddings=True)
    make_quant_linear(
        model, quant["config_for_layers"], quant["shared_layer_config"], target_layer=package.VQuantLinear
    )
    state = load_file(out / "model.safetensors")
    state = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    assert missing in ([], ["lm_head.weight"])
    assert not unexpected
    with torch.no_grad():
        expected, got = model(IDS).logits, load_quantized(out)(IDS).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
