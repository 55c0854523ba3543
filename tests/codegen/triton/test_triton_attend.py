"""The Triton kernel over packed key-value caches: interpreted against torch, and compiled for absent GPUs."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from lowbit.codegen.attend import AttendSpec
from lowbit.codegen.reference.kvstate import KVState, allocate, attend
from lowbit.codegen.triton.attend import TritonAttend, attend_source
from lowbit.codegen.triton.interpret import AttendCall, run_interpreted
from lowbit.codegen.triton.offline import compile_offline
from lowbit.compiler.errors import KernelError

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

# Format, head size, tokens, query tokens, query heads, heads, masked: groups along tokens and head dimensions on either
# side, ragged heads, strides narrower than a matrix instruction, no window, no codes, more rows than a program takes.
CASES = [
    ("kv4.kc64.vt.w64", 64, 200, 1, 6, 2, False),
    ("k2v4.kc32.vt32.w32", 80, 99, 3, 3, 1, False),
    ("k2v4.kc32.vt32.w32", 32, 70, 1, 2, 1, False),
    ("kv8.kc64.vc32.w64", 64, 130, 1, 2, 2, True),
    ("k16v2.vt.w33", 32, 70, 1, 2, 1, False),
    ("k4v16.kt", 32, 40, 9, 2, 1, True),
]


def case(text: str, dims: int, tokens: int, queries: int, query_heads: int, heads: int, masked: bool) -> AttendCall:
    spec, rng = AttendSpec(text, dims), torch.Generator().manual_seed(0)
    capacity = -(-tokens // spec.span) * spec.span
    state = KVState(spec, allocate(spec, 2, heads, capacity, torch.device("cpu")))
    keys, values = (torch.randn(2, heads, tokens, dims, generator=rng) for _ in "kv")
    keys[..., 5] += 8
    state.append(keys, values, 0)
    for name, tensor in state.parts.items():  # what lies behind the last token must not matter
        if "scale" in name or "minimum" in name:
            tensor[tensor == 0] = float("nan")
    q = torch.randn(2, query_heads, queries, dims, generator=rng)
    mask = None
    if masked:
        mask = torch.ones(2, 1, queries, tokens + 9, dtype=torch.bool)
        mask[0, :, :, : tokens // 3], mask[1, :, 0] = False, False
    return AttendCall(spec, q, list(state.parts.values()), tokens, mask, dims**-0.5)


def test_interpreted_kernels_agree_with_the_reference() -> None:
    calls = [case(*values) for values in CASES]
    for call, got in zip(calls, run_interpreted(calls), strict=True):
        want = attend(call.q, KVState.of(call.spec, call.state), call.length, call.mask, call.scale)
        assert float((got - want).square().mean().sqrt() / want.square().mean().sqrt()) < 1e-5, call.spec.format
        if call.mask is not None:
            assert bool((got[1, :, 0] == 0).all())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiles_without_spills_to_matrix_instructions(arch: str) -> None:
    formats = [("kv4.kc64.vt.w64", 128), ("k2v4.kc32.vt32.w32", 80), ("kv8.kc64.vt.w64", 64)]
    formats.append(("k2v4.kc32.vt32.w32", 32))
    specs = [AttendSpec(text, dims) for text, dims in formats]
    for spec, reports in zip(specs, compile_offline([(attend_source(s), arch) for s in specs]), strict=True):
        main, join = reports
        assert (main.spills, join.spills) == (0, 0), spec.format
        assert main.matrix_instructions > 0
        assert main.count("I2F") <= 8  # of divisions of sizes: codes become numbers by placing them in a mantissa
        assert main.shared_bytes <= 96 * 1024


def test_formats_it_does_not_read() -> None:
    with pytest.raises(KernelError, match="LB0425"):
        TritonAttend(AttendSpec("kv4.kc32.vt.w32.gear2r4", 64))
