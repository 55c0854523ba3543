"""Attention with shared heads reads them once: the same result, and nothing changed where it would be another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _attention import Call, repeated
from torch import fx
from torch.nn.functional import scaled_dot_product_attention as attention

from lowbit.compiler.frontend.attention import share_heads

B, HEADS, SHARED, KEYS, DIM = 2, 6, 2, 10, 8


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def with_copies(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return attention(q, repeated(k, HEADS), repeated(v, HEADS), attn_mask=mask, scale=0.3).transpose(1, 2)


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return attention(q, k, v, mask, 0.0, False, enable_gqa=True).transpose(1, 2)


def by_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return attention(value=repeated(v, HEADS), key=repeated(k, HEADS), query=q, attn_mask=mask)


def into_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    k[:, :, 3] = 1.5
    return with_copies(q, k, v, mask)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return attention(q, repeated(k, HEADS), repeated(v, HEADS), is_causal=True)


def overwritten(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    keys = repeated(k, HEADS)
    k.zero_()
    return attention(q, keys, repeated(v, HEADS), attn_mask=mask)


def by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    bias = torch.arange(HEADS).view(1, HEADS, 1, 1) * torch.linspace(0, 1, k.shape[2])
    return attention(q, repeated(k, HEADS), repeated(v, HEADS), attn_mask=bias)


def run(function: Call, tokens: int, mask: str = "float") -> tuple[int, bool]:
    """(calls changed, whether a copy of keys or values is left), after comparing with the function itself."""
    rng = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(B, h, n, DIM, generator=rng) for h, n in ((HEADS, tokens), (SHARED, KEYS), (SHARED, KEYS)))
    kept = torch.rand(B, 1, tokens, KEYS, generator=rng) < 0.7
    kept[..., 0] = True
    added = torch.zeros(kept.shape).masked_fill(~kept, -1e9)
    masks = {"none": None, "bool": kept, "row": kept[:, :, :1], "float": added}
    seen: list[tuple[int, bool]] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        count = share_heads(gm)
        rows = [n for n in gm.graph.nodes if n.op == "call_method" and n.target == "expand"]
        seen.append((count, any(n.args[-1] == DIM for n in rows)))
        return gm.forward

    want = function(q.clone(), k.clone(), v.clone(), masks[mask])
    got = torch.compile(function, backend=backend, dynamic=False)(q, k, v, masks[mask])
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    return seen[0]


@pytest.mark.parametrize("function", [with_copies, grouped, by_name, into_cache])
@pytest.mark.parametrize(("tokens", "mask"), [(1, "float"), (1, "none"), (3, "bool"), (3, "row"), (7, "float")])
def test_shared_heads_are_read_where_they_are(function: Call, tokens: int, mask: str) -> None:
    assert run(function, tokens, mask) == (1, False)


@pytest.mark.parametrize(
    ("function", "tokens"), [(causal, 1), (overwritten, 1), (by_head, 2), (with_copies, KEYS), (with_copies, KEYS + 3)]
)
def test_what_would_be_another_result_or_a_longer_way_stays(function: Call, tokens: int) -> None:
    assert run(function, tokens) == (0, True)
