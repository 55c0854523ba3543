"""Opening models: folders (single, sharded, hostile), GGUF files and hub ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from _models import tiny_llama
from safetensors.torch import load_file, save_file

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.source import open_model
from lowbit.compiler.io.source_folder import contained

INDEX = "model.safetensors.index.json"


def saved(folder: Path, *, shard: str = "5GB", **changes: object) -> torch.nn.Module:
    model = tiny_llama(**changes)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def refused(model: str | Path, code: str) -> str:
    with pytest.raises(CheckpointError) as e:
        open_model(model)
    assert e.value.code == code, str(e.value)
    return str(e.value)


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_folder(shard: str, tied: bool, tmp_path: Path) -> None:
    model = saved(tmp_path, shard=shard, tie_word_embeddings=tied)
    assert (tmp_path / INDEX).exists() == (shard == "40KB")
    source = open_model(tmp_path)
    assert ("lm_head.weight" in source.names()) != tied
    state = model.state_dict()
    for name in source.names():
        assert source.shape(name) == tuple(state[name].shape)
        assert source.dtype(name) == torch.float32
        assert torch.equal(source.tensor(name), state[name])
    assert source.nbytes() == sum(4 * p.numel() for p in model.parameters())


def test_empty_model_has_meta_parameters_and_real_buffers(tmp_path: Path) -> None:
    model = saved(tmp_path, tie_word_embeddings=True)
    source = open_model(tmp_path)
    empty = source.empty_model()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    for name, buffer in model.named_buffers():
        assert torch.equal(empty.get_buffer(name), buffer)
    empty.load_state_dict({n: source.tensor(n) for n in source.names()}, strict=False, assign=True)
    empty.tie_weights()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(empty(ids).logits, model(ids).logits)


def test_files_without_the_base_prefix(tmp_path: Path) -> None:
    """GPT-2 style folders were saved from the base model: names lack its prefix."""
    saved(tmp_path, tie_word_embeddings=True)
    tensors = {k.removeprefix("model."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file({**tensors, "stray": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = open_model(tmp_path)
    assert "model.embed_tokens.weight" in source.names()
    assert "stray" in source.notes[0]
    assert torch.equal(source.tensor("model.norm.weight"), tensors["norm.weight"])


def test_digest_sees_other_weights_and_config(tmp_path: Path) -> None:
    digests = set()
    for i, changes in enumerate([{}, {"seed": 1}, {"rope_theta": 5.0}]):
        saved(tmp_path / str(i), **changes)
        digests.add(open_model(tmp_path / str(i)).digest())
        assert open_model(tmp_path / str(i)).digest() in digests
    assert len(digests) == 3


def test_extras_and_licence(tmp_path: Path) -> None:
    saved(tmp_path)
    for name in ("tokenizer.json", "LICENSE", "chat_template.jinja", "modeling_evil.py", "notes.txt", "weights.bin"):
        (tmp_path / name).write_text("MIT License\n")
    assert {p.name for p in open_model(tmp_path).extras()} == {
        "tokenizer.json", "LICENSE", "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    assert open_model(tmp_path).licence.name == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: who/what\n---\n# x\n")
    source = open_model(tmp_path)
    assert (source.licence.name, source.base_model) == ("apache-2.0", "who/what")


def test_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(CheckpointError, match="LB0117"):
        open_model(tmp_path).tokenizer()


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "LB0101")
    refused("./owner/name", "LB0101")
    refused("model.gguf", "LB0101")
    (tmp_path / "model.zip").write_bytes(b"PK")
    refused(tmp_path / "model.zip", "LB0101")


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused("owner/name-that-is-not-here", "LB0104")
    assert "\n" not in message
    assert "give the folder" in message


def test_config_problems(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def with_config(text: str, code: str) -> str:
        (tmp_path / "config.json").write_text(text)
        return refused(tmp_path, code)

    with_config("{", "LB0108")
    with_config("[]", "LB0108")
    with_config('{"model_type": "no-such-type"}', "LB0108")
    with_config(json.dumps({**config, "hidden_size": "large"}), "LB0108")
    with_config(json.dumps({**config, "architectures": ["BertForMaskedLM"]}), "LB0105")
    with_config('{"model_type": "vit", "architectures": ["ViTForImageClassification"]}', "LB0105")
    with_config(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}), "LB0116")
    assert "is [80, 64]" in with_config(json.dumps({**config, "vocab_size": 81}), "LB0112")
    assert "no tensor" in with_config(json.dumps({**config, "num_hidden_layers": 3}), "LB0112")
    # What only building the model shows, and what would take for ever to build.
    assert "KeyError: 'exec'" in with_config(json.dumps({**config, "hidden_act": "exec"}), "LB0108")
    assert "1,000,000,000 layers" in with_config(json.dumps({**config, "num_hidden_layers": 10**9}), "LB0112")
    assert "X is not" in with_config(json.dumps({**config, "architectures": "X"}), "LB0105")
    assert "\n" not in with_config(
        json.dumps({**config, "hidden_size": -1}), "LB0108"
    )  # transformers wrote three lines
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "LB0108")


def test_custom_code_is_never_run(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(tmp_path, "LB0108")
    assert not (tmp_path / "ran").exists()


def test_pickles_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "convert them to safetensors" in refused(tmp_path, "LB0106")
    (tmp_path / "pytorch_model.bin").unlink()
    refused(tmp_path, "LB0106")


def test_truncated_weights(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"{weights.stat().st_size}" in refused(tmp_path, "LB0102")


HOSTILE = [
    "../model.safetensors", "..", "/etc/passwd", "/tmp/x.safetensors", "a/../../x.safetensors", "./x.safetensors",
    "a//x.safetensors", "a/./x.safetensors", "~/x.safetensors", "", ".", "x\0.safetensors", "..\\x.safetensors",
    "C:\\x.safetensors", "C:x.safetensors", "file:x.safetensors", "a/b/../../../x.safetensors",
    "//server/x.safetensors", "link.safetensors", "folder/x.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shard_names(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file({"t": torch.zeros(1)}, outside / "x.safetensors")
    folder = tmp_path / "model"
    saved(folder, shard="40KB")
    (folder / "link.safetensors").symlink_to(outside / "x.safetensors")
    (folder / "folder").symlink_to(outside)
    with pytest.raises(CheckpointError, match="LB0103"):
        contained(folder, name)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "LB0103")


def _edit(name: str) -> Callable[[dict[str, str]], object]:
    edits: dict[str, Callable[[dict[str, str]], object]] = {
        "empty": lambda m: m.clear(),
        "missing shard": lambda m: m.update({"model.norm.weight": "model-00009-of-00009.safetensors"}),
        "wrong shard": lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]}),
        "unknown tensor": lambda m: m.update({"ghost": m["model.norm.weight"]}),
        "number": lambda m: m.update({"model.norm.weight": 3}),  # type: ignore[dict-item]
        "pickle": lambda m: m.update({"model.norm.weight": "pytorch_model.bin"}),
    }
    return edits[name]


@pytest.mark.parametrize("name", ["empty", "missing shard", "wrong shard", "unknown tensor", "number", "pickle"])
def test_index_that_contradicts_the_shards(name: str, tmp_path: Path) -> None:
    saved(tmp_path, shard="40KB")
    index = json.loads((tmp_path / INDEX).read_text())
    _edit(name)(index["weight_map"])
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(tmp_path, "LB0103")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    saved(tmp_path, shard="40KB")
    index = json.loads((tmp_path / INDEX).read_text())
    other = tmp_path / index["weight_map"]["model.embed_tokens.weight"]
    assert index["weight_map"]["model.norm.weight"] != other.name
    save_file({**load_file(other), "model.norm.weight": torch.zeros(64)}, other)
    assert "model.norm.weight" in refused(tmp_path, "LB0103")


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    folder = cache / "snapshots" / "rev"
    saved(folder)
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(cache / "blobs" / str(i))
        path.symlink_to(f"../../blobs/{i}")
    assert len(open_model(folder).names()) == 21


def write_gguf(path: Path, model: torch.nn.Module, *, tied: bool, files: int = 1) -> None:
    """A Llama GGUF as llama.cpp's converter writes it: q and k rows permuted, matrices in Q8_0."""
    gguf = pytest.importorskip("gguf")
    config, state = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    w = gguf.GGUFWriter(path, "llama")
    w.add_license("apache-2.0")
    w.add_uint16("split.count", files)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_dimension_count(16)
    w.add_vocab_size(config.vocab_size)
    w.add_tokenizer_model("gpt2")
    w.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    w.add_token_types([1] * config.vocab_size)
    w.add_token_merges(["t 1"])
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not tied:
        tensors["output.weight"] = state["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        for hf, short in names.items():
            value = state[f"model.layers.{i}.{hf}.weight"]
            if short in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if short == "attn_q" else config.num_key_value_heads
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            tensors[f"blk.{i}.{short}.weight"] = value
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, value in tensors.items():
        value = np.ascontiguousarray(value)
        if value.ndim == 2:
            w.add_tensor(name, gguf.quants.quantize(value, q8), raw_dtype=q8)
        else:
            w.add_tensor(name, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    write_gguf(tmp_path / "tiny.gguf", model, tied=tied)
    source = open_model(tmp_path / "tiny.gguf")
    assert source.licence.name == "apache-2.0"
    assert "one tensor at a time" in source.notes[0]
    assert ("lm_head.weight" in source.names()) != tied
    state = model.state_dict()
    for name in source.names():
        got = source.tensor(name)
        assert (got.dtype, tuple(got.shape), source.shape(name)) == (torch.float32, tuple(state[name].shape), got.shape)
        # Q8_0 rounds to 1/254 of the largest weight of a block; norms are stored exactly.
        assert (got - state[name]).abs().max() <= state[name].abs().max() / 250
    assert source.config.num_key_value_heads == 2
    assert source.digest() == open_model(tmp_path / "tiny.gguf").digest()


def test_gguf_that_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama(), tied=False)
    whole = path.read_bytes()
    for size in (0, 3, 4, 10, 24, 100, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:size])
        refused(path, "LB0109")
    path.write_bytes(whole.replace(b"llama", b"larva"))
    refused(path, "LB0109")


def test_a_part_of_a_gguf_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), tied=False, files=3)
    message = refused(tmp_path / "tiny.gguf", "LB0109")
    assert "one of 3 files" in message
    assert "llama-gguf-split --merge" in message


def test_gguf_package_that_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "lowbit[gguf]" in refused(tmp_path / "m.gguf", "LB0109")
