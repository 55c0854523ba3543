"""`quantize convert`: what it prints, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _cli import error_line, invoke, invoke_json, tiny_tokenizer
from _models import swap_linears, tiny_llama
from safetensors.torch import load_file

from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.io.convert import LAYOUTS
from lowbit.compiler.io.load import save_quantized

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "tiny"
    return save_quantized(swap_linears(tiny_llama(), "int4.g32.sym"), folder, tokenizer=tiny_tokenizer())


def test_convert_writes_a_checkpoint(quantized: Path, tmp_path: Path) -> None:
    document = invoke_json("convert", quantized, "-o", tmp_path / "out", "--to", "gptq")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    nbytes = sum(t.nbytes for t in tensors.values())
    assert document == {"out": str(tmp_path / "out"), "from": "compressed-tensors", "to": "gptq", "layers": 14,
                        "bytes": nbytes, "notes": []}  # fmt: skip
    assert read_checkpoint(tmp_path / "out").method == "gptq"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_convert_in_plain_text(quantized: Path, tmp_path: Path) -> None:
    result = invoke("convert", quantized, "-o", tmp_path / "out", "--to", "lowbit")
    assert result.exit_code == 0
    assert re.search(r"^layout +lowbit, from compressed-tensors$", result.stdout, re.M)
    assert re.search(r"^quantized layers +14$", result.stdout, re.M)


def test_convert_refuses(quantized: Path, tiny: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out", "--to")
    line = error_line(invoke("convert", quantized, *out, "vptq"))
    assert "LB0123" in line
    assert "14 layers" in line
    assert "model.layers.0.self_attn.q_proj" in line
    assert "LB0114" in error_line(invoke("convert", tiny, *out, "gptq"))
    assert "LB0101" in error_line(invoke("convert", tmp_path / "none", *out, "gptq"))
    assert "LB0110" in error_line(invoke("convert", quantized, "-o", quantized, "--to", "gptq"))
    usage = invoke("convert", quantized, *out, "onnx")
    assert usage.exit_code == 2
    assert "--to" in usage.stderr
    assert not list(tmp_path.iterdir())


def test_the_manual_lists_options_layouts_and_keys(quantized: Path, tmp_path: Path) -> None:
    manual = (ROOT / "docs" / "cli.md").read_text().split("## quantize convert")[1].split("\n## ")[0]
    shown = set(re.findall(r"--[a-z]+", invoke("convert", "--help").stdout)) - {"--help", "--json"}
    assert shown == set(re.findall(r"`(--[a-z]+)`", manual))
    assert all(f"`{layout}`" in manual for layout in LAYOUTS)
    document = invoke_json("convert", quantized, "-o", tmp_path / "out", "--to", "lowbit")
    assert all(f"`{key}`" in manual for key in document)
