"""Whole checkpoints of vector-quantized models: in VPTQ's layout where that holds them, natively where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _models import dequantized, tiny_llama
from _vptq import random_model
from safetensors.torch import load_file
from torch import nn

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.checkpoint import read_checkpoint, write_checkpoint
from lowbit.compiler.io.load import load_quantized, save_quantized
from lowbit.compiler.io.source import open_model
from lowbit.compiler.job.contents import read_contents
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.scheme import Scheme
from lowbit.quantizers.weights import QWeight, random_weight, stored

IDS = torch.arange(10)[None]
VECTORS = ["vq.d4.k256", "vq.d6.k64.r16.c4.cn", "vq.d5.k16.r16.c2.o6pv4k16.cn.f32"]
NATIVE = ["vq.d4.k64.rn", "vq.d8.k16.r16.in.rn", "vq.d4.k16.r64.o4v8k8.bf16", "int2.g16.fz", "int3.ch.fz.f32"]


def loaders(paths: dict[str, tuple[int, int]], scheme: Scheme) -> dict[str, Callable[[], QWeight]]:
    """A loader of a random weight in the scheme's format for every layer."""

    def loader(seed: int, path: str) -> Callable[[], QWeight]:
        fmt = scheme.format_for(path)
        assert fmt is not None
        return lambda: random_weight(fmt, *paths[path], torch.Generator().manual_seed(seed))

    return {path: loader(i, path) for i, path in enumerate(paths) if scheme.format_for(path)}


def write_out(tmp_path: Path, scheme: Scheme) -> tuple[Path, dict[str, Callable[[], QWeight]]]:
    model = tiny_llama(attention_bias=True)
    nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    model.save_pretrained(tmp_path / "base")
    source = open_model(str(tmp_path / "base"))
    paths = {p: (m.out_features, m.in_features) for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    weights = loaders(paths, scheme)
    return write_checkpoint(tmp_path / "out", source, weights, scheme, report={}), weights


def assert_same(a: QWeight, b: QWeight) -> None:
    assert a.fmt == b.fmt
    ours, theirs = stored(a), stored(b)
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("text", [*VECTORS, *NATIVE])
def test_what_is_written_is_read_back(text: str, tmp_path: Path) -> None:
    scheme = Scheme("s", parse_format(text), "vptq", overrides=(("*.1.mlp.down_proj", None),))
    out, weights = write_out(tmp_path, scheme)
    checkpoint = read_checkpoint(out)
    layout = "vptq" if text in VECTORS else "lowbit"
    assert checkpoint.method == layout == json.loads((out / "lowbit.json").read_text())["layout"]
    assert checkpoint.modules == {path: scheme.weight for path in weights}  # as declared: a percentage of outliers
    for path, load in weights.items():
        assert_same(checkpoint.qtensor(path), load())
        assert checkpoint.shape(path) == load().shape
    plain = checkpoint.plain_names()
    assert "model.layers.0.self_attn.q_proj.bias" in plain
    assert "model.layers.1.mlp.down_proj.weight" in plain
    assert len(plain) + sum(len(checkpoint.module_names(path)) for path in weights) == len(checkpoint.names())


@pytest.mark.parametrize("text", [*VECTORS, *NATIVE])
def test_loaded_model_computes_what_the_oracle_computes(text: str, tmp_path: Path) -> None:
    model = random_model(text)
    out = save_quantized(model, tmp_path / "out")
    loaded = load_quantized(out)
    again = load_quantized(save_quantized(loaded, tmp_path / "again"))
    with torch.no_grad():
        got = model(IDS).logits
        assert torch.equal(loaded(IDS).logits, got)
        assert torch.equal(again(IDS).logits, got)
        expected = dequantized(model)(IDS).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert read_checkpoint(out).method == ("vptq" if text in VECTORS else "lowbit")
    assert loaded.get_submodule("lm_head").weight is loaded.get_submodule("model.embed_tokens").weight


def test_config_is_what_vptq_reads(tmp_path: Path) -> None:
    """Settings go to the package's layer as they are, so there is no key that it does not know or sets itself."""
    out, _ = write_out(
        tmp_path, Scheme("s", parse_format("vq.d6.k64.r16.o10pv4k16.cn"), overrides=(("*.k_proj", None),))
    )
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not (out / "configuration_lowbit.py").exists()
    quant = config["quantization_config"]
    assert quant["config_for_layers"]["model.layers.1.mlp.down_proj"] == {
        "in_features": 96, "out_features": 64, "vector_lens": [4, 6], "num_centroids": [16, 64],
        "num_res_centroids": [-1, 16], "group_num": 1, "group_size": 86, "outlier_size": 10, "enable_norm": True,
        "enable_perm": True, "bias": False, "is_indice_packed": True, "indices_as_float": False,
    }  # fmt: skip
    assert quant["config_for_layers"]["model.layers.0.self_attn.q_proj"]["bias"] is True
    kept = [f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)]
    assert quant["modules_to_not_convert"] == ["lm_head", *kept]
    tensors = load_file(out / "model.safetensors")
    shapes = {n.removeprefix("model.layers.1.mlp.down_proj."): (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    assert {n: s for n, s in shapes.items() if not n.startswith(("model.", "lm_head"))} == {
        "indices": (torch.int32, (1, 11, 27)), "centroids.weight": (torch.float16, (1, 384)),
        "res_centroids.weight": (torch.float16, (1, 96)), "outlier_indices": (torch.int16, (1, 16, 10)),
        "outlier_centroids.weight": (torch.float16, (1, 64)), "perm": (torch.int16, (96,)),
        "weight_scale": (torch.float16, (96,)), "weight_bias": (torch.float16, (96,)),
    }  # fmt: skip
    card = (out / "README.md").read_text()
    assert "- vptq\n" in card
    assert "vptq package" in card


def test_mixed_models_are_native(tmp_path: Path) -> None:
    scheme = Scheme("s", parse_format("vq.d4.k64"), overrides=(("*.down_proj", parse_format("int4.g32.sym")),))
    out, weights = write_out(tmp_path, scheme)
    checkpoint = read_checkpoint(out)
    assert checkpoint.method == "lowbit"
    for path, load in weights.items():
        assert_same(checkpoint.qtensor(path), load())
    load_quantized(out)


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    scheme = Scheme("s", parse_format("vq.d4.k64.o5pv4k16"))
    out, weights = write_out(tmp_path, scheme)
    contents = read_contents(str(out))
    assert contents.method == "vptq"
    found = {t.name: t for t in contents.tensors if t.kind == str(scheme.weight)}
    assert set(found) == set(weights)
    for path, load in weights.items():
        assert found[path].shape == load().shape
        assert found[path].bits_per_weight == pytest.approx(load().bits_per_weight)
    assert contents.nbytes == sum(t.numel() * t.element_size() for t in load_file(out / "model.safetensors").values())


def test_contradictions_are_refused(tmp_path: Path) -> None:
    out, _ = write_out(tmp_path, Scheme("s", parse_format("vq.d4.k64.o5pv4k16")))
    good = (out / "lowbit.json").read_text()
    (out / "lowbit.json").write_text(good.replace("o5pv4k16", "o9pv4k16"))
    with pytest.raises(CheckpointError, match=r"LB0114 .*disagree"):
        read_checkpoint(out)
    (out / "lowbit.json").unlink()
    exact = read_checkpoint(out).modules["model.layers.0.mlp.down_proj"]
    assert str(exact) == "vq.d4.k64.o5v4k16"
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(CheckpointError, match="LB0114"):
        load_quantized(out)
    data = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="LB0102"):
        read_checkpoint(out)


@pytest.mark.parametrize("text", ["vq.d4.k64.o4v4k16", "vq.d4.k64.o4v4k16.s8", "int2.g16.fz"])
def test_transformers_loads_and_saves_native_ones(text: str, tmp_path: Path) -> None:
    """A model in memory saved by `save_pretrained` has lowbit's tensors, whatever layout `save_quantized` chooses."""
    from transformers import AutoModelForCausalLM

    import lowbit  # noqa: F401

    model = load_quantized(save_quantized(random_model(text), tmp_path / "one"))
    model.save_pretrained(tmp_path / "two")  # type: ignore[operator]
    assert read_checkpoint(tmp_path / "two").method == "lowbit"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == 14
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
