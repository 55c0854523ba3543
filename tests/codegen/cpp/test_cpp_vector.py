"""Generated C++ kernels of vector formats against the definition of the format, on odd shapes."""

from __future__ import annotations

import pytest
import torch
from _cpp import BACKEND, DTYPES, Job, build, check_bits, error, expected, finished, launch, spec_of, tensors_of

from lowbit.codegen.cpp.vector_plan import VectorPlan
from lowbit.codegen.schedule import M_CLASSES, Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import CPU_ISAS, Target, host_target, isa_runs_here

HOST = host_target().arch
needs_compiler = pytest.mark.skipif(
    BACKEND.available(host_target()) is not None, reason=str(BACKEND.available(host_target()))
)
TOKENS = (0, 1, 2, 3, 16, 129)
SILU = ("bias", "silu_mul", "residual")
# Format, segments, K, token class, epilogue, types of x and out. Between them: vectors of 1 to 16 rows that do and do
# not fill a register, 16 to 65536 centroids, widened and stored codebooks of each type, residual codebooks, column
# groups, outliers whose vectors do and do not divide a tile, both norms, several segments, both kernel shapes.
CASES = [
    ("vq.d8.k4096", (100,), 50, 1, (), "f32", "f32"),
    ("vq.d4.k256.r256", (33, 40), 77, 16, ("bias",), "bf16", "bf16"),
    ("vq.d6.k4096.c4.o2pv4k4096", (97,), 133, 2, ("residual",), "f32", "f16"),
    ("vq.d6.k16.c4.o9v4k16.cn", (131,), 333, 16, ("bias", "residual"), "f16", "f32"),
    ("vq.d3.k16.rn", (41, 41), 65, 16, SILU, "f32", "f32"),
    ("vq.d2.k16.r16.rn", (41, 41), 65, 4, SILU, "f32", "f32"),
    ("vq.d8.k65536.o5v3k16.c2.cn.f32", (100,), 45, 4, (), "f32", "f32"),
    ("vq.d12.k256.bf16", (50, 17), 33, 8, (), "f32", "f32"),
    ("vq.d16.k65536.r256", (130,), 40, 16, (), "f32", "f32"),
    ("vq.d1.k16", (35,), 70, 16, (), "f32", "f32"),
]
ELSEWHERE = [("vq.d6.k256.o5v4k16.cn", 1), ("vq.d12.k16.r16", 16), ("vq.d4.k4096.c2", 2)]


def check(run, spec: KernelSpec, tokens: tuple[int, ...] = TOKENS) -> None:  # type: ignore[no-untyped-def]
    """One launcher at several token counts."""
    weights, rng = tensors_of(spec), torch.Generator().manual_seed(5)
    # Outputs reach several times their root mean square, by which `error` divides.
    limit = {"f32": 1e-5, "bf16": 2**-5, "f16": 2**-8}[spec.out_dtype]
    for m in tokens:
        x = torch.randn(m, spec.k, generator=rng).to(DTYPES[spec.x_dtype])
        bias = torch.randn(sum(spec.segments), generator=rng)
        residual = torch.randn(m, spec.n_out, generator=rng).to(DTYPES[spec.out_dtype])
        want = finished(spec, expected(spec, x, weights), bias, residual)
        got = launch(run, spec, x, weights, bias, residual)
        assert error(got, want) < limit, (spec.format, m)


def job_of(fmt: str, segments: tuple[int, ...], k: int, m: int, epilogue: tuple[str, ...], x: str, out: str) -> Job:
    return Job(spec_of(fmt, "float", segments, k, epilogue=epilogue, x_dtype=x, out_dtype=out), HOST, m)


@needs_compiler
def test_every_part_of_the_format_and_both_kernel_shapes() -> None:
    jobs = [job_of(*case) for case in CASES]
    for job, run in zip(jobs, build(jobs), strict=True):
        check(run, job.spec)


@needs_compiler
@pytest.mark.parametrize("arch", [a for a in CPU_ISAS if a not in (HOST, "avx512") and isa_runs_here(a)])
def test_every_instruction_set_this_machine_runs(arch: str) -> None:
    jobs = [Job(spec_of(fmt, "float", (97,), 66), arch, m) for fmt, m in ELSEWHERE]
    for job, run in zip(jobs, build(jobs), strict=True):
        check(run, job.spec, (1, 5, 33))


@needs_compiler
def test_threads_do_not_change_the_result() -> None:
    spec = spec_of("vq.d8.k256.r256.o8v4k16", "float", (900,), 320)
    for run in build([Job(spec, HOST, 1), Job(spec, HOST, 32)]):
        check_bits(run, spec, tensors_of(spec), torch.randn(33, 320))


@needs_compiler
def test_infinities_and_nans_reach_only_their_own_token() -> None:
    spec = spec_of("vq.d6.k16.cn", "float", (50,), 100)
    weights = tensors_of(spec)
    for run in build([Job(spec, HOST, 4), Job(spec, HOST, 16)]):
        x = torch.randn(4, 100)
        clean = launch(run, spec, x, weights)
        x[1, 40], x[2, 99] = float("nan"), float("inf")
        got = launch(run, spec, x, weights)
        assert torch.equal(got[[0, 3]], clean[[0, 3]])
        assert not torch.isfinite(got[[1, 2]]).any()


def test_other_layouts_are_refused() -> None:
    spec = spec_of("vq.d4.k256", "float", (64,), 64)
    wrong = KernelSpec((64,), 64, "vq.d4.k256", spec_of("int4.ch.sym", "float", (64,), 64).layout, "float")
    assert BACKEND.supports(spec, host_target()) is None
    assert "layout" in (BACKEND.supports(wrong, host_target()) or "")
    with pytest.raises(KernelError, match="LB0412"):
        VectorPlan(spec, Schedule(1, 16).with_extra(vectors=3))


def test_schedules_are_legal_ranked_and_cover_every_class() -> None:
    for arch in CPU_ISAS:
        target = Target("cpu", arch)
        for fmt in ("vq.d4.k256", "vq.d12.k65536.r256", "vq.d6.k4096.c4.o2pv4k4096"):
            spec = spec_of(fmt, "float", (576,), 576)
            for m in M_CLASSES:
                found = list(BACKEND.schedules(spec, target, m))
                times = [BACKEND.predict(spec, s, target, m) for s in found]
                assert 1 <= len(found) <= 8
                assert times == sorted(times)
                assert times[0] > 0


def test_predictions_grow_with_lookups_and_tokens() -> None:
    def best(fmt: str, m: int) -> float:
        spec = spec_of(fmt, "float", (4096,), 4096)
        return min(BACKEND.predict(spec, s, host_target(), m) for s in BACKEND.schedules(spec, host_target(), m))

    assert best("vq.d8.k256", 1) < best("vq.d8.k4096", 1) < best("vq.d8.k65536", 1)
    assert best("vq.d8.k256", 1) < best("vq.d8.k256.r256", 1)
    assert best("vq.d8.k256", 1) < best("vq.d4.k256", 1)
    times = [best("vq.d8.k4096", m) for m in (1, 4, 16, 64, 512)]
    assert times == sorted(times)
