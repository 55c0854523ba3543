"""What tests of attention in FX graphs share."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["Call", "repeated"]

Call = Callable[..., torch.Tensor]
"""A function of queries, keys, values and a mask."""


def repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values [batch, shared, tokens, dim] for every one of `heads` query heads, as models repeat them."""
    batch, shared, tokens, dim = x.shape
    return x[:, :, None, :, :].expand(batch, shared, heads // shared, tokens, dim).reshape(batch, heads, tokens, dim)
