"""Whole checkpoints as GGUF files: what transformers and lowbit read from them, and what is refused."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _gguf import ROWS, TEXT, WIDE, byte_level, checkpoint, save_tokenizer
from _models import dequantized, random_qtensor, tiny_llama
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.checkpoint import Checkpoint
from lowbit.compiler.io.gguf_model import check_model, rope_factors, row_order
from lowbit.compiler.io.gguf_splits import LLAMA3, QWEN2, pre_tokenizer_name
from lowbit.compiler.io.gguf_tokenizer import read_vocabulary
from lowbit.compiler.io.gguf_write import write_gguf
from lowbit.compiler.io.load import load_quantized
from lowbit.compiler.io.native import StoredInput
from lowbit.compiler.io.source import open_model, skeleton
from lowbit.quantizers.formats import Format
from lowbit.quantizers.qtensor import QTensor

gguf = pytest.importorskip("gguf")


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def kinds(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def read_by_transformers(path: Path) -> dict[str, torch.Tensor]:
    """What `from_pretrained(gguf_file=...)` puts into the model (that call itself needs the package accelerate)."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton(config))["tensors"]
    return {name: tensor.float() for name, tensor in tensors.items()}


def refused(folder: Path, given: Checkpoint, code: str = "LB0123") -> str:
    with pytest.raises(CheckpointError) as e:
        write_gguf(given, folder / "new" / "out.gguf")
    assert e.value.code == code, str(e.value)
    assert not (folder / "new").exists()
    return str(e.value)


BIASED = {"attention_bias": True, "mlp_bias": True}
MODELS = {
    "llama": (lambda: tiny_llama(vocab_size=ROWS), "int4.g32.sym", False),
    "llama with a quantized head": (lambda: tiny_llama(vocab_size=ROWS), "int8.g32.sym", True),
    "llama with zero points": (lambda: tiny_llama(vocab_size=ROWS), "int4.g64.asym", False),
    "llama with biases": (lambda: tiny_llama(vocab_size=ROWS, **BIASED), "int5.g32.sym", False),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**WIDE, tie_word_embeddings=True)), "mxfp4", False),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**{**WIDE, "head_dim": 128})), "int8.g32.sym", False),
}


@pytest.mark.parametrize("name", MODELS)
def test_readers_find_the_same_weights(name: str, tmp_path: Path) -> None:
    make, text, head = MODELS[name]
    given = checkpoint(tmp_path, make(), text, head)
    path = write_gguf(given, tmp_path / "out.gguf")
    expected = dequantized(load_quantized(given.folder)).state_dict()
    found, ours = read_by_transformers(path), open_model(path)
    # The config that transformers reads from a file knows nothing of Llama's biases, so its model has none.
    biases = {n for n in expected if n.endswith("bias")} if "llama" in name else set()
    tied = {"lm_head.weight"} if given.config["tie_word_embeddings"] else set()
    assert set(found) == set(expected) - biases - tied
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
        assert torch.equal(ours.tensor(key), expected[key]), key


def test_biases_are_in_the_order_of_their_rows(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, tiny_llama(vocab_size=ROWS, **BIASED))
    tensors = {t.name: t for t in gguf.GGUFReader(write_gguf(given, tmp_path / "out.gguf")).tensors}
    assert sum(name.endswith(".bias") for name in tensors) == 2 * 7
    for short, long, heads in (("q", "q_proj", 4), ("k", "k_proj", 2), ("v", "v_proj", None)):
        bias = given.tensor(f"model.layers.1.self_attn.{long}.bias")
        halves = bias.reshape(heads, 2, 8).swapaxes(1, 2).flatten() if heads else bias
        assert torch.equal(torch.from_numpy(tensors[f"blk.1.attn_{short}.bias"].data.copy()), halves)


def test_metadata(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=ROWS, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    path = write_gguf(checkpoint(tmp_path, model), tmp_path / "out.gguf")
    found = fields(path)
    expected = {
        "general.architecture": "llama",
        "general.name": "what",
        "general.license": "mit",
        "general.base_model.0.repo_url": "https://huggingface.co/who/what",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "lowbit.formats": "int4.g32.sym",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 5e5,
        "llama.vocab_size": ROWS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["general.quantized_by"].startswith("lowbit ")
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert kinds(path)["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds(path)["output.weight"] == "F32"


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_other_tensors_keep_their_type(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    given = checkpoint(tmp_path, tiny_llama(vocab_size=ROWS).to(dtype), dtype=dtype)
    path = write_gguf(given, tmp_path / "out.gguf")
    assert kinds(path)["token_embd.weight"] == kind
    assert kinds(path)["output_norm.weight"] == "F32"
    found = read_by_transformers(path)
    assert torch.equal(found["model.embed_tokens.weight"], given.tensor("model.embed_tokens.weight").float())


def test_mistral_is_a_llama_of_its_windows_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MistralForCausalLM

    model = MistralForCausalLM(MistralConfig(**WIDE, head_dim=16, sliding_window=64))
    with caplog.at_level(logging.WARNING, "lowbit"):
        found = fields(write_gguf(checkpoint(tmp_path, model), tmp_path / "out.gguf"))
    assert (found["general.architecture"], found["llama.context_length"]) == ("llama", 64)
    assert "no sliding window" in caplog.text


def test_rope_scaling(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    given = checkpoint(tmp_path, Qwen2ForCausalLM(Qwen2Config(**WIDE, rope_parameters=yarn)))
    found = fields(write_gguf(given, tmp_path / "out.gguf"))
    values = [found[f"qwen2.rope.scaling.{key}"] for key in ("type", "factor", "original_context_length")]
    assert values == ["yarn", 4.0, 32]


def test_rope_factors() -> None:
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 5e5,
    }  # fmt: skip
    config = LlamaConfig(**{**WIDE, "head_dim": 64}, rope_parameters=rope)
    factors = rope_factors(config)
    assert factors is not None
    # Fast rotations stay, slow ones are eight times slower, and a few lie between.
    assert factors[0] == 1
    assert torch.allclose(factors[-10:], torch.full((10,), 8.0))
    assert bool(((factors > 1.01) & (factors < 7.99)).any())
    assert rope_factors(LlamaConfig(**WIDE)) is None


def test_row_order() -> None:
    config, name = LlamaConfig(**WIDE), "model.layers.0.self_attn.k_proj.weight"
    order = row_order(config, name)
    assert order is not None
    assert order[:6].tolist() == [0, 8, 1, 9, 2, 10]
    assert sorted(order.tolist()) == list(range(32))
    assert row_order(config, name.replace("k_proj", "v_proj")) is None
    assert row_order(Qwen2Config(**WIDE), name) is None


def test_tokenizer_comes_back(tmp_path: Path) -> None:
    given = checkpoint(tmp_path)
    path = write_gguf(given, tmp_path / "out.gguf")
    ours, theirs = AutoTokenizer.from_pretrained(given.folder), open_model(path).tokenizer()
    assert theirs(TEXT).input_ids == ours(TEXT).input_ids
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    found = fields(path)
    size = len(ours)
    assert found["tokenizer.ggml.tokens"][size:] == [f"[PAD{i}]" for i in range(size, ROWS)]
    assert found["tokenizer.ggml.token_type"] == [3, 3] + [1] * (size - 2) + [5] * (ROWS - size)


def test_tokens_that_were_added(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool>"])
    save_tokenizer(tmp_path, tokenizer, bos_token="</s>")
    vocabulary = read_vocabulary(tmp_path, ROWS)
    assert vocabulary.types[vocabulary.tokens.index("<tool>")] == 4
    assert vocabulary.ids == {"bos": 1, "eos": 1}
    with pytest.raises(CheckpointError, match="its embedding 100 rows"):
        read_vocabulary(tmp_path, 100)


SPLIT = {
    "gpt-2": (None, {}),
    "smollm": (pre_tokenizers.Digits(individual_digits=True), {}),
    "llama-bpe": (pre_tokenizers.Split(Regex(LLAMA3), "isolated"), {"ignore_merges": True}),
    "smaug-bpe": (pre_tokenizers.Split(Regex(LLAMA3), "isolated"), {}),
    "qwen2": (pre_tokenizers.Split(Regex(QWEN2), "isolated"), {}),
}


@pytest.mark.parametrize("name", SPLIT)
def test_pre_tokenizers_that_llama_cpp_knows(name: str, caplog: pytest.LogCaptureFixture) -> None:
    split, options = SPLIT[name]
    values = json.loads(byte_level(split, **options).to_str())
    assert pre_tokenizer_name({**values, "normalizer": {"type": "NFC"}}) == name
    assert not caplog.records


@pytest.mark.parametrize(
    "split", [pre_tokenizers.Split(Regex("a+"), "isolated"), pre_tokenizers.Split(Regex(QWEN2), "removed")]
)
def test_other_pre_tokenizers_are_default_with_a_warning(split: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lowbit"):
        assert pre_tokenizer_name(json.loads(byte_level(split).to_str())) == "default"
    assert "tokenizer.ggml.pre" in caplog.text


def sentence_pieces() -> Tokenizer:
    """BPE with bytes to fall back on, in the form that transformers gives SentencePiece's models."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=295, show_progress=False, special_tokens=special)
    )
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = values["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps({**values, "pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def test_sentence_pieces(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, sentence_pieces(), unk_token="<unk>")
    vocabulary = read_vocabulary(tmp_path, ROWS)
    assert (vocabulary.model, vocabulary.pre, vocabulary.space_prefix) == ("llama", "default", True)
    assert vocabulary.types[:4] == [2, 3, 3, 6]
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    ranked = [vocabulary.scores[vocabulary.tokens.index("".join(merge))] for merge in merges]
    assert len(ranked) > 5
    assert ranked == sorted(ranked, reverse=True)
    assert vocabulary.scores[3] < ranked[-1]


def test_tokenizers_that_gguf_lacks(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")))
    with pytest.raises(CheckpointError, match="WordLevel") as e:
        read_vocabulary(tmp_path, ROWS)
    assert e.value.code == "LB0123"


def test_formats_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    message = refused(tmp_path, checkpoint(tmp_path, text="int4.g16.sym"))
    assert "14 layers do not fit the layout gguf" in message
    assert "model.layers.0.self_attn.q_proj" in message
    assert "quantize the original model with int4.g32.sym" in message


def test_minima_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    def make(weight: torch.Tensor, fmt: Format) -> QTensor:
        return random_qtensor(fmt, *weight.shape)

    message = refused(tmp_path, checkpoint(tmp_path, text="int5.g32.fz", make=make))
    assert "14 layers do not fit the layout gguf" in message
    assert "float16 does not hold" in message
    assert "with int5.g32.sym" in message


def test_columns_that_fill_no_blocks(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, tiny_llama(vocab_size=ROWS, intermediate_size=112))
    message = refused(tmp_path, given)
    assert "2 layers do not fit the layout gguf" in message
    assert "down_proj" in message
    assert "`ignore`" in message


def test_rounded_inputs_are_refused(tmp_path: Path) -> None:
    inputs = {"model.layers.0.mlp.up_proj": StoredInput("int8.token")}
    message = refused(tmp_path, checkpoint(tmp_path, inputs=inputs))
    assert "1 layer does not fit the layout gguf" in message
    assert "--activation none" in message


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LlamaConfig(hidden_act="gelu"), "silu"),
        (Qwen3Config(attention_bias=True), "biases"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (
            LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16.0}),
            "beta_fast",
        ),
    ],
)
def test_models_that_llama_cpp_runs_otherwise(config: Any, why: str) -> None:
    with pytest.raises(CheckpointError, match=why) as e:
        check_model(config, "here")
    assert e.value.code == "LB0123"


def test_other_models_are_refused(tmp_path: Path) -> None:
    given = checkpoint(tmp_path)
    message = refused(tmp_path, replace(given, config={**given.config, "model_type": "mixtral"}))
    assert "'mixtral'" in message
    assert "known are llama, mistral, qwen2, qwen3" in message


def test_a_checkpoint_that_lacks_a_tensor(tmp_path: Path) -> None:
    given = checkpoint(tmp_path)
    files = {name: file for name, file in given._files.items() if name != "model.norm.weight"}
    assert "model.norm.weight" in refused(tmp_path, replace(given, _files=files), "LB0114")


def test_a_checkpoint_with_no_quantized_layer(tmp_path: Path) -> None:
    refused(tmp_path, replace(checkpoint(tmp_path), modules={}), "LB0114")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    given = checkpoint(tmp_path)
    for path in given.folder.glob("tokenizer*"):
        path.unlink()
    refused(tmp_path, given, "LB0117")


def test_the_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, out = checkpoint(tmp_path), tmp_path / "gguf" / "out.gguf"
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 10))
        with pytest.raises(CheckpointError, match="LB0111"):
            write_gguf(given, out)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_ti_data_to_file", lambda self: (_ for _ in ()).throw(full))
        with pytest.raises(CheckpointError, match="LB0111"):
            write_gguf(given, out)
    assert list(out.parent.iterdir()) == []
    write_gguf(given, out)
    written = out.read_bytes()
    with pytest.raises(CheckpointError, match="LB0110"):
        write_gguf(given, out)
    assert [out] == list(out.parent.iterdir())
    assert out.read_bytes() == written


def test_gguf_package_that_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = checkpoint(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "lowbit[gguf]" in refused(tmp_path, given, "LB0109")


def test_gguf_package_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = checkpoint(tmp_path)
    monkeypatch.setattr(gguf, "LlamaFileType", SimpleNamespace(__members__={}))
    with pytest.raises(CheckpointError, match="pip install --upgrade gguf"):
        write_gguf(given, tmp_path / "out.gguf")
