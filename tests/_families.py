"""Small random models of several architectures, with weights that make norms and biases matter."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

__all__ = ["FAMILIES", "random_model"]

_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
}
_LEARNED = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 80}

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=16)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_SIZES, head_dim=16)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**_LEARNED, ffn_dim=96, word_embed_proj_dim=48, max_position_embeddings=64)
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_LEARNED, intermediate_size=96)),
}


def random_model(family: str, seed: int = 0) -> nn.Module:
    """A float32 model of two blocks; norm weights, biases and a few loud channels are random too."""
    torch.manual_seed(seed)
    model: nn.Module = FAMILIES[family]().float().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            spread = 0.5 * torch.rand(p.shape)
            p.copy_(spread if name.endswith("bias") or family == "gemma" else 0.5 + spread)
        else:
            p.mul_(3)
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            p[::11] *= 12
    return model
