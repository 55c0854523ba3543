"""A Llama of TinyLlama's widths with random weights, for measuring decode speed at a size that no cache holds.

    python bench/random_llama.py OUT                                    # safetensors, 0.9 billion weights, 1.8 GB
    python bench/random_llama.py OUT --gguf q4_0 q8_0 q2_K tq2_0        # and OUT/model-q4_0.gguf ... for llama.cpp

The same arguments give the same bytes. Weights are integers from -7 to 7 times a power of two, so that rounding them to
int4 changes nothing: what is compared is speed. There is no tokenizer; GGUF files say so (`no_vocab`). These are
quantized by llama.cpp's own functions (see `ggml_peer.py`); norms stay float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ggml_peer import TYPES, Ggml, find_libraries
from safetensors.torch import save_file

_LEVELS = 7


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    hidden: int = 2048
    inner: int = 5632
    layers: int = 16
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 49152
    context: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config(self) -> dict[str, Any]:
        """`config.json` of transformers."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "vocab_size": self.vocab,
            "max_position_embeddings": self.context, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1,
            "eos_token_id": 2, "torch_dtype": "bfloat16",
        }  # fmt: skip

    def layer(self, i: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one block's tensors."""
        kv, at = self.kv_heads * self.head_dim, f"model.layers.{i}."
        return {
            at + "self_attn.q_proj.weight": (self.hidden, self.hidden),
            at + "self_attn.k_proj.weight": (kv, self.hidden),
            at + "self_attn.v_proj.weight": (kv, self.hidden),
            at + "self_attn.o_proj.weight": (self.hidden, self.hidden),
            at + "mlp.gate_proj.weight": (self.inner, self.hidden),
            at + "mlp.up_proj.weight": (self.inner, self.hidden),
            at + "mlp.down_proj.weight": (self.hidden, self.inner),
            at + "input_layernorm.weight": (self.hidden,),
            at + "post_attention_layernorm.weight": (self.hidden,),
        }

    def shards(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Names and shapes by file: the ends, then block after block."""
        ends = ("model.embed_tokens.weight", "lm_head.weight")
        yield {**{name: (self.vocab, self.hidden) for name in ends}, "model.norm.weight": (self.hidden,)}
        yield from map(self.layer, range(self.layers))


def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """bfloat16: ones for norms; else levels times a power of two, about 1 / sqrt(columns) large, so that activations
    keep their size."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    levels = torch.randint(-_LEVELS, _LEVELS + 1, shape, generator=rng, dtype=torch.int8)
    levels[:, 0] = _LEVELS  # every row reaches its largest level, so a symmetric scale finds the grid again
    step = 2.0 ** -round(torch.tensor(shape[1] ** 0.5 * 4.0).log2().item())
    return levels.bfloat16() * step


def write_folder(out: Path, shape: Shape) -> None:
    """config.json and one safetensors file a block."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
    where: dict[str, str] = {}
    for i, names in enumerate(shape.shards()):
        file = f"model-{i + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file({name: tensor(name, size) for name, size in names.items()}, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, number, part = name.split(".", 3)
        return f"blk.{number}.{_GGUF_NAMES[part]}.weight"
    return f"{_GGUF_NAMES[name]}.weight"


def gguf_rows(name: str, weight: torch.Tensor, shape: Shape) -> torch.Tensor:
    """llama.cpp rotates neighbouring rows of queries and keys, transformers rows half a head apart."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    rows, columns = weight.shape
    return weight.view(rows // shape.head_dim, 2, shape.head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(out: Path, shape: Shape, kind: str, ggml: Ggml) -> None:
    """One GGUF file with all matrices of type `kind`."""
    import gguf

    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    for name, size in ((n, s) for names in shape.shards() for n, s in names.items()):
        weight = gguf_rows(name, tensor(name, size), shape).float().contiguous()
        if weight.dim() == 1:
            writer.add_tensor(gguf_name(name), weight.numpy())
        else:
            packed = ggml.quantize(kind, weight).view(weight.shape[0], -1).numpy()
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType(TYPES[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="write a Llama with random weights")
    parser.add_argument("out", type=Path, help="folder of the model")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--vocab", type=int, default=Shape.vocab)
    parser.add_argument("--gguf", nargs="*", default=[], choices=sorted(TYPES), help="llama.cpp's types to write")
    options = parser.parse_args()
    shape = Shape(layers=options.layers, vocab=options.vocab)
    libraries = find_libraries()
    if options.gguf and libraries is None:
        sys.exit("--gguf needs llama-cpp-python, or LOWBIT_GGML naming the folder of its libraries")
    write_folder(options.out, shape)
    for kind in options.gguf:
        assert libraries is not None
        write_gguf(options.out / f"model-{kind}.gguf", shape, kind, Ggml(libraries))


if __name__ == "__main__":
    main()
