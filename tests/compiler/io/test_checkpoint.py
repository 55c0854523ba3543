"""Writing and reading whole checkpoints, and loading them onto lowbit's kernels."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _data import real_model
from _models import random_qtensor, round_to_nearest, swap_linears, tiny_llama

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import write
from lowbit.compiler.io.checkpoint import read_checkpoint, write_checkpoint
from lowbit.compiler.io.load import load_quantized, save_quantized
from lowbit.compiler.io.source import ModelSource, open_model
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.scheme import Scheme, load_scheme

IDS = torch.arange(10)[None]
REPORT = {"seconds": 1.5, "totals": {"bits per weight": 4.25}, "layers": [{"path": "x"}]}


def base_model(folder: Path, **changes: object) -> ModelSource:
    model = tiny_llama(**changes)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("Apache License\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: who/what\n---\n")
    return open_model(folder)


def quantized(source: ModelSource, scheme: Scheme) -> dict[str, Callable[[], QTensor]]:
    """Round-to-nearest loaders for every layer the scheme names."""
    loaders = {}
    for name in source.names():
        path = name.removesuffix(".weight")
        fmt = scheme.format_for(path)
        if name.endswith("proj.weight") and fmt is not None:
            loaders[path] = lambda name=name, fmt=fmt: round_to_nearest(source.tensor(name), fmt)
    return loaders


def write_out(tmp_path: Path, scheme: Scheme, name: str = "out", **options: Any) -> tuple[Path, ModelSource]:
    source = base_model(tmp_path / f"{name}-base")
    out = write_checkpoint(tmp_path / name, source, quantized(source, scheme), scheme, report=REPORT, **options)
    return out, source


MIXED = (("*.down_proj", None), ("*.q_proj", parse_format("int1.ch.sym")))
SCHEMES = {
    "compressed-tensors": load_scheme("w4a16", format="int4.g32.sym", method="rtn"),
    "lowbit": Scheme("mixed", parse_format("int4.g20.asym"), "rtn", overrides=MIXED),
}


@pytest.mark.parametrize("shard_bytes", [2 * 10**9, 30_000])
@pytest.mark.parametrize("layout", SCHEMES)
def test_what_is_written_is_read_back(layout: str, shard_bytes: int, tmp_path: Path) -> None:
    scheme = SCHEMES[layout]
    out, source = write_out(tmp_path, scheme, shard_bytes=shard_bytes)
    checkpoint, loaders = read_checkpoint(out), quantized(source, scheme)
    assert checkpoint.method == layout
    assert (out / "model.safetensors.index.json").exists() == (shard_bytes == 30_000)
    assert checkpoint.modules == {path: scheme.format_for(path) for path in loaders}
    for path, load in loaders.items():
        q, expected = checkpoint.qtensor(path), load()
        assert torch.equal(q.codes, expected.codes)
        assert torch.equal(q.scale, expected.scale)
    plain = [name for name in source.names() if name.removesuffix(".weight") not in loaders]
    assert set(checkpoint.plain_names()) == set(plain)
    assert all(torch.equal(checkpoint.tensor(name), source.tensor(name)) for name in plain)


@pytest.mark.parametrize("layout", SCHEMES)
def test_loaded_model_computes_what_the_oracle_computes(layout: str, tmp_path: Path) -> None:
    out, source = write_out(tmp_path, SCHEMES[layout])
    checkpoint, model = read_checkpoint(out), load_quantized(out)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == len(checkpoint.modules)
    oracle = tiny_llama()
    for path in checkpoint.modules:
        oracle.get_submodule(path).weight.data = checkpoint.qtensor(path).dequantize()
    with torch.no_grad():
        expected, got = oracle(IDS).logits, model(IDS).logits
    assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert source.config.vocab_size == model.config.vocab_size


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    out, source = write_out(tmp_path, SCHEMES["compressed-tensors"])
    assert {p.name for p in out.iterdir()} == {
        "config.json", "generation_config.json", "lowbit.json", "model.safetensors", "report.json", "README.md",
        "tokenizer.json", "LICENSE", "chat_template.jinja",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    for line in ("base_model: who/what", "base_model_relation: quantized", "license: apache-2.0", "| seconds | 1.5 |"):
        assert f"{line}\n" in card
    made = json.loads((out / "lowbit.json").read_text())
    assert made["schema"] == 1
    assert made["source"] == {"model": "who/what", "digest": source.digest()}
    assert Scheme.from_dict(made["scheme"]) == SCHEMES["compressed-tensors"]
    assert str(tmp_path) not in "".join(p.read_text() for p in out.iterdir() if p.suffix in (".json", ".md"))
    assert not list(tmp_path.glob(".*partial*"))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_out(tmp_path, SCHEMES["lowbit"], name)
    for path in (tmp_path / "one").iterdir():
        if path.name not in ("README.md", "lowbit.json"):  # these name the source folder
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_other_tensors_can_be_narrowed(tmp_path: Path) -> None:
    out, _ = write_out(tmp_path, SCHEMES["compressed-tensors"], dtype=torch.bfloat16)
    checkpoint = read_checkpoint(out)
    assert checkpoint.config["dtype"] == "bfloat16"
    assert checkpoint.tensor("model.norm.weight").dtype == torch.bfloat16
    assert load_quantized(out).dtype == torch.bfloat16
    assert load_quantized(out, dtype=torch.float32)(IDS).logits.dtype == torch.float32


def test_hostile_names_stay_out_of_the_card(tmp_path: Path) -> None:
    source = base_model(tmp_path / "base")
    source.base_model, source.origin = "a/b\nlicense: mit", "x\n---\n<script>alert(1)</script>|`"
    scheme = SCHEMES["compressed-tensors"]
    report = {"x\n# head": "</td>|<b>", "n": 3}
    out = write_checkpoint(tmp_path / "out", source, quantized(source, scheme), scheme, report=report)
    card = (out / "README.md").read_text()
    assert "<" not in card
    assert "\nlicense: mit" not in card
    assert "\n# head" not in card
    assert card.count("---\n") == 2


def test_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    out, _ = write_out(tmp_path, SCHEMES["lowbit"])
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    source = open_model(tmp_path / "out-base")
    with pytest.raises(CheckpointError, match="LB0110"):
        write_checkpoint(out, source, {}, SCHEMES["lowbit"], report={})
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}


def test_failures_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, scheme = base_model(tmp_path / "base"), SCHEMES["compressed-tensors"]
    loaders = quantized(source, scheme)
    path = list(loaders)[5]

    def attempt(code: str, **changed: Callable[[], QTensor]) -> None:
        with pytest.raises(CheckpointError, match=code):
            write_checkpoint(tmp_path / "out", source, {**loaders, **changed}, scheme, report={})
        assert [p.name for p in tmp_path.iterdir()] == ["base"]

    def full() -> QTensor:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    wrong = round_to_nearest(source.tensor(f"{path}.weight"), parse_format("int8.ch.sym"))
    attempt("LB0111", **{path: full})
    attempt("LB0114", **{path: lambda: wrong})
    attempt("LB0114", **{"model.norm": lambda: wrong})
    attempt("LB0114", **{"no.such.layer_proj": lambda: wrong})
    monkeypatch.setattr(write.os, "fsync", lambda _: full())
    attempt("LB0111")


def test_tied_head_cannot_be_quantized_alone(tmp_path: Path) -> None:
    source = base_model(tmp_path / "base", tie_word_embeddings=True)
    scheme = Scheme("head", parse_format("int8.ch.sym"), "rtn", ignore=())
    q = round_to_nearest(source.tensor("model.embed_tokens.weight"), scheme.weight)
    with pytest.raises(CheckpointError, match=r"LB0114 lm_head"):
        write_checkpoint(tmp_path / "out", source, {"lm_head": lambda: q}, scheme, report={})


def test_folders_that_are_not_quantized_checkpoints(tmp_path: Path) -> None:
    for code, folder in {"LB0101": tmp_path / "absent", "LB0108": tmp_path}.items():
        with pytest.raises(CheckpointError, match=code):
            read_checkpoint(folder)
    base_model(tmp_path / "base")
    with pytest.raises(CheckpointError, match="LB0114"):
        read_checkpoint(tmp_path / "base")


def edit(out: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((out / file).read_text())
    change(values)
    (out / file).write_text(json.dumps(values))


CONFIG_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "future schema": lambda c: c["quantization_config"].update(schema=3),
    "no schema": lambda c: c["quantization_config"].pop("schema"),
    "schema is text": lambda c: c["quantization_config"].update(schema="1"),
    "no modules": lambda c: c["quantization_config"].pop("modules"),
    "module format is a number": lambda c: c["quantization_config"]["modules"].update(x=4),
    "unknown format": lambda c: c["quantization_config"]["modules"].update(x="int99"),
    "unknown method": lambda c: c["quantization_config"].update(quant_method="magic"),
    "no base type": lambda c: c.pop("base_model_type"),
}


@pytest.mark.parametrize("name", CONFIG_EDITS)
def test_configs_that_are_refused(name: str, tmp_path: Path) -> None:
    out, _ = write_out(tmp_path, SCHEMES["lowbit"])
    edit(out, "config.json", CONFIG_EDITS[name])
    with pytest.raises(CheckpointError, match="LB0114"):
        read_checkpoint(out)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    out, _ = write_out(tmp_path, SCHEMES["compressed-tensors"])
    edit(out, "lowbit.json", lambda c: c["formats"].popitem())
    with pytest.raises(CheckpointError, match="disagree"):
        read_checkpoint(out)
    (out / "lowbit.json").unlink()
    read_checkpoint(out)
    edit(out, "config.json", lambda c: c.update(intermediate_size=128))
    with pytest.raises(CheckpointError, match="LB0114"):
        load_quantized(out)
    edit(out, "config.json", lambda c: c.update(intermediate_size=96, num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="no tensor"):
        load_quantized(out)
    edit(out, "config.json", lambda c: c.update(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="no such linear layer"):
        load_quantized(out)


@pytest.mark.parametrize("text", ["int4.g32.sym", "int1.g20.sym", "int6.t.asym"])
def test_models_quantized_in_memory_are_saved(text: str, tmp_path: Path) -> None:
    per_tensor = text == "int6.t.asym"
    model = swap_linears(tiny_llama(tie_word_embeddings=True), "int4.g32.sym" if per_tensor else text)
    if per_tensor:
        model.model.layers[0].mlp.up_proj = QuantLinear.from_qtensor(random_qtensor(text, 96, 64))
    out = save_quantized(model, tmp_path / "out")
    loaded = load_quantized(out)
    again = load_quantized(save_quantized(loaded, tmp_path / "again"))
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(loaded(IDS).logits, expected)
        assert torch.equal(again(IDS).logits, expected)
    assert read_checkpoint(out).method == ("compressed-tensors" if text == "int4.g32.sym" else "lowbit")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with pytest.raises(CheckpointError, match="LB0110"):
        save_quantized(model, out)
    with pytest.raises(CheckpointError, match="LB0114"):
        save_quantized(tiny_llama(), tmp_path / "plain")


def test_real_model_headers() -> None:
    source = open_model(real_model())
    assert source.shape("model.layers.0.self_attn.q_proj.weight") == (576, 576)
    assert "lm_head.weight" not in source.names()
    assert source.licence.name == "apache-2.0"
    assert len(source.names()) == 272
