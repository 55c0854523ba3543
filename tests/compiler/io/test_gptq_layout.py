"""Reading GPTQ checkpoints: a real one, and v1, v2, 3 bits and permuted columns made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _data import data_path
from _models import random_qtensor
from safetensors.torch import load_file, save_file

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import gptq
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.io.load import load_quantized
from lowbit.compiler.runtime.compile import compile_model
from lowbit.quantizers.bitstream import pack_bits
from lowbit.quantizers.formats import parse_format, scalar_format
from lowbit.quantizers.qtensor import QTensor

BASE = {"bits": 4, "group_size": 16, "sym": False, "checkpoint_format": "gptq"}


def as_gptq(q: QTensor, *, zero_offset: int, g_idx: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The tensors GPTQ tools would store for `q`."""
    zero = q.zero if q.zero is not None else torch.full_like(q.scale, 2 ** (q.fmt.bits - 1)).to(torch.uint8)
    ones = pack_bits(torch.full((1, q.shape[0]), zero_offset, dtype=torch.uint8), q.fmt.bits)
    group = q.fmt.granularity.group_size(q.shape[1])
    return {
        "qweight": pack_bits(q.codes, q.fmt.bits).t().contiguous(),
        "qzeros": pack_bits(zero.t().contiguous(), q.fmt.bits) - ones,
        "scales": q.scale.t().contiguous(),
        "g_idx": (torch.arange(q.shape[1]) // group).int() if g_idx is None else g_idx,
    }


def slow_gptq(tensors: dict[str, torch.Tensor], bits: int) -> np.ndarray:
    """GPTQ v1 as its first kernels read it, one number at a time, for widths that divide 32."""
    words, zeros = (tensors[n].numpy().view(np.uint32) for n in ("qweight", "qzeros"))
    scales, g_idx, per = tensors["scales"].float().numpy(), tensors["g_idx"].numpy(), 32 // bits
    k, n, mask = len(g_idx), words.shape[1], 2**bits - 1
    out = np.zeros((n, k), np.float32)
    for j in range(k):
        for i in range(n):
            code = int(words[j // per, i]) >> (bits * (j % per)) & mask
            zero = (int(zeros[g_idx[j], i // per]) >> (bits * (i % per)) & mask) + 1
            out[i, j] = (code - zero) * scales[g_idx[j], i]
    return out


def test_a_checkpoint_of_gptqmodel() -> None:
    folder = data_path("gptq-tiny")
    checkpoint = read_checkpoint(folder)
    assert checkpoint.method == "gptq"
    assert len(checkpoint.modules) == 14
    assert {str(f.element.name) for f in checkpoint.modules.values()} == {"int4"}
    stored = load_file(folder / "model.safetensors")
    path = "model.layers.1.self_attn.q_proj"
    tensors = {name: stored[f"{path}.{name}"] for name in gptq.SUFFIXES}
    assert np.array_equal(checkpoint.qtensor(path).dequantize().numpy(), slow_gptq(tensors, 4))
    assert not any(name.endswith(gptq.SUFFIXES) for name in checkpoint.plain_names())


def test_a_checkpoint_of_gptqmodel_runs() -> None:
    folder = data_path("gptq-tiny")
    checkpoint, model = read_checkpoint(folder), load_quantized(folder, dtype=torch.float32)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    layer = model.get_submodule("model.layers.0.self_attn.k_proj")
    expected = x @ checkpoint.qtensor("model.layers.0.self_attn.k_proj").dequantize().t()
    with torch.no_grad():
        assert (layer(x) - expected).abs().max() <= 1e-3 * expected.abs().max()
        assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    "text", ["int2.g16.asym", "int3.g32.asym", "int4.g16.sym", "int4.ch.asym", "int8.g48.sym.bf16"]
)
def test_versions_and_widths(text: str, kind: str) -> None:
    q = random_qtensor(text, 32, 96)
    group = q.fmt.granularity.group or -1
    config = {"bits": q.fmt.bits, "group_size": group, "sym": not q.fmt.zero, "checkpoint_format": kind}
    layout = gptq.layout(config, "x")
    got = gptq.to_qtensor(layout, q.fmt, as_gptq(q, zero_offset=layout.zero_offset), "x")
    assert torch.equal(got.dequantize(), q.dequantize())


def in_activation_order(q: QTensor) -> dict[str, torch.Tensor]:
    """`q`, a matrix of an ordered format, as GPTQ tools store it: columns in place, and the group of each."""
    assert q.perm is not None
    place, k = torch.argsort(q.perm), q.shape[1]
    g_idx = (torch.arange(k) // q.fmt.granularity.group_size(k))[place].int()
    return as_gptq(replace(q, codes=q.codes[:, place]), zero_offset=1, g_idx=g_idx)


@pytest.mark.parametrize("text", ["int4.g16.asym", "int8.g32.sym", "int2.g16.asym"])
def test_activation_order_is_an_ordered_format(text: str) -> None:
    q = random_qtensor(text, 16, 96)
    if q.zero is not None:
        q.zero.clamp_(min=1)  # the first kernels cannot read a zero point of 0
    q = q.in_order(torch.randperm(96, generator=torch.Generator().manual_seed(0)))
    tensors = in_activation_order(q)
    config = {"bits": q.fmt.bits, "group_size": q.fmt.granularity.group, "sym": not q.fmt.zero, "desc_act": True}
    got = gptq.to_qtensor(gptq.layout(config, "x"), q.fmt, tensors, "x")
    assert np.array_equal(got.dequantize().numpy(), slow_gptq(tensors, q.fmt.bits))
    assert torch.equal(got.dequantize(), q.dequantize())
    undeclared = gptq.layout({**config, "desc_act": False}, "x")
    with pytest.raises(CheckpointError, match=r"LB0113.*desc_act"):
        gptq.to_qtensor(undeclared, replace(q.fmt, ordered=False), tensors, "x")


def test_a_checkpoint_in_activation_order_runs(tmp_path: Path) -> None:
    """Every layer of a real one in an order of its own, one but for `v_proj`; siblings share theirs as in GPTQ."""
    source, folder = data_path("gptq-tiny"), tmp_path / "ordered"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(config))
    tensors, want = load_file(source / "model.safetensors"), read_checkpoint(source)
    for path in want.modules:
        if path.endswith("v_proj"):
            continue
        q, seed = want.qtensor(path), 1 + path.endswith("down_proj")
        assert isinstance(q, QTensor)
        rng = torch.Generator().manual_seed(seed)
        changed = in_activation_order(q.in_order(torch.randperm(q.shape[1], generator=rng)))
        tensors |= {f"{path}.{name}": changed[name].to(tensors[f"{path}.{name}"].dtype) for name in gptq.SUFFIXES}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = read_checkpoint(folder)
    ordered = {path.rpartition(".")[2] for path, fmt in checkpoint.modules.items() if scalar_format(str(fmt)).ordered}
    assert "v_proj" not in ordered
    assert {"q_proj", "k_proj", "down_proj"} <= ordered
    model = load_quantized(folder, dtype=torch.float32)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    for name in ("q_proj", "v_proj"):
        path = f"model.layers.0.self_attn.{name}"
        expected = x @ checkpoint.qtensor(path).dequantize().t()
        with torch.no_grad():
            assert (model.get_submodule(path)(x) - expected).abs().max() <= 1e-3 * expected.abs().max()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = compile_model(model, max_tokens=8)(ids).logits
    assert (after - before).abs().max() <= 2e-3 * before.abs().max()


@pytest.mark.parametrize(
    "change",
    [{"bits": 5}, {"bits": "4"}, {"bits": True}, {"group_size": 0}, {"group_size": -2}, {"group_size": "a"},
     {"checkpoint_format": "marlin"}, {"pack_dtype": "int16"}, {"dynamic": {"+:.*": {"bits": 8}}}],
)  # fmt: skip
def test_configs_that_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="LB0113"):
        gptq.layout({**BASE, **change}, "x")


def test_tensors_that_do_not_fit() -> None:
    fmt, layout = parse_format("int4.g16.asym"), gptq.layout(BASE, "x")
    good = as_gptq(random_qtensor(fmt, 8, 48), zero_offset=1)
    bad: dict[str, list[torch.Tensor | None]] = {
        "qweight": [None, good["qweight"][:5], good["qweight"].float(), good["qweight"][0]],
        "qzeros": [None, good["qzeros"][:2], good["qzeros"].t().contiguous()],
        "scales": [None, good["scales"][:, :7], good["scales"][:2]],
        "g_idx": [good["g_idx"][:40], torch.zeros(48, dtype=torch.int32), good["g_idx"] + 1],
    }
    for name, values in bad.items():
        for value in values:
            tensors = {n: t for n, t in {**good, name: value}.items() if t is not None}
            with pytest.raises(CheckpointError, match="LB0113"):
                gptq.to_qtensor(layout, fmt, tensors, "x")
    symmetric = gptq.layout({**BASE, "sym": True}, "x")
    with pytest.raises(CheckpointError, match="not in the middle"):
        gptq.to_qtensor(symmetric, parse_format("int4.g16.sym"), good, "x")


def test_words_hold_what_the_config_says() -> None:
    """The fixture's own invariant: sizes on disk follow from its config."""
    folder = data_path("gptq-tiny")
    bits = json.loads(Path(folder, "config.json").read_text())["quantization_config"]["bits"]
    checkpoint = read_checkpoint(folder)
    for path in checkpoint.modules:
        n, k = checkpoint.qtensor(path).shape
        assert checkpoint.tensor(f"{path}.qweight").numel() == math.ceil(k * bits / 32) * n
