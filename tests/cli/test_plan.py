"""`quantize plan`: exact sizes, honest refusals, exit code 3, nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from _cli import error_line, invoke, invoke_json, save_tiny_llama
from safetensors import safe_open

from lowbit.compiler.job.consumers import vllm_notes
from lowbit.quantizers.formats import parse_format

# Linear layers of the tiny Llama: [out, in] of q, k, v, o, gate, up, down, twice.
SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)] * 2


@pytest.fixture(autouse=True)
def _steady_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates are compared with each other; the measured rate changes with what else runs here."""
    monkeypatch.setattr("lowbit.compiler.job.plan._flops_per_second", lambda: 1e11)


def test_sizes_are_exact(tiny: Path, tmp_path: Path) -> None:
    plan = invoke_json("plan", tiny, "--format", "int4.g32.asym", "--out", tmp_path / "out")
    words = sum(n * k * 4 // 32 * 4 for n, k in SHAPES)
    scales = sum(n * k // 32 * 2 for n, k in SHAPES)
    zeros = sum(n * 4 // 32 * 4 * (k // 32) for n, k in SHAPES)
    quantized = words + scales + zeros + 16 * len(SHAPES)
    assert plan["sizes"]["quantized_bytes"] == quantized
    assert plan["sizes"]["quantized_parameters"] == sum(n * k for n, k in SHAPES)
    kept = plan["sizes"]["parameters"] - plan["sizes"]["quantized_parameters"]
    assert plan["sizes"]["output_bytes"] == quantized + 4 * kept
    assert plan["sizes"]["bits_per_quantized_weight"] == pytest.approx(
        8 * quantized / plan["sizes"]["quantized_parameters"]
    )
    assert plan["possible"] is True
    assert not (tmp_path / "out").exists()


def test_a_rotated_head_is_counted(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    how = (tmp_path / "model", "--format", "int4.g32.sym", "--method", "rtn", "--rewrite", "rotate")
    plan = invoke_json("plan", *how)
    assert any(note.startswith("lm_head shares the embedding table") for note in plan["notes"])
    assert invoke("run", *how, "--out", tmp_path / "out").exit_code == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert plan["sizes"]["output_bytes"] == sum(file.get_tensor(name).nbytes for name in file.keys())


def test_plan_lists_layers_and_who_runs_them(tiny: Path) -> None:
    plan = invoke_json("plan", tiny)
    assert len(plan["layers"]) == len(SHAPES) + 1
    assert [x["path"] for x in plan["layers"] if x["format"] is None] == ["lm_head"]
    assert plan["backends"]["reference"] == "runs every layer"
    assert plan["seconds"]["low"] < plan["seconds"]["likely"] < plan["seconds"]["high"]
    assert plan["peak_memory_bytes"] > plan["sizes"]["source_bytes"]
    assert "vllm" in plan["consumers"]


@pytest.mark.parametrize(
    ("text", "gptq", "gguf"),
    [
        ("int4.g32.sym", "after `quantize convert --to gptq`", "after `quantize convert --to gguf`"),
        ("int4.g64.sym", "no: groups of 64 do not divide 96", "after"),
        ("int8.ch.asym", "after", "no: it is int8.ch.asym, and GGUF has no such numbers"),
        ("tcq2.g32", "no: GPTQ's layout holds integers, not tcq2", "no: it is tcq2.g32"),
        ("vq.d4.k16", "no: GPTQ's layout holds one code", "no: it is vq.d4.k16"),
    ],
)
def test_a_plan_says_who_reads_it_after_conversion(tiny: Path, text: str, gptq: str, gguf: str) -> None:
    plan = invoke_json("plan", tiny, "--format", text)
    assert plan["consumers"]["gptqmodel"].startswith(gptq)
    assert plan["consumers"]["llama.cpp"].startswith(gguf)
    assert plan["consumers"]["lowbit"] == "yes"


def test_inputs_that_are_rounded_are_not_converted(tiny: Path) -> None:
    plan = invoke_json("plan", tiny, "--scheme", "w8a8-int8")
    assert plan["consumers"]["gptqmodel"].startswith("no: its inputs are")
    assert plan["consumers"]["llama.cpp"].startswith("no: inputs are rounded")


def test_more_calibration_takes_longer(tiny: Path) -> None:
    few = invoke_json("plan", tiny, "--format", "int4.ch.sym", "--samples", 1)
    many = invoke_json("plan", tiny, "--format", "int4.ch.sym", "--samples", 100_000)
    assert many["seconds"]["likely"] > few["seconds"]["likely"]
    assert many["peak_memory_bytes"] > few["peak_memory_bytes"]


def test_training_takes_longer_and_fine_tuning_more_memory(tiny: Path) -> None:
    calibration = ("--samples", 100_000)
    plans = [
        invoke_json("plan", tiny, "--scheme", "w2-decoupleq", "--format", "int2.g32.fz", *calibration, *training)
        for training in (("--tune", 0), ("--tune", 4), ("--tune", 4, "--finetune", 2))
    ]
    times = [plan["seconds"]["likely"] for plan in plans]
    assert times[0] < times[1] < times[2]
    assert plans[0]["peak_memory_bytes"] == plans[1]["peak_memory_bytes"] < plans[2]["peak_memory_bytes"]
    assert "tune" not in plans[0]["scheme"]


def test_a_group_wider_than_a_layer_is_impossible(tiny: Path) -> None:
    plan = invoke_json("plan", tiny, "--format", "int4.g512.sym", exit_code=3)
    assert plan["possible"] is False
    assert "LB0213" in plan["problems"][0]
    assert "model.layers.0.self_attn.q_proj" in plan["problems"][0]
    result = invoke("plan", tiny, "--format", "int4.g512.sym")
    assert result.exit_code == 3
    assert "impossible: " in result.stderr


def test_a_scheme_that_keeps_everything_is_impossible(tiny: Path, tmp_path: Path) -> None:
    scheme = tmp_path / "keep.toml"
    scheme.write_text('weight = "int4.ch.sym"\nignore = ["*"]\n')
    assert invoke_json("plan", tiny, "--scheme", scheme, exit_code=3)["problems"]


def test_plain_text(tiny: Path) -> None:
    out = invoke("plan", tiny, "--format", "int4.g48.sym", "--layers").stdout
    assert "model.layers.0.mlp.down_proj" in out
    assert "peak memory" in out
    assert "shorter last group" in out  # 48 does not divide 64
    assert "group 48 does not divide 64" in out


def test_refusals(tiny: Path, tmp_path: Path) -> None:
    assert "LB0101" in error_line(invoke("plan", tmp_path / "missing"))
    assert "LB0230" in error_line(invoke("plan", tiny, "--scheme", "no-such"))
    assert "LB0210" in error_line(invoke("plan", tiny, "--format", "float99"))
    assert "LB05" in error_line(invoke("plan", tiny, "--method", "no-such"))


def test_plan_never_reads_weights(tmp_path: Path) -> None:
    """Weights that are not there at all: only the header and a hole of the right size."""
    save_tiny_llama(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    with file.open("wb") as f:
        f.write(data[:header])
        f.truncate(len(data))
    assert invoke_json("plan", tmp_path / "m", "--format", "int4.ch.sym")["possible"]
    shutil.rmtree(tmp_path / "m")


@pytest.mark.parametrize(
    ("text", "k", "reason"),
    [
        ("int4.g128.sym", 4096, ""),
        ("int8.ch.sym", 576, ""),
        ("int4.g64.sym", 100, "does not divide"),
        ("int3.g64.sym", 4096, "4 and 8 bits"),
        ("int4.g48.sym", 96, "no kernel for groups of 48"),
        ("int4.t.sym", 96, "per channel or group"),
        ("int4.g128.sym.f32", 4096, "16-bit scales"),
    ],
)
def test_vllm_notes(text: str, k: int, reason: str) -> None:
    notes = vllm_notes([("a", 64, k, parse_format(text))])
    assert (not notes) if not reason else reason in notes[0]
