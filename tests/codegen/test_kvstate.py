"""The packed cache as torch writes and reads it: what comes back is the format's own rounding, whatever the calls."""

from __future__ import annotations

import pytest
import torch

from lowbit.codegen.attend import AttendSpec
from lowbit.codegen.reference.kvstate import KVState, allocate
from lowbit.compiler.errors import FormatError
from lowbit.quantizers.kv import fake_quantize

FORMATS = ["kv4.kc64.vt.w64", "kv2.kc32.vt32.w32", "k8v4.kc64.vc32.w64", "k16v4.vt.w64", "kv4.kt.vt",
           "kv4.kt32.vt32.w40", "kv2.kc64.vt32.w64.gear2r4", "k4v16.kc64.w64"]  # fmt: skip


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dims", [64, 80])
def test_tokens_come_back_as_the_format_rounds_them(text: str, dims: int) -> None:
    spec, rng = AttendSpec(text, dims), torch.Generator().manual_seed(0)
    state = KVState(spec, allocate(spec, 2, 3, 4 * spec.span, torch.device("cpu")))
    keys, values = (torch.randn(2, 3, 200, dims, generator=rng) for _ in "kv")
    length = 0
    for tokens in (3, 70, 1, 1, 60, 5, *(1,) * 7, 53):
        part = slice(length, length + tokens)
        state.append(keys[:, :, part], values[:, :, part], length)
        length += tokens
    assert length == 200
    for got, x, side in zip(state.read(length), (keys, values), (spec.fmt.key, spec.fmt.value), strict=True):
        stored = spec.fmt.stored(side, length)
        codes = fake_quantize(x[:, :, :stored], side, spec.fmt.gear, spec.fmt.window) if stored else x[:, :, :0]
        assert torch.equal(got, torch.cat([codes, x[:, :, stored:].half().float()], 2))


@pytest.mark.parametrize("text", FORMATS)
def test_memory_is_what_the_format_says(text: str) -> None:
    """Every number of a full cache has its place, and nothing else has one, beside padding and the float16 window."""
    spec = AttendSpec(text, 64)
    tokens = 4 * spec.span
    held = sum(t.numel() * t.element_size() for t in allocate(spec, 1, 1, tokens, torch.device("cpu")).values())
    rows = sum(spec.window_rows(side, tokens) for side in (spec.fmt.key, spec.fmt.value))
    stored = sum(spec.fmt.stored(side, tokens) for side in (spec.fmt.key, spec.fmt.value))
    # A side whose window slides never quantizes the newest tokens, but has places for them.
    sliding = [side for side in (spec.fmt.key, spec.fmt.value) if side.quantized and not spec.fmt.in_blocks(side)]
    places = sum(side.nbytes(tokens, 64) - side.nbytes(spec.fmt.stored(side, tokens), 64) for side in sliding)
    windows = (rows - (2 * tokens - stored)) * 64 * 2
    assert held == spec.fmt.nbytes(tokens, 64) + places + windows


def test_heads_that_cannot_be_packed() -> None:
    with pytest.raises(FormatError) as e:
        AttendSpec("kv4", 72)
    assert e.value.code == "LB0254"
