"""Mixtures of experts in a comparison: the model follows the program's choice of experts, and judges it.

Rounding decides which of two nearly equal experts a token goes to, and the other one gives another result. So that a
comparison of logits is about rounding and nothing else, both sides send tokens to the same experts; whether these are
the likeliest, but for rounding, is a comparison of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["following"]


@contextlib.contextmanager
def following(model: nn.Module, routes: dict[int, Tensor]) -> Iterator[list[float]]:
    """Inside, tokens go to the experts of `routes`, int64 [tokens, active] by layer, with the model's own shares.

    Gives a list, to which every call of a router adds how far an expert that was left out is ahead of one that was
    taken, at most: a difference of the model's router logits, relative to their spread, root mean square over tokens as
    differences of logits are. 0 is the model's own choice.
    """
    found: list[float] = []
    blocks: Any = model.model.layers  # type: ignore[union-attr]
    routers = {layer: blocks[layer].mlp.gate for layer in routes}
    for layer, router in routers.items():
        router.forward = _follow(router.forward, routes[layer], found)
    try:
        yield found
    finally:
        for router in routers.values():
            del router.forward


def _follow(original: Any, chosen: Tensor, found: list[float]) -> Any:
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given, shares, own = original(x)
        logits = given.float()
        left = logits.scatter(-1, chosen, -torch.inf).amax(-1)
        behind = (left - logits.gather(-1, chosen).amin(-1)).clamp(min=0).square().mean().sqrt()
        spread = (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt().clamp(min=1e-12)
        found.append(float(behind / spread))
        # A router may divide probabilities by their sum; what it does to those it chose, it does to these.
        likely = logits.softmax(-1)
        factor = shares.float().sum(-1, keepdim=True) / likely.gather(-1, own).sum(-1, keepdim=True)
        return given, (likely.gather(-1, chosen) * factor).to(shares.dtype), chosen

    return forward
