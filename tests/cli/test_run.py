"""`quantize run` from model folder to a checkpoint that loads, and every way it must refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from _cli import error_line, invoke, invoke_json, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lowbit
from lowbit.compiler.io.checkpoint import read_checkpoint

FEW = ("--samples", 4, "--length", 16)


@pytest.fixture(scope="module")
def done(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: int4 groups of 32 by GPTQ."""
    out = tmp_path_factory.mktemp("run") / "out"
    result = invoke("run", tiny, "-o", out, "--format", "int4.g32.sym", "--calib", text, *FEW)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("layer ") >= 14
    return out


def test_the_checkpoint_is_complete(done: Path) -> None:
    names = {p.name for p in done.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "report.json", "report.html"} <= names
    assert not [p for p in done.parent.iterdir() if p != done], "nothing is left beside the output"
    assert len(read_checkpoint(done).modules) == 14


def test_the_report_counts_what_was_done(done: Path) -> None:
    report = json.loads((done / "report.json").read_text())
    assert len(report["layers"]) == 14
    assert 4.5 <= report["totals"]["bits_per_quantized_weight"] < 4.7
    assert report["totals"]["bits_per_weight"] > report["totals"]["bits_per_quantized_weight"]
    assert "<script" not in (done / "report.html").read_text()


def test_plan_predicted_the_size(tiny: Path, done: Path) -> None:
    plan = invoke_json("plan", tiny, "--format", "int4.g32.sym")
    data = sum(t.numel() * t.element_size() for t in load_file(done / "model.safetensors").values())
    assert plan["sizes"]["output_bytes"] == pytest.approx(data, rel=0.01)


def test_inspect_and_eval_take_the_result(tiny: Path, text: Path, done: Path) -> None:
    document = invoke_json("inspect", done)
    kinds = {k["kind"]: k for k in document["kinds"]}
    assert kinds["int4.g32.sym"]["count"] == 14
    assert document["bits_per_weight_without_embeddings"] < document["bits_per_weight"]
    figures = invoke_json("eval", done, "--text", text, "--windows", 2, "--length", 40, "--reference", tiny)
    assert 0 <= figures["kl"]["mean"] < 0.1
    assert figures["perplexity"] > 1


def test_plain_transformers_and_lowbit_agree(done: Path) -> None:
    ids = torch.arange(20)[None] % 30
    plain = AutoModelForCausalLM.from_pretrained(done, dtype=torch.float32).eval()
    with torch.inference_mode():
        want = plain(input_ids=ids).logits
        got = lowbit.load(done, dtype=torch.float32)(input_ids=ids).logits
    assert (got - want).abs().max() < 1e-3 * want.abs().max()


def test_json_is_one_document_on_stdout(tiny: Path, tmp_path: Path) -> None:
    document = invoke_json("run", tiny, "-o", tmp_path / "out", "--method", "rtn", *FEW)
    assert document["out"] == str(tmp_path / "out")
    assert len(document["layers"]) == 14


def refuse(out: Path, *args: object) -> str:
    """The error line of a refused run, which must leave nothing in the folder of `out`."""
    before = sorted(p.name for p in out.parent.iterdir())
    line = error_line(invoke("run", *args, "-o", out, *FEW))
    assert sorted(p.name for p in out.parent.iterdir()) == before, "a refused run wrote something"
    return line


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "out"


def test_missing_model(out: Path, tmp_path: Path) -> None:
    assert "LB0101" in refuse(out, tmp_path / "missing")


def test_truncated_safetensors(tiny: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    line = refuse(out, tmp_path / "m")
    assert "LB0102" in line
    assert "model.safetensors" in line


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_nan_weights(tiny: Path, text: Path, out: Path, tmp_path: Path, method: str) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    line = refuse(out, tmp_path / "m", "--method", method, "--calib", text)
    assert "LB0107" in line
    assert "model.layers.1.mlp.up_proj" in line
    assert "[3, 5]" in line


def test_unknown_scheme_format_and_method(tiny: Path, out: Path) -> None:
    assert "LB0230" in refuse(out, tiny, "--scheme", "w17a99")
    assert "LB0210" in refuse(out, tiny, "--format", "int9.g64")
    assert "LB05" in refuse(out, tiny, "--method", "magic")


def test_output_folder_not_empty(tiny: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert "LB0110" in refuse(out, tiny, "--method", "rtn")
    assert (out / "mine.txt").read_text() == "keep"


def test_group_larger_than_k(tiny: Path, out: Path) -> None:
    line = refuse(out, tiny, "--format", "int4.g256.sym")
    assert "LB0213" in line
    assert "model.layers.0" in line


def test_missing_calibration_text(tiny: Path, out: Path, tmp_path: Path) -> None:
    assert "error LB0" in refuse(out, tiny, "--calib", tmp_path / "missing.txt")


def test_a_model_without_linear_layers(out: Path, tmp_path: Path) -> None:
    """GPT-2 multiplies with its own Conv1D modules; only the head is a linear layer, and schemes keep that."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=80, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    assert "LB0504" in refuse(out, tmp_path / "m")


@pytest.mark.parametrize("backends", ["cpp,reference", "cpp,tvm,reference"])
def test_without_a_compiler_another_backend_runs_and_says_so_once(
    backends: str, done: Path, text: Path, tmp_path: Path
) -> None:
    env = {**os.environ, "CXX": "/nonexistent", "PATH": str(tmp_path), "LOWBIT_CACHE": str(tmp_path / "cache")}
    env["LOWBIT_BACKENDS"] = backends
    args = ["eval", done, "--text", text, "--windows", 2, "--length", 20, "--json"]
    command = [sys.executable, "-m", "lowbit.cli", *map(str, args)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["perplexity"] > 1
    compiles = "tvm" in backends and find_spec("tvm") is not None
    assert result.stderr.count("no C++ compiler was found") == 1
    assert result.stderr.count("runs on the reference") == (0 if compiles else 1)
    assert "Traceback" not in result.stderr


def test_python_interface(tiny: Path, text: Path, tmp_path: Path) -> None:
    """The README's ten lines."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokens = tiny_tokenizer()(text.read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    quantized = lowbit.quantize(model, "w4a16", calibration=tokens[:128].view(4, 32), format="int4.g32.asym")
    folder = lowbit.save(quantized, tmp_path / "saved", tokenizer=tiny_tokenizer())
    loaded = lowbit.compile(lowbit.load(folder), max_tokens=1)
    with torch.inference_mode():
        want = quantized(input_ids=tokens[None, :1]).logits
        got = loaded(input_ids=tokens[None, :1]).logits
    assert (got - want).abs().max() < 1e-3 * want.abs().max()
