"""Small random mixture-of-experts models."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from _models import SIZES
from torch import nn

__all__ = ["MIXTURES", "mixture"]

_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**_QWEN, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "Qwen3Moe": {**_QWEN, "head_dim": 16},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None, "eos_token_id": None},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}
"""GPT-OSS has transposed, interleaved matrices with biases, and a gate of its own."""


@torch.no_grad()
def mixture(name: str, layers: int = 1, **changes: Any) -> nn.Module:
    """A float32 model whose experts and biases matter."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": layers, **MIXTURES[name], **changes}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for path, p in model.named_parameters():
        if path.endswith("bias"):
            p.normal_(0, 0.1)
        elif p.dim() > 1:
            p.mul_(3)
    return model
