"""A run writes what it computed, in bounded memory, and refuses early what cannot work."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from _jobs import Recorder, contents, quantize, save_tiny, scheme, token_ids
from _models import tiny_llama
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from lowbit.compiler.errors import CheckpointError, FormatError, RunError
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.job.inmemory import choose_codes, quantize_model
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.methods import Rtn, proxy_error
from lowbit.quantizers.scheme import Scheme

QUICK = {"refits": 0, "clip_search": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("run") / "model")


def test_files_and_memory_give_the_same_codes(model: Path, tmp_path: Path) -> None:
    """The run from disk and the engine over a loaded model are one engine."""
    for sequential in (True, False):
        out = tmp_path / f"out{sequential}"
        quantize(model, out, scheme(), sequential=sequential)
        found = choose_codes(tiny_llama(), scheme(), token_ids(), sequential=sequential)
        checkpoint = read_checkpoint(out)
        assert set(checkpoint.modules) == set(found)
        for path, (qtensor, _) in found.items():
            stored = checkpoint.qtensor(path)
            assert torch.equal(stored.codes, qtensor.codes), path
            assert torch.equal(stored.scale, qtensor.scale), path


def test_the_modes_differ_where_they_should(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "s", scheme("int2.g32.sym"), sequential=True)
    quantize(model, tmp_path / "p", scheme("int2.g32.sym"), sequential=False)
    sequential, parallel = read_checkpoint(tmp_path / "s"), read_checkpoint(tmp_path / "p")
    same = {p: torch.equal(sequential.qtensor(p).codes, parallel.qtensor(p).codes) for p in sequential.modules}
    first = "model.layers.0.self_attn."
    assert all(same[first + name] for name in ("q_proj", "k_proj", "v_proj")), "their inputs are the same"
    assert not any(
        equal for path, equal in same.items() if not path.startswith((first + "q", first + "k", first + "v"))
    )


def block_output_error(model: Any, found: dict[str, Any], tokens: torch.Tensor) -> float:
    with torch.no_grad():
        want = model.model(input_ids=tokens).last_hidden_state
        for path, (qtensor, _) in found.items():
            model.get_submodule(path).weight.copy_(qtensor.dequantize())
        return float((model.model(input_ids=tokens).last_hidden_state - want).square().mean() / want.square().mean())


def test_calibrated_beats_rounded_on_the_models_output() -> None:
    tokens, fmt = token_ids(16, 32), "int3.g32.asym"
    errors = {}
    for name, method, sequential in [("rtn", "rtn", True), ("gptq", "gptq", True), ("parallel", "gptq", False)]:
        net = tiny_llama(num_hidden_layers=3)
        calibration = tokens if method == "gptq" else None
        found = choose_codes(net, scheme(fmt, method), calibration, sequential=sequential)
        errors[name] = block_output_error(net, found, tokens)
    assert errors["gptq"] < 0.7 * errors["rtn"]
    assert errors["parallel"] < 0.8 * errors["rtn"]


def test_reported_errors_are_measured(model: Path, tmp_path: Path) -> None:
    sink = Recorder()
    result = quantize(model, tmp_path / "out", scheme(), sequential=False, progress=sink)
    layers = result.report["layers"]
    assert [layer["path"] for layer in layers] == sink.layers
    assert all(0 < layer["proxy_error"] <= layer["rtn_error"] for layer in layers)
    assert all(layer["tokens"] == 144 for layer in layers)
    assert result.report["totals"]["bits_per_quantized_weight"] == pytest.approx(4.5)
    assert result.report["peak_memory"]["process_bytes"] > 10e6
    # The first layer's inputs can be had directly.
    net, seen = tiny_llama(), []
    net.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        net(input_ids=token_ids())
    x = seen[0].reshape(-1, 64).double()
    stored = read_checkpoint(tmp_path / "out").qtensor(layers[0]["path"]).dequantize()
    weight = net.get_submodule(layers[0]["path"]).weight.detach()
    assert proxy_error(weight, stored, x.T @ x) == pytest.approx(layers[0]["proxy_error"], rel=1e-3)


def test_rounding_needs_no_text(model: Path, tmp_path: Path) -> None:
    result = quantize(model, tmp_path / "out", scheme(method="rtn"), calibration=None)
    assert result.report["calibration"]["source"] == "none"
    weight = tiny_llama().model.layers[1].mlp.down_proj.weight.detach()
    want = Rtn().quantize(weight, parse_format("int4.g32.sym"), None).qtensor
    assert torch.equal(read_checkpoint(tmp_path / "out").qtensor("model.layers.1.mlp.down_proj").codes, want.codes)


def test_the_output_layer_is_calibrated_on_what_it_sees(model: Path, tmp_path: Path) -> None:
    chosen = Scheme("all", parse_format("int4.g32.sym"), "gptq", {}, ignore=())
    result = quantize(model, tmp_path / "out", chosen, sequential=False)
    head = result.report["layers"][-1]
    assert head["path"] == "lm_head"
    assert head["tokens"] == 144
    assert head["proxy_error"] < head["rtn_error"]
    found = choose_codes(tiny_llama(), chosen, token_ids(), sequential=False)
    assert torch.equal(read_checkpoint(tmp_path / "out").qtensor("lm_head").codes, found["lm_head"][0].codes)


def test_a_tied_output_layer_is_kept_and_mentioned(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", tie_word_embeddings=True)
    chosen = Scheme("all", parse_format("int4.g32.sym"), "gptq", dict(QUICK), ignore=())
    result = quantize(tmp_path / "model", tmp_path / "out", chosen)
    assert len(result.report["layers"]) == 14
    assert any("lm_head shares" in note for note in result.report["notes"])


def test_overrides_and_ragged_groups(model: Path, tmp_path: Path) -> None:
    chosen = Scheme(
        "mixed", parse_format("int4.g40.sym"), "gptq", dict(QUICK),
        overrides=(("model.layers.0.*", None), ("*.down_proj", parse_format("int8.ch.sym"))),
    )  # fmt: skip
    quantize(model, tmp_path / "out", chosen)
    modules = {path: str(fmt) for path, fmt in read_checkpoint(tmp_path / "out").modules.items()}
    assert len(modules) == 7
    assert modules["model.layers.1.mlp.down_proj"] == "int8.ch.sym"
    assert modules["model.layers.1.mlp.up_proj"] == "int4.g40.sym"


def live_tensor_bytes() -> int:
    """Bytes of all tensor storages that are alive, files mapped into memory left out."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Weigher(Recorder):
    """Weighs all tensors after every down projection, when most is held."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self.base, self.most = live_tensor_bytes(), 0

    def layer(self, i: int, n: int, path: str, info: dict[str, Any]) -> None:
        super().layer(i, n, path, info)
        if path.endswith("down_proj"):
            self.most = max(self.most, live_tensor_bytes() - self.base)


@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "parallel"])
def test_memory_holds_one_block_not_the_model(tmp_path: Path, sequential: bool) -> None:
    """More blocks need no more memory; what is held fits one block, its statistics, and a constant."""
    sizes, most, tracked = {"hidden_size": 128, "intermediate_size": 256}, {}, {}
    for layers in (2, 8):
        source = save_tiny(tmp_path / f"model{layers}", "150KB", num_hidden_layers=layers, **sizes)
        assert len(list(source.glob("*.safetensors"))) >= layers
        sink = Weigher()
        result = quantize(source, tmp_path / f"out{layers}", scheme(**QUICK), sequential=sequential, progress=sink)
        most[layers], tracked[layers] = sink.most, result.report["peak_memory"]["tensor_bytes"]
    block = sum(p.numel() * 4 for p in tiny_llama(**sizes).model.layers[0].parameters())
    statistics = (3 * 128**2 + 256**2) * 8
    embedding, hidden = 80 * 128 * 4, 6 * 24 * 128 * 4
    assert 0 < most[8] < 1.02 * most[2]
    assert tracked[8] == tracked[2]
    beside = 1 + sequential  # the float block, what compares the two, and its hidden states
    assert most[8] < beside * block + (1 + beside) * (statistics + embedding + hidden)
    assert most[8] < 0.75 * 8 * block
    assert block < tracked[8] < block + 8 * statistics + embedding


REFUSED = {
    "occupied output": (CheckpointError, "LB0110"),
    "nan weights": (CheckpointError, "LB0107"),
    "large group": (FormatError, "LB0213"),
    "nothing to do": (RunError, "LB0504"),
    "no linear layers": (RunError, "LB0504"),
    "unknown option": (RunError, "LB0502"),
    "no tokenizer": (CheckpointError, "LB0117"),
    "short text": (RunError, "LB0520"),
    "disk": (CheckpointError, "LB0111"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_before_anything_is_written(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, chosen, options = model, tmp_path / "out", scheme(**QUICK), {}
    if kind == "occupied output":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif kind == "nan weights":
        source = tmp_path / "model"
        save_tiny(source, "1GB")
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = torch.nan
        tensors["model.layers.1.mlp.up_proj.weight"][6, 0] = torch.inf
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    elif kind == "large group":
        chosen = Scheme(
            "x", parse_format("int4.g64.sym"), "gptq", {}, overrides=(("*.1.*.up_proj", parse_format("int4.g65.sym")),)
        )
    elif kind == "nothing to do":
        chosen = Scheme("x", parse_format("int4.g32.sym"), "gptq", {}, ignore=("*",))
    elif kind == "no linear layers":
        source = tmp_path / "model"
        sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 10, "n_positions": 8}
        GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(source)
        chosen = Scheme("x", parse_format("int4.ch.sym"), "gptq", {})
    elif kind == "unknown option":
        chosen = scheme(damp=1)
    elif kind == "no tokenizer":
        options = {"calibration": "pydoc"}
    elif kind == "short text":
        options = {"samples": 0}
    elif kind == "disk":
        monkeypatch.setattr("lowbit.compiler.job.stream.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    error, code = REFUSED[kind]
    with pytest.raises(error, match=code) as caught:
        quantize(source, out, chosen, **options)
    if kind == "nan weights":
        assert caught.value.where == "model.layers.1.mlp.up_proj.weight"
        assert "2 values" in caught.value.message
        assert "[5, 7]" in caught.value.message
    assert not out.exists() or [p.name for p in out.iterdir()] == ["mine.txt"]
    working = tmp_path / ".out.lowbit-run"
    assert not working.exists() or {p.name for p in working.iterdir()} <= {"lock", "journal.jsonl"}


def test_a_disk_that_cannot_be_written_is_a_refusal_and_loses_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"LB0115.*out: cannot be written: Not a directory"):
        quantize(model, tmp_path / "file" / "out", scheme(**QUICK))
    calls, sync = [], os.fsync

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr("lowbit.compiler.job.journal.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"LB0111.*the disk is full.*same command"):
        quantize(model, tmp_path / "out", scheme(**QUICK))
    assert not (tmp_path / "out").exists()
    result = quantize(model, tmp_path / "out", scheme(**QUICK))
    assert result.report["resumed_layers"] > 0


def test_the_working_folder_can_be_elsewhere(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "a" / "out", scheme(**QUICK), workdir=tmp_path / "work")
    quantize(model, tmp_path / "b", scheme(**QUICK))
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b")
    assert not (tmp_path / "work").exists()


def test_quantize_model_replaces_layers_in_place() -> None:
    net, tokens = tiny_llama(), token_ids()
    with torch.no_grad():
        want = net(input_ids=tokens).logits
        same = quantize_model(net, scheme("int8.g32.sym"), tokens)
        assert same is net
        got = net(input_ids=tokens).logits
    assert sum(isinstance(m, QuantLinear) for m in net.modules()) == 14
    assert type(net.lm_head) is torch.nn.Linear
    assert (got - want).abs().max() < 0.05 * want.abs().max()


def test_quantize_model_needs_data_or_rounding() -> None:
    net = tiny_llama()
    with pytest.raises(RunError, match="LB0524"):
        quantize_model(net, scheme())
    assert not any(isinstance(m, QuantLinear) for m in net.modules())
    quantize_model(net, scheme(method="rtn"))
    plain = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    quantize_model(plain, scheme(method="rtn"))
    assert isinstance(plain[0], QuantLinear)
    with pytest.raises(RunError, match="LB0505"):
        choose_codes(torch.nn.Sequential(torch.nn.Linear(64, 32)), scheme(), token_ids())


def test_a_bad_layer_leaves_the_model_as_it_was() -> None:
    net = tiny_llama()
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"LB0107 model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize_model(net, scheme(method="rtn"))
    assert not any(isinstance(m, QuantLinear) for m in net.modules())


def test_half_precision_models_are_calibrated_in_float32() -> None:
    net = tiny_llama().to(torch.bfloat16)
    # Searches, and comparing two models, would turn the last bits of statistics into other codes.
    chosen = scheme(refits=0, clip_search=False, asymmetric=0.0)
    found = choose_codes(net, chosen, token_ids())
    again = choose_codes(tiny_llama().to(torch.bfloat16).float(), chosen, token_ids())
    equal = [(found[p][0].codes == again[p][0].codes).float().mean() for p in found]
    assert min(equal) > 0.9, "only the rotary tables are rounded to half precision by the model itself"
    assert next(net.parameters()).dtype == torch.bfloat16
