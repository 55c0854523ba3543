"""Small floats in compressed-tensors' layouts: the package and transformers decode them to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _models import tiny_llama

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import compressed_tensors as ct
from lowbit.compiler.io import ct_floats
from lowbit.compiler.io.checkpoint import read_checkpoint, write_checkpoint
from lowbit.compiler.io.load import load_quantized, save_quantized
from lowbit.compiler.io.source import open_model
from lowbit.compiler.job.consumers import vllm_notes
from lowbit.quantizers.formats import parse_format, scalar_format
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.scales import tensor_scale_of
from lowbit.quantizers.scheme import Scheme
from lowbit.quantizers.weights import random_weight

LAYOUTS = {"mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized", "e4m3.ch.f32": "naive-quantized"}


def example(text: str, n: int, k: int, seed: int = 0) -> QTensor:
    """A random matrix, whose scale per tensor comes back from its reciprocal."""
    rng = torch.Generator().manual_seed(seed)
    q = random_weight(scalar_format(text), n, k, rng)
    assert isinstance(q, QTensor)
    if q.tensor_scale is None:
        return q
    whole = tensor_scale_of(torch.randn(n, k, generator=rng), q.fmt)
    return QTensor(q.fmt, q.codes, q.scale, tensor_scale=whole)


def equal(a: QTensor, b: QTensor) -> bool:
    whole = a.tensor_scale is None or torch.equal(a.tensor_scale, b.tensor_scale)  # type: ignore[arg-type]
    bytes_ = [s.contiguous().view(torch.uint8) for s in (a.scale, b.scale)]
    return a.fmt == b.fmt and torch.equal(a.codes, b.codes) and torch.equal(*bytes_) and whole


@pytest.mark.parametrize("text", LAYOUTS)
def test_the_package_decodes_the_same_weights(text: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    q = example(text, 24, 96)
    config = ct.quantization_config({"m": q.fmt}, [])
    assert config["format"] == LAYOUTS[text]
    scheme = quantization.QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    oracle = compressors.BaseCompressor.get_value_from_registry(LAYOUTS[text])
    ours = ct_floats.to_tensors(q)
    assert set(oracle.compression_param_names(scheme)) == set(ours)
    dense = oracle.decompress(ours, scheme)["weight"]
    if text != "nvfp4":
        assert torch.equal(dense.float(), q.dequantize())
        return
    # The package multiplies in another order and rounds to bfloat16: equal where the scale per tensor is exact in both.
    assert (dense.float() - q.dequantize()).abs().max() <= 2.0**-8 * q.dequantize().abs().max()
    power = QTensor(q.fmt, q.codes, q.scale, tensor_scale=torch.tensor([2.0**-10]))
    dense = oracle.decompress(ct_floats.to_tensors(power), scheme)["weight"]
    assert torch.equal(dense, power.dequantize().to(dense.dtype))


@pytest.mark.parametrize("text", [*LAYOUTS, "e4m3.ch", "e4m3.ch.bf16"])
def test_our_own_round_trip(text: str) -> None:
    for seed in range(20):
        q = example(text, 7, 64, seed)
        tensors = ct_floats.to_tensors(q)
        found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        assert found == ct_floats.tensor_shapes(q.fmt, 7, 64)
        assert equal(ct_floats.from_tensors(q.fmt, tensors, "m"), q)
        weights = ct_floats.group_weights(q.fmt)
        assert ct_floats.parse_weights(weights, tensors["weight_scale"].dtype, "m") == q.fmt


def test_tensors_that_do_not_fit() -> None:
    for text in LAYOUTS:
        q = example(text, 8, 64)
        good = ct_floats.to_tensors(q)
        for name, tensor in good.items():
            nan = torch.full_like(tensor.float(), torch.nan).to(tensor.dtype) if tensor.is_floating_point() else None
            for bad in (None, tensor[:-1], tensor.to(torch.float64), nan):
                broken = {n: t for n, t in {**good, name: bad}.items() if t is not None}
                if bad is nan is None:
                    continue
                with pytest.raises(CheckpointError, match="LB0114"):
                    ct_floats.from_tensors(q.fmt, broken, "m")
    scales = ct_floats.to_tensors(example("mxfp4", 8, 64))
    scales["weight_scale"][0, 0] = 255
    with pytest.raises(CheckpointError, match="NaN"):
        ct_floats.from_tensors(scalar_format("mxfp4"), scales, "m")


def test_what_is_not_held() -> None:
    for text in ("e3m2.ch", "mxfp8_e4m3", "e4m3.g32", "e4m3.t", "e2m1.g16.e4m3", "e2m1.g32", "e5m2.ch"):
        assert ct_floats.layout_of(parse_format(text)) is None, text
    assert "do not divide" in str(ct.can_express(parse_format("nvfp4"), 64, 72))
    assert ct.config_problem([parse_format("nvfp4"), parse_format("int4.g32.sym")]) is not None
    assert "bfloat16" in str(ct.scale_note(scalar_format("nvfp4"), torch.float32))


def test_what_plans_say_about_vllm() -> None:
    layers = [("m", 64, 64, parse_format(text)) for text in LAYOUTS]
    assert vllm_notes(layers) == []
    assert "do not divide" in str(vllm_notes([("m", 64, 72, parse_format("nvfp4"))]))
    assert vllm_notes([("m", 64, 64, parse_format("mxfp8_e4m3"))])


@pytest.mark.parametrize(("text", "name"), [("mxfp4", "bfloat16"), ("nvfp4", "bfloat16"), ("e4m3.ch.f32", "float32")])
def test_plain_transformers_loads_the_same_weights(text: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, name)
    model = tiny_llama(tie_word_embeddings=False).to(dtype)
    model.save_pretrained(tmp_path / "base")
    paths = [p for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and p != "lm_head"]
    q = {path: example(text, *model.get_submodule(path).weight.shape, seed=i) for i, path in enumerate(paths)}
    if text == "nvfp4":
        power = torch.tensor([2.0**-12])
        q = {path: QTensor(w.fmt, w.codes, w.scale, tensor_scale=power) for path, w in q.items()}
    fmt = parse_format(text)
    scheme = Scheme("test", fmt, "rtn", overrides=tuple((path, fmt) for path in q))
    loaders = {path: (lambda value=value: value) for path, value in q.items()}
    out = write_checkpoint(tmp_path / "out", open_model(tmp_path / "base"), loaders, scheme, report={})
    checkpoint = read_checkpoint(out)
    assert checkpoint.method == "compressed-tensors"
    assert all(equal(checkpoint.qtensor(path), w) for path, w in q.items())  # type: ignore[arg-type]
    stock = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        stock(torch.arange(4)[None])
    for path, w in q.items():
        assert torch.equal(stock.get_submodule(path).weight, w.dequantize(dtype)), path
    again = save_quantized(load_quantized(out), tmp_path / "again")
    assert all(equal(read_checkpoint(again).qtensor(path), w) for path, w in q.items())  # type: ignore[arg-type]
