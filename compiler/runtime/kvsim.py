"""What a quantized cache does to a model's predictions, for a whole text at once.

Teacher forcing with a cache would mean one call per token. Here each query meets the keys and values that it would find
in the cache at its step: those still in the window as float16, all earlier ones quantized. Groups along tokens and
GEAR's blocks do not depend on what follows them, so one pass gives exactly what decoding token by token gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from lowbit.compiler.errors import KernelError
from lowbit.quantizers.formats.kv import KVFormat, KVSide, parse_kv_format
from lowbit.quantizers.hadamard import rotate
from lowbit.quantizers.kv import fake_quantize

__all__ = ["simulated"]

_NAME = "lowbit_simulated"


@contextmanager
def simulated(model: Any, format: str) -> Iterator[None]:
    """Within the context `model` predicts as if it decoded with a cache of `format`; not reentrant.

    For calls without a cache and without padding, from a text's first token on.
    """
    fmt, before = parse_kv_format(format), model.config._attn_implementation

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if query.shape[2] != key.shape[2] or attention_mask is not None:
            raise KernelError("LB0427", "a simulated cache takes whole texts without padding", hint="use_cache=False")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend(query, key, value, fmt, scale).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, attention)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(query: Tensor, key: Tensor, value: Tensor, fmt: KVFormat, scale: float) -> Tensor:
    """[batch, query heads, tokens, head_dim]: causal attention, each query with its own state of the cache."""
    batch, heads, tokens, dims = key.shape
    q = query.float().reshape(batch, heads, -1, dims)
    k, v = key.float(), value.float()
    if fmt.rotate:
        q, k = rotate(q, dims), rotate(k, dims)
    rows = q.shape[2] // tokens
    in_codes = [_stored(fmt, side, tokens).to(q.device).repeat(rows, 1) for side in (fmt.key, fmt.value)]
    codes, halves = _both(k, fmt, fmt.key)
    scores = torch.where(in_codes[0], q @ codes.mT, q @ halves.mT) * scale
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1).repeat(rows, 1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    codes, halves = _both(v, fmt, fmt.value)
    out = (weights * in_codes[1]) @ codes + (weights * ~in_codes[1]) @ halves
    return out.reshape(query.shape).to(query.dtype)


def _stored(fmt: KVFormat, side: KVSide, tokens: int) -> Tensor:
    """bool [tokens, tokens]: True where the token of the column is quantized when the row's has been appended."""
    edge = torch.tensor([fmt.stored(side, i + 1) for i in range(tokens)])
    return torch.arange(tokens) < edge[:, None]


def _both(x: Tensor, fmt: KVFormat, side: KVSide) -> tuple[Tensor, Tensor]:
    """x [batch, heads, tokens, head_dim] as codes give it back, and as float16. Tokens that no query finds quantized
    are float16 in both."""
    halves = fake_quantize(x, KVSide(16))
    full = fmt.stored(side, x.shape[2]) if fmt.in_blocks(side) else x.shape[2]
    if not side.quantized or not full:
        return halves, halves
    done = fake_quantize(x[:, :, :full], side, fmt.gear, fmt.window)
    return torch.cat([done, halves[:, :, full:]], 2), halves
