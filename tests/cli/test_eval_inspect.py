"""`quantize eval` and `quantize inspect` on a tiny model and on files that are wrong."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from _cli import error_line, invoke, invoke_json, save_tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM

from lowbit.compiler.errors import RunError


def test_eval_reproduces_transformers_loss(tiny: Path, text: Path) -> None:
    document = invoke_json("eval", tiny, "--text", text, "--windows", 3, "--length", 50)
    ids = torch.tensor(tiny_tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"][:150]).view(3, 50)
    model = LlamaForCausalLM.from_pretrained(tiny)
    losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in ids]
    assert document["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert document["tokens"] == 150
    assert document["predictions"] == 147
    assert document["seconds"] > 0
    assert document["kl"] is None


def test_eval_against_itself_and_another(tiny: Path, text: Path, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "other", seed=1)
    options = ("--text", text, "--windows", 2, "--length", 40, "--reference", tiny)
    same = invoke_json("eval", tiny, *options)["kl"]
    assert abs(same["mean"]) < 1e-6
    assert same["same_top1"] == 1.0
    other = invoke_json("eval", tmp_path / "other", *options)["kl"]
    assert 0 < other["mean"] <= other["max"]
    assert other["p99"] <= other["max"]


def test_eval_in_plain_text(tiny: Path, text: Path) -> None:
    result = invoke("eval", tiny, "--text", text, "--windows", 2, "--length", 40)
    assert result.exit_code == 0
    assert result.stdout.startswith("perplexity ")
    assert "window 2/2" in result.stderr


def test_eval_says_when_the_text_is_shorter_than_asked(tiny: Path, text: Path) -> None:
    result = invoke("eval", tiny, "--text", text, "--windows", 10_000, "--length", 1000)
    assert "note: the text has only" in result.stderr


def test_eval_refuses(tiny: Path, text: Path, tmp_path: Path) -> None:
    assert "LB0151" in error_line(invoke("eval", tiny, "--text", tmp_path / "missing.txt"))
    assert "LB0101" in error_line(invoke("eval", tmp_path / "missing", "--text", text))
    assert "LB0540" in error_line(invoke("eval", tiny, "--text", text, "--length", 100_000))
    save_tiny_llama(tmp_path / "small", vocab_size=40)
    refused = invoke("eval", tiny, "--text", text, "--length", 20, "--reference", tmp_path / "small")
    assert "LB0542" in error_line(refused)


def test_eval_without_tokenizer_is_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    assert "LB0117" in error_line(invoke("eval", tmp_path / "bare", "--text", text))


def test_inspect_counts_every_tensor(tiny: Path) -> None:
    document = invoke_json("inspect", tiny)
    model = LlamaForCausalLM.from_pretrained(tiny)
    state = model.state_dict()
    assert document["weights"] == sum(t.numel() for t in state.values())
    assert document["bytes"] == 4 * document["weights"]
    assert {t["name"] for t in document["tensors"]} == set(state)
    assert document["bits_per_weight"] == 32
    assert document["kinds"] == [
        {"kind": "float32", "weights": document["weights"], "nbytes": document["bytes"], "count": len(state),
         "bits_per_weight": 32.0}
    ]  # fmt: skip


def test_inspect_in_plain_text(tiny: Path) -> None:
    out = invoke("inspect", tiny, "--tensors").stdout
    assert "model.layers.1.mlp.down_proj.weight" in out
    assert "LlamaForCausalLM" in out


def test_inspect_refuses_broken_files(tiny: Path, tmp_path: Path) -> None:
    assert "LB0101" in error_line(invoke("inspect", tmp_path / "missing"))
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "LB0102" in error_line(invoke("inspect", broken))


def test_unexpected_errors_are_one_line_and_exit_1(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str) -> None:
        raise ZeroDivisionError("planted\nfault")

    monkeypatch.setattr("lowbit.compiler.job.contents.read_contents", fail)
    result = invoke("inspect", tiny)
    assert result.exit_code == 1
    assert result.stderr == "error: unexpected ZeroDivisionError: planted fault (--debug shows where)\n"
    assert "Traceback" in invoke("--debug", "inspect", tiny).stderr


def test_interrupts_exit_130(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.compiler.job.contents.read_contents", interrupt)
    assert invoke("inspect", tiny).exit_code == 130


def test_a_run_that_stopped_when_asked_exits_130(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(model: str) -> None:
        raise RunError("LB0530", "stopped after layer 3", hint="run the same command again to continue")

    monkeypatch.setattr("lowbit.compiler.job.contents.read_contents", stop)
    result = invoke("inspect", tiny)
    assert result.exit_code == 130
    assert result.stderr == "LB0530 stopped after layer 3 (run the same command again to continue)\n"


def test_json_stays_pure_when_a_library_prints(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.compiler.job import contents

    real = contents.read_contents

    def chatty(model: str) -> contents.Contents:
        print("noise on stdout")
        return real(model)

    monkeypatch.setattr(contents, "read_contents", chatty)
    result = invoke("inspect", tiny, "--json")
    json.loads(result.stdout)
    assert "noise" in result.stderr
