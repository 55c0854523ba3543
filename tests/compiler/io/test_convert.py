"""Checkpoints in another program's layout: the same numbers, or a refusal; complete or not at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from _data import data_path
from _experts import mixture
from _models import random_qtensor, round_to_nearest, swap_linears, tiny_llama
from _vptq import random_model
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import gptq_write, write
from lowbit.compiler.io.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from lowbit.compiler.io.convert import convert
from lowbit.compiler.io.load import save_quantized
from lowbit.compiler.io.source import open_model
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import scalar_format
from lowbit.quantizers.formats.kv import parse_kv_format
from lowbit.quantizers.scheme import Scheme
from lowbit.quantizers.weights import QWeight, stored

IDS = torch.arange(10)[None]
KV = parse_kv_format("kv4.kc64.vt.w64")


def saved(folder: Path, text: str, change: Callable[[Any], object] = lambda model: None, **sizes: Any) -> Path:
    """A tiny Llama with biases, its linear layers in `text`, as a checkpoint."""
    model = tiny_llama(attention_bias=True, **sizes)
    nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    change(swap_linears(model, text))
    return save_quantized(model, folder)


def put(model: Any, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = lowbit.load(folder, dtype=torch.float32)(IDS).logits
    return out


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    """The same quantized weights and the same other tensors."""
    assert a.modules == b.modules
    assert a.kv == b.kv
    for path in a.modules:
        ours, theirs = stored(a.qtensor(path)), stored(b.qtensor(path))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), path
        assert a.layer_input(path).to_dict() == b.layer_input(path).to_dict()
    assert set(a.plain_names()) == set(b.plain_names())
    for name in a.plain_names():
        assert a.tensor(name).dtype == b.tensor(name).dtype
        assert torch.equal(a.tensor(name), b.tensor(name)), name


PAIRS = [
    ("int4.g32.sym", "gptq"), ("int4.g32.asym", "gptq"), ("int8.ch.sym", "gptq"), ("int3.ch.asym", "gptq"),
    ("int2.g16.sym", "gptq"), ("int4.g32.sym", "lowbit"), ("mxfp4", "lowbit"), ("int4.g32.asym", "compressed-tensors"),
    ("vq.d4.k256", "lowbit"), ("vq.d4.k256", "vptq"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "to"), PAIRS)
def test_the_same_numbers_in_another_layout(text: str, to: Any, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", text)
    done = convert(source, tmp_path / "out", to)
    assert_same(read_checkpoint(tmp_path / "out"), read_checkpoint(source))
    assert (done.layout, done.layers, done.source) == (to, 14, read_checkpoint(source).method)
    assert read_checkpoint(tmp_path / "out").method == to
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    again = convert(tmp_path / "out", tmp_path / "back", read_checkpoint(source).method)  # type: ignore[arg-type]
    assert_same(read_checkpoint(again.out), read_checkpoint(source))
    tensors = [load_file(folder / "model.safetensors") for folder in (source, again.out)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())


def test_a_checkpoint_of_gptqmodel_comes_back_byte_for_byte(tmp_path: Path) -> None:
    source = data_path("gptq-tiny")
    convert(source, tmp_path / "ct", "compressed-tensors")
    lowbit.convert(tmp_path / "ct", tmp_path / "out", to="gptq")
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    given = json.loads((source / "config.json").read_text())["quantization_config"]
    different = {key for key in config if config[key] != given.get(key)}
    assert different == {"meta"}
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config


def run_out(folder: Path, **scheme: Any) -> Path:
    """What a run writes for a tiny Llama: int4.g32.sym, with everything that goes with a model."""
    tiny_llama().save_pretrained(folder / "base")
    for name, text in {"tokenizer.json": "{}", "LICENSE": "Apache License\n", "chat_template.jinja": "{{ x }}"}.items():
        (folder / "base" / name).write_text(text)
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: who/what\n---\n")
    source = open_model(folder / "base")
    fmt = scalar_format("int4.g32.sym")
    made = Scheme("s", fmt, "rtn", overrides=(("*.1.mlp.down_proj", None),), **scheme)
    loaders: dict[str, Callable[[], QWeight]] = {}
    for name in source.names():
        path = name.removesuffix(".weight")
        if name.endswith("proj.weight") and made.format_for(path) is not None:
            loaders[path] = lambda name=name: round_to_nearest(source.tensor(name), fmt)  # type: ignore[misc]
    return write_checkpoint(folder / "run", source, loaders, made, report={"seconds": 1})


def test_files_of_a_converted_checkpoint(tmp_path: Path) -> None:
    source = run_out(tmp_path, kv=KV)
    out = convert(source, tmp_path / "out", "gptq").out
    assert {p.name for p in out.iterdir()} == {
        "config.json", "quantize_config.json", "generation_config.json", "lowbit.json", "model.safetensors",
        "README.md", "tokenizer.json", "LICENSE", "chat_template.jinja",
    }  # fmt: skip
    made, before = (json.loads((folder / "lowbit.json").read_text()) for folder in (out, source))
    assert (made["layout"], before["layout"]) == ("gptq", "compressed-tensors")
    assert made["converted"]["from"] == "compressed-tensors"
    assert {k: made[k] for k in ("source", "scheme", "formats")} == {
        k: before[k] for k in ("source", "scheme", "formats")
    }
    assert read_checkpoint(out).kv == read_checkpoint(source).kv == str(KV)
    card = (out / "README.md").read_text()
    for line in ("base_model: who/what", "license: apache-2.0", "- gptq", "# who/what, quantized"):
        assert f"{line}\n" in card
    assert str(KV) in card
    dynamic = json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]
    assert dynamic == {r"-:^model\.layers\.1\.mlp\.down_proj$": {}}
    assert "model.layers.1.mlp.down_proj.weight" in read_checkpoint(out).plain_names()
    assert torch.equal(logits(out), logits(source))
    assert str(tmp_path) not in "".join(p.read_text() for p in out.iterdir() if p.suffix in (".json", ".md"))


def test_a_cache_format_survives_layouts_that_have_no_place_for_it(tmp_path: Path) -> None:
    native = convert(run_out(tmp_path, kv=KV), tmp_path / "native", "lowbit").out
    (native / "lowbit.json").unlink()  # now only config.json has it
    plain = convert(native, tmp_path / "gptq", "gptq").out
    back = convert(plain, tmp_path / "back", "lowbit").out
    assert [read_checkpoint(folder).kv for folder in (native, plain, back)] == [str(KV)] * 3
    assert "kv" not in json.loads((plain / "config.json").read_text())["quantization_config"]
    assert json.loads((back / "config.json").read_text())["quantization_config"]["kv"] == str(KV)


def test_awq_s_weights_in_gptq_s_layout(tmp_path: Path) -> None:
    """A checkpoint as AutoAWQ writes it, whose rows lie in another order in each word."""
    model = tiny_llama()
    state: dict[str, torch.Tensor] = {name: t.clone() for name, t in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            q = random_qtensor("int4.g32.asym", *state.pop(f"{path}.weight").shape)
            for name, numbers in (("qweight", q.codes), ("qzeros", q.zero)):
                assert numbers is not None
                rows = numbers.t().long().unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
                state[f"{path}.{name}"] = (rows << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
            state[f"{path}.scales"] = q.scale.t().contiguous()
    source = tmp_path / "source"
    source.mkdir()
    save_file(state, source / "model.safetensors")
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    (source / "config.json").write_text(json.dumps({**model.config.to_dict(), "quantization_config": config}))
    out = convert(source, tmp_path / "out", "gptq").out
    assert_same(read_checkpoint(out), read_checkpoint(source))
    assert torch.equal(logits(out), logits(source))


def test_a_checkpoint_without_provenance_gets_one(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "int4.g32.sym")
    assert not (source / "lowbit.json").exists()
    made = json.loads((convert(source, tmp_path / "out", "gptq").out / "lowbit.json").read_text())
    assert made["source"]["model"] == "source"
    assert len(made["source"]["digest"]) == 64
    assert "scheme" not in made


def refused(source: Path, to: Any, why: str, layer: str = "") -> None:
    """Converting is refused with one error of one line, and nothing is written."""
    out = source.parent / "refused"
    with pytest.raises(CheckpointError, match=why) as caught:
        convert(source, out, to)
    assert caught.value.code == "LB0123"
    assert layer in str(caught.value.where)
    assert [p.name for p in source.parent.iterdir() if "refused" in p.name] == []


WRONG = [
    ("int5.g32.sym", {}, "gptq", "14 layers .*not 5"),
    ("int4.g32.sym.bf16", {}, "gptq", "float16, not bf16"),
    ("e4m3.ch", {}, "gptq", "integers, not e4m3"),
    ("int4.g48.sym", {}, "gptq", "groups of 48 do not divide 64"),
    ("int4.g32.sym", {"intermediate_size": 100}, "gptq", "^LB0123.*100 rows|groups of 32 do not divide 100"),
    ("vq.d4.k256", {}, "gptq", "one code per weight"),
    ("vq.d4.k256", {}, "compressed-tensors", "one code per weight"),
    ("bcq2.g32", {}, "gptq", "no sums"),
    ("bcq2.g32", {}, "compressed-tensors", "no sums"),
    ("int4.g32.sym", {}, "vptq", "vector formats only"),
]


@pytest.mark.parametrize(("text", "sizes", "to", "why"), WRONG)
def test_formats_a_layout_cannot_hold(text: str, sizes: dict[str, int], to: str, why: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if text.startswith("vq"):
        save_quantized(random_model(text), source)
    else:
        saved(source, text, **sizes)
    refused(source, to, why, "model.layers.0.")


def test_layers_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    path = "model.layers.1.mlp.up_proj"
    other = {"eight": random_qtensor("int8.ch.sym", 96, 64), "zeros": random_qtensor("int4.g32.asym", 96, 64)}
    for name, q in other.items():
        folder = tmp_path / name
        source = saved(
            folder / "source", "int4.g32.sym", lambda model, q=q: put(model, path, QuantLinear.from_qtensor(q))
        )
        refused(source, "gptq", rf"1 layer does not fit.*{q.fmt}, most are int4.g32.sym.*GPTQ has one format", path)
    refused(source, "compressed-tensors", "1 layer does.*zero points by one format", path)
    assert convert(tmp_path / "eight" / "source", tmp_path / "ct", "compressed-tensors").layers == 14


def rounding(activation: str, text: str = "int8.ch.sym") -> Callable[[Any], None]:
    """Changes a model: all layers of the text's format, or the first alone where that is another, round inputs."""

    def change(model: Any) -> None:
        for path, old in list(model.named_modules()):
            if isinstance(old, QuantLinear) and (text == "int8.ch.sym" or path.endswith("0.mlp.up_proj")):
                put(model, path, QuantLinear.from_qtensor(old.qtensor(), old.bias, activation=activation))

    return change


def test_layers_that_round_their_inputs(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "int8.ch.sym", rounding("int8.token"))
    refused(source, "gptq", "14 layers.*inputs are rounded to int8.token", "model.layers.0.")
    convert(source, tmp_path / "ct", "compressed-tensors")
    assert load_file(tmp_path / "ct" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    convert(tmp_path / "ct", tmp_path / "back", "lowbit")
    for folder in ("ct", "back"):
        assert_same(read_checkpoint(tmp_path / folder), read_checkpoint(source))
    other = saved(tmp_path / "other" / "source", "int4.g32.sym", rounding("int8.g32", "one"))
    refused(other, "compressed-tensors", "14 layers.*with inputs as they come|rounded to int8.g32", "model.layers.0.")
    refused(other, "gptq", "1 layer does.*rounded to int8.g32", "model.layers.0.mlp.up_proj")
    again = convert(other, tmp_path / "again", "lowbit")
    assert_same(read_checkpoint(again.out), read_checkpoint(other))


def test_static_scales_of_inputs_go_along(tmp_path: Path) -> None:
    path = "model.layers.0.mlp.up_proj"

    def change(model: Any) -> None:
        more = {"activation": "int8.g32.static", "input_scale": torch.tensor([0.1, 0.2])}
        put(model, path, QuantLinear.from_qtensor(model.get_submodule(path).qtensor(), **more))

    source = saved(tmp_path / "source", "int4.g32.sym", change)
    out = read_checkpoint(convert(source, tmp_path / "out", "lowbit").out)
    assert_same(out, read_checkpoint(source))
    assert torch.equal(out.layer_input(path).scale, torch.tensor([0.1, 0.2]))  # type: ignore[arg-type]


def test_experts_stay_with_lowbit(tmp_path: Path) -> None:
    source = save_quantized(swap_linears(mixture("Mixtral"), "int4.g32.sym"), tmp_path / "source")
    for to in ("gptq", "compressed-tensors"):
        refused(source, to, "experts are layers of their own", ".experts.0.")
    out = read_checkpoint(convert(source, tmp_path / "out", "lowbit").out)
    assert out.quantization_config["experts"] is True
    assert_same(out, read_checkpoint(source))


def test_what_is_no_layout_and_no_checkpoint(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "int4.g32.sym")
    refused(source, "onnx", "no layout 'onnx'")
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="LB0114"):
        convert(tmp_path / "dense", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


def test_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "int4.g32.sym")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    with pytest.raises(CheckpointError, match="LB0110"):
        convert(source, source, "gptq")
    assert before == {p.name: p.read_bytes() for p in source.iterdir()}


def test_failures_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "source", "int4.g32.sym")
    calls = iter(range(100))

    def broken(q: QWeight) -> dict[str, torch.Tensor]:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return to_tensors(q)

    to_tensors = gptq_write.to_tensors
    with monkeypatch.context() as patch:
        patch.setattr(gptq_write, "to_tensors", broken)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", "gptq")
    assert next(calls) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    with monkeypatch.context() as patch:
        patch.setattr(write.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        with pytest.raises(CheckpointError, match="LB0111"):
            convert(source, tmp_path / "out", "gptq")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_gguf_file_is_another_module_s_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = run_out(tmp_path, kv=KV)
    seen: list[Path] = []

    def write_gguf(checkpoint: Checkpoint, out: Path) -> Path:
        seen.append(checkpoint.folder)
        out.write_bytes(b"GGUF")
        return out

    fake: Any = ModuleType("gguf_write")
    fake.write_gguf = write_gguf
    monkeypatch.setitem(sys.modules, "lowbit.compiler.io.gguf_write", fake)
    done = convert(source, tmp_path / "out.gguf", "gguf")
    assert seen == [source]
    assert (done.out, done.nbytes, done.layers) == (tmp_path / "out.gguf", 4, 13)
    assert any(str(KV) in note for note in done.notes)
