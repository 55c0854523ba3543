"""What llama.cpp knows of a model apart from its numbers: the architecture, its sizes, its rotary positions.

Keys and their meaning are those of llama.cpp's converter (`convert_hf_to_gguf.py`) and of the package gguf.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from lowbit.compiler.errors import CheckpointError

__all__ = ["ARCHITECTURES", "add_model", "check_model", "check_model_type", "rope_factors", "row_order"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model types -> llama.cpp's architectures, which have the same layers."""

_YARN_DEFAULTS = {"attention_factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None}
_log = logging.getLogger("lowbit")


def check_model_type(model_type: Any, where: str) -> None:
    """Raise CheckpointError (LB0123) for what is not in `ARCHITECTURES`, before a model of it is built."""
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise _refused(f"models of type {str(model_type)[:60]!r} are not written as GGUF", where, f"known are {known}")


def check_model(config: Any, where: str) -> None:
    """Raise CheckpointError (LB0123) for a transformers config, of a type that `check_model_type` takes, that says what
    llama.cpp's architecture cannot do."""
    model_type = config.model_type
    if config.hidden_act != "silu":
        raise _refused(f"llama.cpp has silu here, the model {str(config.hidden_act)[:60]!r}", where)
    if model_type == "qwen3" and config.attention_bias:
        raise _refused("llama.cpp's qwen3 has no biases in attention", where)
    _check_rope(config.rope_parameters, where)


def _check_rope(rope: dict[str, Any], where: str) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise _refused(f"rotary positions of type {str(kind)[:60]!r} are not written as GGUF", where)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("llama.cpp rotates whole heads here, the model a part of each", where)
    odd = [name for name, usual in _YARN_DEFAULTS.items() if rope.get(name) not in (None, usual)]
    if kind == "yarn" and (odd or not rope.get("truncate", True)):
        raise _refused(f"yarn with {(odd or ['truncate'])[0]} of its own is not written as GGUF", where)


def _refused(why: str, where: str, hint: str | None = None) -> CheckpointError:
    return CheckpointError("LB0123", why, where=where, hint=hint)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_model(writer: Any, config: Any) -> None:
    """Write the sizes of a model that `check_model` takes, and its rotary positions, to a gguf.GGUFWriter."""
    head = _head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if head * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head)
        writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_rope_scaling(writer, config)


def _context(config: Any) -> int:
    """Tokens the model is good for. llama.cpp attends to all of them, so no more than a window of attention."""
    window, length = getattr(config, "sliding_window", None), int(config.max_position_embeddings)
    if window is None or window >= length:
        return length
    _log.warning("llama.cpp has no sliding window here: the GGUF file's context is the window, %d tokens", window)
    return int(window)


def _add_rope_scaling(writer: Any, config: Any) -> None:
    """llama3's is a tensor instead: `rope_factors`."""
    import gguf

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)


def rope_factors(config: Any) -> Tensor | None:
    """float32 [head_dim / 2]: what llama.cpp divides the rotary frequencies of llama3's type by; None for others."""
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head, base = _head_dim(config), float(config.rope_parameters["rope_theta"])
    plain: Tensor = base ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    factors: Tensor = plain / scaled.double()
    return factors.float()


def row_order(config: Any, name: str) -> Tensor | None:
    """int64 [N]: the row of the model's tensor `name` that stands at each place in GGUF; None where all stay.

    llama.cpp's `llama` rotates neighbours, transformers the halves of a head: queries and keys are put in that order.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2] if "." in name else "")
    if ARCHITECTURES[config.model_type] != "llama" or count is None:
        return None
    rows = count * _head_dim(config)
    return torch.arange(rows).reshape(count, 2, rows // count // 2).swapaxes(1, 2).flatten()
