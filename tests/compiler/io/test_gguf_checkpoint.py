"""GGUF files as quantized checkpoints: loaded on kernels, converted, or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from _gguf import ROWS, WIDE, checkpoint, random_blocks
from _models import dequantized, tiny_llama
from torch import Tensor
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import lowbit
from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import gguf_tensors
from lowbit.compiler.io.checkpoint import Checkpoint, read_checkpoint
from lowbit.compiler.io.convert import convert
from lowbit.compiler.io.gguf_blocks import BLOCK_TYPES
from lowbit.compiler.io.gguf_tensors import PlannedTensor
from lowbit.compiler.io.gguf_write import write_gguf
from lowbit.compiler.io.load import module_formats
from lowbit.compiler.io.source import open_model
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.job.export import export_kernels
from lowbit.compiler.job.models import load_dense

pytest.importorskip("gguf")

IDS = torch.arange(10)[None]
LARGE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": ROWS}


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def mixed_file(folder: Path, monkeypatch: pytest.MonkeyPatch, *types: str) -> Path:
    """A file whose layers have these types in turn, of random blocks, as `llama-quantize` mixes them."""
    seen: list[str] = []

    def blocks(_: Checkpoint, path: str, target: str, shape: tuple[int, ...], order: Tensor | None) -> PlannedTensor:
        kind = types[len(seen) % len(types)]
        seen.append(path)
        width = shape[1] // BLOCK_TYPES[kind].columns * BLOCK_TYPES[kind].nbytes
        seed = len(seen)
        return PlannedTensor(
            target, kind, math.prod(shape), (shape[0], width), lambda: random_blocks(kind, *shape, seed)
        )

    monkeypatch.setattr(gguf_tensors, "_blocks", blocks)
    sizes = {name: kind.nbytes for name, kind in BLOCK_TYPES.items()}
    monkeypatch.setattr("lowbit.compiler.io.gguf_write.BLOCK_BYTES", sizes)
    monkeypatch.setattr("lowbit.compiler.io.gguf_write._add_file_type", lambda writer, tensors: None)
    return write_gguf(checkpoint(folder, tiny_llama(**LARGE)), folder / "mixed.gguf")


@pytest.mark.parametrize("text", ["int4.g32.sym", "int8.g32.sym", "mxfp4", "int4.g64.asym"])
def test_layers_are_those_that_were_written(text: str, tmp_path: Path) -> None:
    given = checkpoint(tmp_path, text=text)
    found = read_checkpoint(write_gguf(given, tmp_path / "out.gguf"))
    assert found.method == "gguf"
    assert set(found.modules) == set(given.modules)
    for path in given.modules:
        assert found.shape(path) == given.shape(path)
        assert torch.equal(found.qtensor(path).dequantize(), given.qtensor(path).dequantize()), path


def test_a_loaded_file_has_packed_layers_and_the_same_logits(tmp_path: Path) -> None:
    path = write_gguf(checkpoint(tmp_path, text="int4.g32.sym"), tmp_path / "out.gguf")
    model = lowbit.load(path)
    assert {str(fmt) for fmt in module_formats(model).values()} == {"int4.g32.sym"}
    assert len(module_formats(model)) == 14
    want = logits(load_dense(open_model(path)))
    assert float((logits(model) - want).norm() / want.norm()) < 1e-3


def test_a_head_of_its_own_is_a_layer_and_embeddings_are_numbers(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, text="int8.g32.sym", head=True)
    found = read_checkpoint(write_gguf(given, tmp_path / "out.gguf"))
    assert "lm_head" in found.modules
    assert found.info("model.embed_tokens.weight").dtype == torch.float16
    assert found.info("model.norm.weight").dtype == torch.float32
    assert found.tensor("model.embed_tokens.weight").dtype == torch.float16


def test_biases(tmp_path: Path) -> None:
    """Qwen2's queries and keys have biases, and its rows are as they are."""
    path = write_gguf(checkpoint(tmp_path, Qwen2ForCausalLM(Qwen2Config(**WIDE))), tmp_path / "out.gguf")
    model = lowbit.load(path)
    assert len(module_formats(model)) == 14
    want = logits(load_dense(open_model(path)))
    assert float((logits(model) - want).norm() / want.norm()) < 1e-3


def test_k_quants_are_loaded_and_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mixed_file(tmp_path, monkeypatch, "Q4_K", "Q6_K", "Q2_K", "Q3_K", "Q5_K", "IQ4_XS", "Q5_0")
    source, found = open_model(path), read_checkpoint(path)
    assert [str(fmt) for fmt in found.modules.values()][:3] == ["int4.g32.fz", "int6.g16.sym", "int2.g16.fz"]
    for layer in found.modules:
        want = source.tensor(f"{layer}.weight")
        assert float((found.qtensor(layer).dequantize() - want).norm() / want.norm()) < 2.0**-11, layer
    done = convert(path, tmp_path / "lowbit", "lowbit")
    assert done.layers == 14
    assert done.source == "gguf"
    assert any("Q2_K, Q3_K, Q4_K, Q5_K, Q6_K are rounded to float16" in note for note in done.notes)
    assert f"the codes are the same, bit by bit; {done.notes[0]}." in (done.out / "README.md").read_text()
    again = read_checkpoint(done.out)
    assert again.modules == found.modules
    for layer in found.modules:
        assert torch.equal(again.qtensor(layer).dequantize(), found.qtensor(layer).dequantize()), layer
    assert torch.allclose(logits(lowbit.load(done.out)), logits(lowbit.load(path)), rtol=0, atol=1e-5)
    assert torch.equal(again.tensor("model.embed_tokens.weight"), found.tensor("model.embed_tokens.weight"))


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
def test_a_converted_file_is_complete(to: str, tmp_path: Path) -> None:
    """With tokenizer, licence and where it came from; without notes, since nothing is rounded."""
    path = write_gguf(checkpoint(tmp_path, text="int4.g32.sym"), tmp_path / "out.gguf")
    done = convert(path, tmp_path / "new", to)  # type: ignore[arg-type]
    assert not done.notes
    assert AutoTokenizer.from_pretrained(done.out)("rain in Spain").input_ids
    made = json.loads((done.out / "lowbit.json").read_text())
    assert made["source"]["model"] == "out.gguf"
    assert made["converted"]["from"] == "gguf"
    card = (done.out / "README.md").read_text()
    assert "license: mit" in card
    assert "who/what" in card
    assert "the quantized weights are the same, bit by bit." in card
    old, new = lowbit.load(path), lowbit.load(done.out)
    want = dequantized(old).state_dict()
    for name, value in dequantized(new).state_dict().items():
        assert torch.equal(value.float(), want[name].float()), name


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(checkpoint(tmp_path, text="int4.g32.sym"), tmp_path / "out.gguf")
    with pytest.raises(CheckpointError, match=r"LB0123.*GGUF file already"):
        convert(path, tmp_path / "again.gguf", "gguf")
    with pytest.raises(CheckpointError, match=r"LB0101.*quantize convert"):
        export_kernels(path, tmp_path / "kernels", [host_target()])
    text = tmp_path / "plain.txt"
    text.write_text("no model")
    with pytest.raises(CheckpointError, match="LB0101"):
        read_checkpoint(text)
    monkeypatch.delitem(BLOCK_TYPES, "Q4_0")
    with pytest.raises(CheckpointError, match=r"LB0122.*14 layers.*are Q4_0.*quantize run"):
        read_checkpoint(path)
    monkeypatch.setattr("lowbit.compiler.io.source_gguf.GGUFSource.raw_tensors", lambda self: None)
    with pytest.raises(CheckpointError, match=r"LB0122.*regrouped"):
        read_checkpoint(path)


def test_a_file_of_plain_numbers_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(checkpoint(tmp_path, text="int4.g32.sym"), tmp_path / "out.gguf")
    monkeypatch.setattr("lowbit.compiler.io.source_gguf.GGUFSource.raw_tensors", lambda self: {})
    with pytest.raises(CheckpointError, match=r"LB0114.*no quantized linear layer"):
        read_checkpoint(path)


def test_bad_blocks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mixed_file(tmp_path, monkeypatch, "Q6_K")
    raw = random_blocks("Q6_K", 2, 256)
    raw[0, 208:210] = torch.tensor([6e4], dtype=torch.float16).view(torch.uint8)
    found = read_checkpoint(path)
    assert found._reader is not None
    with pytest.raises(CheckpointError, match=r"LB0122.*layer: its blocks of type Q6_K"):
        found._reader.weight(next(iter(found.modules)), {"weight": raw}, "layer")
