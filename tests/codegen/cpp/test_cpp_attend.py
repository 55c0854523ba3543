"""Generated kernels of packed key-value caches against torch: the same bytes written, the same attention."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.codegen.attend import AttendSpec
from lowbit.codegen.cpp.attend import attend_source
from lowbit.codegen.cpp.attend_launch import AttendKernel, load_attend
from lowbit.codegen.cpp.toolchain import compile_shared, find_compiler
from lowbit.codegen.reference.kvstate import KVState, allocate, attend
from lowbit.compiler.errors import FormatError, KernelError
from lowbit.compiler.ir.target import host_target, isa_runs_here
from lowbit.compiler.runtime.attend import check_attend

pytestmark = [
    pytest.mark.real_kernels,
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"),
]

BEST = host_target().arch
Job = tuple[Any, ...]
JOBS = [
    (BEST, "k2v4.kc32.vt32.w64", 80),
    (BEST, "kv4.kt32.vt32.w40", 128),
    ("avx512", "kv8.kc64.vc32.w64", 64),
    ("avx2", "k16v4.vt.w64", 64),
    ("generic", "k4v2.kt.vt", 64),
    (BEST, "kv16", 80, "f32"),
    (BEST, "kv16", 64, "bf16"),
    ("generic", "kv16", 48, "bf16"),
]
"""Instruction set, format, head size, type of what is not quantized: every kind of group on either side, codes above
127, no window, no codes."""


@pytest.fixture(scope="module")
def kernels() -> dict[Job, AttendKernel]:
    """The kernels that run here, compiled side by side."""

    def one(job: Job) -> AttendKernel:
        arch, spec = job[0], AttendSpec(*job[1:])
        source = attend_source(spec, arch)
        text, artifact = (Path(folder) / f"{spec.digest()}{end}" for end in (".cpp", f"-{arch}.so"))
        text.write_text(source.text)
        compile_shared(text, source.flags, artifact)
        return load_attend(artifact, spec)

    jobs = [job for job in JOBS if isa_runs_here(job[0])]
    with tempfile.TemporaryDirectory(prefix="lowbit-test-") as folder, ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(one, jobs), strict=True))


def filled(spec: AttendSpec, kernel: AttendKernel, batch: int, heads: int, tokens: int, seed: int = 0) -> KVState:
    """A cache that the kernel wrote, with a few channels and tokens that stand out."""
    rng = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, heads, tokens, spec.head_dim, generator=rng) for _ in "kv")
    keys[..., 5] += 12
    values[:, :, tokens // 2] *= 6
    capacity = -(-tokens // spec.span) * spec.span
    state = KVState(spec, allocate(spec, batch, heads, capacity, torch.device("cpu")))
    kernel.append(keys, values, list(state.parts.values()), 0)
    return state


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("job", JOBS, ids=lambda job: "-".join(map(str, job)))
def test_kernels_agree_with_the_reference(kernels: dict[Job, AttendKernel], job: tuple) -> None:
    """Codes, scales and windows to the bit, attention to 16-bit factors; with and without whole windows."""
    if job not in kernels:
        pytest.skip(f"this machine has no {job[0]}")
    spec = AttendSpec(*job[1:])
    for tokens in (0, 5, 2 * spec.span):
        check_attend(spec, kernels[job], tokens)


@pytest.mark.parametrize("job", [*JOBS[:2], JOBS[5]], ids=lambda job: f"{job[1]}-{job[2]}")
@pytest.mark.parametrize(("query_heads", "heads"), [(2, 2), (3, 1), (9, 3), (7, 1)])
def test_grouped_heads_odd_lengths_and_batches(
    kernels: dict[Job, AttendKernel], job: tuple, query_heads: int, heads: int
) -> None:
    spec, kernel = AttendSpec(*job[1:]), kernels[job]
    for tokens, queries in ((8, 8), (63, 1), (65, 2), (131, 3), (389, 1)):
        state = filled(spec, kernel, 2, heads, tokens)
        q = torch.randn(2, query_heads, queries, spec.head_dim, generator=torch.Generator().manual_seed(1))
        want = attend(q, state, tokens, None, 0.125)
        got = kernel.attend(q, list(state.parts.values()), tokens, None, 0.125)
        assert relative(got, want) < 1e-3, (tokens, queries)


def test_masks_and_threads(kernels: dict[Job, AttendKernel]) -> None:
    """Padding on the left, a query that may look nowhere, and the same result whoever computes it."""
    job = JOBS[0]
    spec, kernel, tokens = AttendSpec(*job[1:]), kernels[job], 900
    state = filled(spec, kernel, 2, 3, tokens)
    q = torch.randn(2, 9, 2, spec.head_dim, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 1, 2, tokens + 17, dtype=torch.bool)
    mask[0, :, :, :333] = False
    mask[1, :, 0] = False
    want = attend(q, state, tokens, mask, 0.125)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(kernel.attend(q, list(state.parts.values()), tokens, mask, 0.125))
    finally:
        torch.set_num_threads(before)
    assert relative(results[0], want) < 1e-3
    assert bool((results[0][1, :, 0] == 0).all())
    assert bool((want[1, :, 0] == 0).all())
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_large_scores_do_not_overflow(kernels: dict[Job, AttendKernel]) -> None:
    job = JOBS[0]
    spec, kernel = AttendSpec(*job[1:]), kernels[job]
    state = filled(spec, kernel, 1, 1, 200)
    q = 300 * torch.randn(1, 1, 1, spec.head_dim, generator=torch.Generator().manual_seed(1))
    got = kernel.attend(q, list(state.parts.values()), 200, None, 1.0)
    assert relative(got, attend(q, state, 200, None, 1.0)) < 1e-3


def test_tokens_that_a_mask_hides_are_not_read(kernels: dict[Job, AttendKernel]) -> None:
    """A cache is allocated for more tokens than it holds; what lies there may be anything."""
    job = JOBS[5]
    spec, kernel = AttendSpec(*job[1:]), kernels[job]
    state = filled(spec, kernel, 1, 2, 1024)
    q, mask = torch.randn(1, 6, 1, spec.head_dim), torch.ones(1, 1, 1, 1024, dtype=torch.bool)
    mask[..., 100:] = False
    want = attend(q, state, 1024, mask, 0.125)
    for part in state.parts.values():
        part[:, :, 256:] = float("nan")
    got = kernel.attend(q, list(state.parts.values()), 1024, mask, 0.125)
    assert relative(got, want) < 1e-3


def test_only_plain_caches_have_other_windows() -> None:
    with pytest.raises(FormatError, match="LB0254"):
        AttendSpec("kv4", 64, "f32")
    with pytest.raises(FormatError, match="LB0254"):
        AttendSpec("kv16", 64, "f8")
    assert "window" not in AttendSpec("kv4", 64).key()


def test_corrections_have_no_kernel() -> None:
    with pytest.raises(KernelError) as e:
        attend_source(AttendSpec("kv2.kc64.vt.w64.gear2r4", 64), "generic")
    assert e.value.code == "LB0425"
