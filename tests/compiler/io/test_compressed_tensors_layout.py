"""The pack-quantized layout against the compressed-tensors package, and through plain transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _models import random_qtensor, tiny_llama
from safetensors.torch import load_file, save_file

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import compressed_tensors as ct
from lowbit.compiler.io.checkpoint import export_layout, read_checkpoint, write_checkpoint
from lowbit.compiler.io.column_groups import grouped_columns
from lowbit.compiler.io.load import load_quantized
from lowbit.compiler.io.source import open_model
from lowbit.quantizers.formats import catalog, parse_format
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.scheme import Scheme

EXPRESSIBLE = [
    f"int{b}.{g}.{s}" for b in range(1, 9) for g in ("g16", "ch") for s in ("sym", "asym") if (b, s) != (1, "sym")
]
NATIVE_ONLY = ["int1.g16.sym", "int1.ch.sym", "int4.t.sym", "int8.t.asym"]


def equal(a: QTensor, b: QTensor) -> bool:
    zeros = (a.zero is None) == (b.zero is None) and (a.zero is None or torch.equal(a.zero, b.zero))  # type: ignore[arg-type]
    return a.fmt == b.fmt and torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and zeros


@pytest.mark.parametrize("shape", [(7, 48), (33, 80), (1, 16), (64, 64)])
@pytest.mark.parametrize("text", EXPRESSIBLE)
def test_round_trip_through_the_package(text: str, shape: tuple[int, int]) -> None:
    """The package reads our tensors as the same numbers, and writes the same words from them."""
    oracle = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base").PackedQuantizationCompressor
    quantization = pytest.importorskip("compressed_tensors.quantization")
    q = random_qtensor(f"{text}.f32", *shape)
    ours = ct.to_tensors(q)
    group = ct.quantization_config({"m": q.fmt}, [])["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme.model_validate(group)
    dense = oracle.decompress(ours, scheme)["weight"]
    assert torch.equal(dense, q.dequantize())
    zero = None if q.zero is None else (q.zero.to(torch.int16) - 2 ** (q.fmt.bits - 1)).to(torch.int8)
    theirs = oracle.compress({"weight": dense, "weight_scale": q.scale, "weight_zero_point": zero}, scheme)
    for name in ours:
        assert torch.equal(theirs[name], ours[name]), name
    assert equal(ct.from_tensors(q.fmt, theirs, "m"), q)


@pytest.mark.parametrize("text", [*EXPRESSIBLE, *NATIVE_ONLY, "int3.g20.asym", "int5.g48.sym.bf16"])
def test_our_own_round_trip(text: str) -> None:
    q = random_qtensor(text, 13, 50)
    tensors = ct.to_tensors(q)
    expected = ct.tensor_shapes(q.fmt, 13, 50)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == expected
    assert equal(ct.from_tensors(q.fmt, tensors, "m"), q)


def test_which_formats_go_where() -> None:
    for text in EXPRESSIBLE:
        assert export_layout(parse_format(text), 64, 64) == "compressed-tensors"
    for text in NATIVE_ONLY:
        assert export_layout(parse_format(text), 64, 64) == "lowbit"
    assert "do not divide" in str(ct.can_express(parse_format("int4.g48.sym"), 64, 64))
    assert ct.can_express(parse_format("int4.g48.sym"), 64, 96) is None
    plain = [fmt for fmt in catalog() if fmt.element.integer and fmt.bits > 1 and not fmt.offset]
    assert all(ct.can_express(fmt) is None for fmt in plain)
    for text in ("e3m2.ch", "mxfp8_e4m3", "e4m3.g32", "int4.g32.sym.e8m0", "int6.ch.sym|e3m2.ch", "bcq2.g32"):
        assert export_layout(parse_format(text), 64, 64) == "lowbit", text
    mixed = [parse_format("int4.g16.sym"), parse_format("int8.ch.sym")]
    assert ct.config_problem(mixed) is None
    assert ct.config_problem([*mixed, parse_format("int4.g16.asym")]) is not None


def test_note_about_scales() -> None:
    assert ct.scale_note(parse_format("int4.g16.sym"), torch.float32) is None
    assert ct.scale_note(parse_format("int4.g16.sym"), torch.float16) is None
    assert ".bf16" in str(ct.scale_note(parse_format("int4.g16.sym"), torch.bfloat16))
    assert ct.scale_note(parse_format("int4.g16.sym.bf16"), torch.bfloat16) is None
    assert ".f32" in str(ct.scale_note(parse_format("int4.g16.asym"), torch.float32))


def test_tensors_that_do_not_fit() -> None:
    fmt = parse_format("int4.g16.asym")
    good = ct.to_tensors(random_qtensor(fmt, 8, 32))
    bad = {
        "weight_packed": [None, good["weight_packed"][:7], good["weight_packed"].float(), good["weight_packed"][:, :3]],
        "weight_scale": [None, good["weight_scale"][:, :1], good["weight_scale"].float()],
        "weight_zero_point": [None, good["weight_zero_point"].t(), good["weight_zero_point"].to(torch.int8)],
        "weight_shape": [
            None,
            torch.tensor([8]),
            torch.tensor([8, 2**40]),
            torch.tensor([-8, 32]),
            torch.tensor([8, 0]),
        ],
    }
    for name, values in bad.items():
        for value in values:
            tensors = {n: t for n, t in {**good, name: value}.items() if t is not None}
            with pytest.raises(CheckpointError, match="LB0114"):
                ct.from_tensors(fmt, tensors, "m")


def with_groups(q: QTensor) -> dict[str, torch.Tensor]:
    """`q`, a matrix of an ordered format, as tools with `actorder: group` store it."""
    codes, g_idx = grouped_columns(q)
    return {**ct.to_tensors(replace(q, fmt=replace(q.fmt, ordered=False), codes=codes, perm=None)), ct.G_IDX: g_idx}


@pytest.mark.parametrize("text", ["int4.g16.sym", "int8.g32.asym"])
def test_activation_order(text: str) -> None:
    q = random_qtensor(text, 12, 96).in_order(torch.randperm(96, generator=torch.Generator().manual_seed(0)))
    tensors = with_groups(q)
    assert torch.equal(ct.from_tensors(q.fmt, tensors, "m").dequantize(), q.dequantize())
    plain = replace(q.fmt, ordered=False)
    for same in (torch.full((96,), -1), torch.arange(96) // q.fmt.granularity.group):
        assert not ct.from_tensors(plain, {**tensors, ct.G_IDX: same.int()}, "m").fmt.ordered
    wrong = [torch.zeros(96, dtype=torch.int32), tensors[ct.G_IDX].float(), tensors[ct.G_IDX][None]]
    for g_idx in wrong:
        with pytest.raises(CheckpointError, match="LB0114"):
            ct.from_tensors(q.fmt, {**tensors, ct.G_IDX: g_idx}, "m")
    with pytest.raises(CheckpointError, match=r"LB0114.*does not fit"):
        ct.from_tensors(plain, tensors, "m")


def test_a_checkpoint_in_activation_order(tmp_path: Path) -> None:
    folder = export(tmp_path, ["int4.g16.sym"], torch.float32)
    (folder / "lowbit.json").unlink()
    checkpoint, path = read_checkpoint(folder), "model.layers.0.mlp.up_proj"
    q, tensors = checkpoint.qtensor(path), load_file(folder / "model.safetensors")
    assert isinstance(q, QTensor)
    q = q.in_order(torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(0)))
    tensors |= {f"{path}.{name}": tensor for name, tensor in with_groups(q).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    again = read_checkpoint(folder)
    assert [p for p, fmt in again.modules.items() if str(fmt).endswith(".perm")] == [path]
    assert torch.equal(again.qtensor(path).dequantize(), q.dequantize())
    assert not any(name.endswith(ct.G_IDX) for name in again.plain_names())
    x = torch.randn(3, q.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer = load_quantized(folder).get_submodule(path)
        assert torch.allclose(layer(x), x @ q.dequantize().t(), rtol=1e-3, atol=1e-3)


def group(targets: list[str], **weights: object) -> dict[str, object]:
    return {"targets": targets, "weights": {"num_bits": 4, "type": "int", "symmetric": True, **weights}}


def test_configs_of_other_tools() -> None:
    config = {
        "config_groups": {
            "a": group(["Linear"], strategy="group", group_size=128),
            "b": group(["re:.*down_proj$"], num_bits=8, strategy="channel"),
            "c": group(["m.up_proj"], symmetric=False, group_size=32),
        }
    }
    paths = {"m.down_proj": torch.bfloat16, "m.up_proj": torch.float16, "m.q_proj": torch.float32}
    formats = ct.formats_from_config(config, paths, "x")
    expected = {"m.down_proj": "int8.ch.sym.bf16", "m.up_proj": "int4.g32.asym", "m.q_proj": "int4.g128.sym.f32"}
    assert {p: str(f) for p, f in formats.items()} == expected


@pytest.mark.parametrize(
    "groups",
    [
        None,
        {"a": 3},
        {"a": group(["other"])},
        {"a": {"targets": ["Linear"], "weights": None}},
        {"a": group(["Linear"], type="float")},
        {"a": group(["Linear"], num_bits=9)},
        {"a": group(["Linear"], num_bits="4")},
        {"a": group(["Linear"], strategy="block")},
        {"a": group(["Linear"], strategy="group", group_size=None)},
        {"a": group(["Linear"], strategy="group", group_size=0)},
        {"a": {**group(["Linear"]), "input_activations": {"num_bits": 8}}},
        {"a": group(["re:("])},
    ],
)
def test_configs_that_are_refused(groups: object) -> None:
    with pytest.raises(CheckpointError, match="LB0114"):
        ct.formats_from_config({"config_groups": groups}, {"m": torch.float16}, "x")


def export(tmp_path: Path, texts: list[str], dtype: torch.dtype, *, tied: bool = False) -> Path:
    """A tiny Llama whose layers get `texts` in turn, written as a checkpoint."""
    model = tiny_llama(tie_word_embeddings=tied, attention_bias=True).to(dtype)
    model.save_pretrained(tmp_path / "base")
    linears = [p for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and p != "lm_head"]
    q = {}
    for i, path in enumerate(linears):
        value = random_qtensor(texts[i % len(texts)], *model.get_submodule(path).weight.shape, seed=i)
        q[path] = QTensor(
            value.fmt, value.codes, (value.scale.float() / 2**value.fmt.bits).to(value.scale.dtype), value.zero
        )
    overrides = tuple((path, value.fmt) for path, value in q.items())
    scheme = Scheme("test", parse_format(texts[0]), "rtn", overrides=overrides)
    loaders = {path: (lambda value=value: value) for path, value in q.items()}
    return write_checkpoint(tmp_path / "out", open_model(tmp_path / "base"), loaders, scheme, report={})


TRANSFORMERS = [
    (["int4.g32.sym"], "float32"),
    (["int4.g32.sym", "int8.ch.sym", "int3.g16.sym"], "float32"),
    (["int4.g32.sym"], "float16"),
    (["int4.g32.sym.bf16"], "bfloat16"),
    (["int5.ch.sym.f32"], "float32"),
    (["int4.g32.asym.f32"], "float32"),
    (["int3.g16.asym.bf16"], "bfloat16"),
]


@pytest.mark.parametrize(("texts", "name"), TRANSFORMERS)
def test_plain_transformers_loads_exactly_the_same_weights(texts: list[str], name: str, tmp_path: Path) -> None:
    """Without lowbit's quantizer: AutoModelForCausalLM decodes to the oracle's weights, in three model dtypes."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, name)
    out = export(tmp_path, texts, dtype, tied=len(texts) > 1)
    checkpoint = read_checkpoint(out)
    assert checkpoint.method == "compressed-tensors"
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert stock.dtype == dtype
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = stock(ids).logits
        for path in checkpoint.modules:
            assert torch.equal(stock.get_submodule(path).weight, checkpoint.qtensor(path).dequantize(dtype)), path
        assert stock.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 16)
        ours = load_quantized(out)(ids).logits
    tolerance = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
    assert (ours - logits).abs().max() <= tolerance * logits.abs().max()


@pytest.mark.parametrize(
    ("text", "name", "bound"), [("int4.g32.sym", "bfloat16", 2**-8), ("int4.g32.asym", "float32", 2**-11)]
)
def test_what_plain_transformers_rounds(text: str, name: str, bound: float, tmp_path: Path) -> None:
    """float16 scales in a bfloat16 model, and zero points with float16 scales: as `scale_note` says, no worse."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, name)
    assert ct.scale_note(parse_format(text), dtype) is not None
    out = export(tmp_path, [text], dtype)
    stock, checkpoint = AutoModelForCausalLM.from_pretrained(out), read_checkpoint(out)
    with torch.no_grad():
        stock(torch.arange(4)[None])
    for path in checkpoint.modules:
        exact = checkpoint.qtensor(path).dequantize()
        error = (stock.get_submodule(path).weight.float() - exact).abs()
        assert 0 < error.max()
        assert (error <= 2 * bound * exact.abs()).all()
