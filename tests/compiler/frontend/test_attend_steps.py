"""Attention of a single token becomes an operator of its own where that gives the same result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _attention import Call, repeated
from torch import fx
from torch.nn.functional import scaled_dot_product_attention as attention

from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.compiler.errors import KernelError
from lowbit.compiler.frontend.attend_steps import attend_steps
from lowbit.compiler.runtime import plain_attend

B, HEADS, SHARED, KEYS, DIM = 2, 6, 2, 300, 32


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def copies(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return attention(q, repeated(k, HEADS), repeated(v, HEADS), attn_mask=mask).transpose(1, 2)


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return attention(q, k, v, mask, 0.0, False, scale=0.3, enable_gqa=True).transpose(1, 2)


def every_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return attention(q[:, :SHARED], k, v, attn_mask=mask) + 1


def into_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    k[:, :, 3] = 1.5
    return copies(q, k, v, mask)


def strided(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return attention(q, k[:, :, 1:], v[:, :, 1:], None if mask is None else mask[..., 1:], enable_gqa=True)


def by_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return attention(value=v, key=k, query=q, attn_mask=mask, enable_gqa=True)


def one_for_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    mask = None if mask is None else mask[..., 1:2]
    return attention(q, repeated(k[:1], HEADS), repeated(v[:1], HEADS), mask) + attention(
        q, k, v, mask, enable_gqa=True
    )


def overwritten(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    keys = repeated(k, HEADS)
    k.zero_()
    return attention(q, keys, repeated(v, HEADS), attn_mask=mask)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return attention(q, repeated(k, HEADS), repeated(v, HEADS), is_causal=True)


def run(function: Call, tokens: int = 1, mask: str = "bool", dim: int = DIM, dtype: torch.dtype = torch.float32) -> int:
    """Calls changed, after comparing with the function itself."""
    rng = torch.Generator().manual_seed(tokens)
    shapes = ((HEADS, tokens), (SHARED, KEYS), (SHARED, KEYS))
    q, k, v = (torch.randn(B, h, n, dim, generator=rng).to(dtype) for h, n in shapes)
    kept = torch.rand(B, 1, tokens, KEYS, generator=rng) < 0.7
    kept[..., 1] = True
    kept[..., 170:] = False
    added = torch.zeros(kept.shape, dtype=dtype).masked_fill(~kept, -3e4)
    given = {"none": None, "bool": kept, "float": added}[mask]
    counts: list[int] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        counts.append(attend_steps(gm))
        return gm.forward

    want = function(q.clone(), k.clone(), v.clone(), given)
    got = torch.compile(function, backend=backend, dynamic=False)(q, k, v, given)
    assert got.dtype == want.dtype
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)
    return counts[0]


@pytest.mark.real_kernels
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("function", [copies, grouped, every_head, into_cache, strided, by_name])
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_single_tokens(function: Call, mask: str) -> None:
    assert run(function, mask=mask) == 1


@pytest.mark.real_kernels
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_what_is_repeated_for_sequences_or_keys(mask: str) -> None:
    """The operator has torch attend: its kernel reads keys of every sequence, and a mask of every key."""
    assert run(one_for_all, mask=mask) == 2


@pytest.mark.real_kernels
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    assert run(grouped, dtype=dtype) == 1


def test_without_a_kernel_torch_attends(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """In a frozen process, or with a compiler that fails: which is said, and nothing is replaced."""

    def fails(key: str) -> None:
        raise KernelError("LB0409", "there is none for kv16")

    monkeypatch.setattr(plain_attend, "attend_kernel", fails)
    plain_attend._kernel.cache_clear()
    try:
        assert run(copies) == 0
        got = torch.ops.lowbit.attend_rows(*(torch.ones(1, 2, n, DIM) for n in (1, 5, 5)), None, 0.1)
        assert torch.allclose(got, torch.ones(1, 2, 1, DIM))
    finally:
        plain_attend._kernel.cache_clear()
    assert "runs on torch: there is none for kv16" in caplog.text


def test_what_the_kernel_does_not_do_stays() -> None:
    assert run(causal) == 0
    assert run(grouped, mask="float") == 0
    assert run(grouped, tokens=3) == 0
    assert run(grouped, dim=24) == 0
    assert run(grouped, dtype=torch.float64) == 0


def test_copies_that_are_needed_are_read() -> None:
    """What was repeated before the original is written to is not the original any more."""
    assert run(overwritten) == 1
