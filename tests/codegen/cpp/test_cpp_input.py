"""C++ kernels of vectors along the input: sums looked up, and decoded panels, against the definition of the format."""

from __future__ import annotations

import pytest
import torch
from _cpp import BACKEND, DTYPES, Job, build, error, finished, launch, spec_of, tensors_of
from _vbmi import emulated

from lowbit.codegen.cpp.input_plan import SUMLESS
from lowbit.codegen.schedule import M_CLASSES, Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import CPU_ISAS, Target, host_target, isa_runs_here

HOST = host_target().arch
needs_compiler = pytest.mark.skipif(
    BACKEND.available(host_target()) is not None, reason=str(BACKEND.available(host_target()))
)
SILU = ("bias", "silu_mul", "residual")
ROWS = Schedule(2, 16).with_extra(vectors=8)
SUMS, PANELS = Schedule(2, 128).with_extra(sums=1), Schedule(3, 64).with_extra(buffered=1, tokens=96)
# Format, segments, K, schedule, epilogue, types of x and out. Between them: tables of half a register to eight, one and
# two codebooks of equal and of other sizes, of bytes and of floats, vectors of 2 to 16 columns that do and do not
# divide a chunk, both norms, gate and up, several segments, rows that fill no tile, and codebooks too large for tables.
CASES = [
    ("vq.d8.k256.r256.in.rn", (200,), 264, SUMS, ("residual",), "f32", "f32"),
    ("vq.d8.k256.in", (70, 70), 416, SUMS, SILU, "bf16", "bf16"),
    ("vq.d4.k64.r256.in.s8", (300, 65, 40), 332, SUMS, ("bias",), "f32", "f32"),
    ("vq.d3.k128.r8.in.cn.f32", (97,), 333, Schedule(1, 64).with_extra(sums=1), (), "f16", "f32"),
    ("vq.d2.k16.in.bf16", (64,), 128, SUMS, (), "f32", "f32"),
    ("vq.d16.k32.in.rn.s8", (33,), 16, SUMS, (), "f32", "f32"),
    ("vq.d8.k65536.in.rn", (100,), 264, PANELS, ("bias",), "f32", "f32"),
    ("vq.d8.k4096.r256.in", (150,), 1304, ROWS, ("residual",), "f32", "f32"),
    ("vq.d6.k65536.in.rn.s8", (70, 70), 390, ROWS, SILU, "f32", "f32"),
    ("vq.d6.k4096.r16.in.s8", (130, 67), 390, PANELS, (), "bf16", "f32"),
    ("vq.d5.k256.r256.in.cn", (70,), 35, PANELS, ("residual",), "f32", "f32"),
]
LIMITS = {"f32": 1e-5, "bf16": 2**-5, "f16": 2**-8}
WORDS = 3e-3
"""What tables of 16 bits may be off, as `error` divides by: a few units in the last place of bfloat16."""


def spec_for(fmt: str, segments: tuple[int, ...], k: int, schedule: Schedule, **rest: object) -> KernelSpec:
    return spec_of(fmt, "int16" if schedule.get("sums", 0) else "float", segments, k, **rest)


def arch_for(schedule: Schedule) -> str:
    return "generic" if schedule.get("sums", 0) and HOST in SUMLESS else HOST


def exact(spec: KernelSpec, x: torch.Tensor, weights: list) -> torch.Tensor:  # type: ignore[type-arg]
    return x.double() @ torch.cat([w.dequantize() for w in weights]).double().T


def check(run, spec: KernelSpec, limit: float, tokens: tuple[int, ...] = (0, 1, 2, 5, 40)) -> None:  # type: ignore[no-untyped-def]
    weights, rng = tensors_of(spec), torch.Generator().manual_seed(5)
    for m in tokens:
        x = torch.randn(m, spec.k, generator=rng).to(DTYPES[spec.x_dtype])
        bias = torch.randn(sum(spec.segments), generator=rng)
        residual = torch.randn(m, spec.n_out, generator=rng).to(DTYPES[spec.out_dtype])
        want = finished(spec, exact(spec, x, weights), bias, residual)
        assert error(launch(run, spec, x, weights, bias, residual), want) < limit, (spec.format, m)


def limit_of(spec: KernelSpec) -> float:
    return max(LIMITS[spec.out_dtype], WORDS if spec.compute == "int16" else 0.0)


@needs_compiler
def test_both_kernel_shapes_on_odd_shapes() -> None:
    jobs = [
        Job(spec_for(fmt, segments, k, s, epilogue=epilogue, x_dtype=x, out_dtype=out), arch_for(s), 1, s)
        for fmt, segments, k, s, epilogue, x, out in CASES
    ]
    for job, run in zip(jobs, build(jobs), strict=True):
        check(run, job.spec, limit_of(job.spec))


@needs_compiler
@pytest.mark.parametrize("arch", [a for a in (*CPU_ISAS, "generic") if a != HOST and isa_runs_here(a)])
def test_every_instruction_set_this_machine_runs(arch: str) -> None:
    specs = [
        spec_for("vq.d4.k256.r16.in", (70, 70), 68, SUMS, epilogue=SILU),
        spec_for("vq.d8.k512.in", (97,), 72, PANELS),
    ]
    schedules = (ROWS if arch in SUMLESS else Schedule(2, 64).with_extra(sums=1), PANELS)
    jobs = [Job(spec, arch, 1, schedule) for spec, schedule in zip(specs, schedules, strict=True)]
    for job, run in zip(jobs, build(jobs), strict=True):
        # Without AVX-512 entries of tables are floats.
        check(run, job.spec, WORDS if arch.startswith("avx512") and job.spec.compute == "int16" else 1e-5, (1, 3, 17))


@needs_compiler
@pytest.mark.skipif(not isa_runs_here("avx512vnni"), reason="emulating avx512vbmi needs a machine with avx512vnni")
def test_sums_by_permutes_of_bytes_emulated() -> None:
    """Where one machine has them they are its own kernels, and tested above; this is for all others."""
    jobs = [
        Job(spec_for(fmt, segments, k, s, epilogue=epilogue, x_dtype=x, out_dtype=out), "avx512vbmi", 1, s)
        for fmt, segments, k, s, epilogue, x, out in CASES
        if s.get("sums", 0)
    ]
    for job, run in zip(jobs, build(jobs, emulated), strict=True):
        check(run, job.spec, limit_of(job.spec), (1, 5))


@needs_compiler
def test_threads_and_other_tokens_do_not_change_the_result() -> None:
    spec = spec_for("vq.d8.k256.r256.in.rn", (900,), 1288, SUMS)
    weights, x = tensors_of(spec), torch.randn(7, 1288)
    before = torch.get_num_threads()
    try:
        (run,) = build([Job(spec, arch_for(SUMS), 1, SUMS)])
        torch.set_num_threads(1)
        want = launch(run, spec, x, weights)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(launch(run, spec, x, weights), want)
            assert torch.equal(launch(run, spec, x[3:4], weights), want[3:4])
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("schedule", [SUMS, PANELS], ids=["sums", "panels"])
def test_infinities_nans_and_zeros_reach_only_their_own_token(schedule: Schedule) -> None:
    spec = spec_for("vq.d4.k64.in", (90,), 300, schedule)
    weights, x = tensors_of(spec), torch.randn(5, 300)
    (run,) = build([Job(spec, arch_for(schedule), 4, schedule)])
    clean = launch(run, spec, x, weights)
    x[1, 40], x[2, 299], x[3] = float("nan"), float("inf"), 0.0
    got = launch(run, spec, x, weights)
    assert torch.equal(got[[0, 4]], clean[[0, 4]])
    assert not torch.isfinite(got[[1, 2]]).any()
    assert not got[3].any()


@needs_compiler
def test_large_and_small_activations_keep_their_precision() -> None:
    """Chunks have scales of their own: one with tiny activations is as exact as one with huge ones."""
    spec = spec_for("vq.d8.k256.in", (64,), 512, SUMS)
    weights, x = tensors_of(spec), torch.randn(1, 512) * torch.tensor([1e-6, 1e3, 1e-3, 1.0]).repeat_interleave(128)
    (run,) = build([Job(spec, arch_for(SUMS), 1, SUMS)])
    for c in range(4):
        alone = torch.zeros_like(x)
        alone[:, c * 128 : (c + 1) * 128] = x[:, c * 128 : (c + 1) * 128]
        assert error(launch(run, spec, alone, weights), exact(spec, alone, weights)) < WORDS


def test_illegal_schedules_and_products_say_why() -> None:
    words, floats = spec_for("vq.d8.k256.in", (64,), 64, SUMS), spec_for("vq.d8.k512.in", (64,), 64, PANELS)
    target = Target("cpu", "avx512")
    assert BACKEND.illegal(words, Schedule(2, 64).with_extra(sums=1), target) is None
    assert "permutes of words" in (BACKEND.illegal(words, SUMS, Target("cpu", "avx2")) or "")
    assert "no tables of sums" in (BACKEND.illegal(floats, SUMS, target) or "")
    assert "tiles of 64" in (BACKEND.illegal(words, Schedule(1, 48).with_extra(sums=1), target) or "")
    for fmt, compute in (("vq.d8.k512.in", "int16"), ("vq.d8.k256.in.s8", "int8")):
        with pytest.raises(KernelError, match="LB0402"):
            spec_of(fmt, compute, (64,), 64)


def test_schedules_are_legal_ranked_and_cover_every_class() -> None:
    for arch in CPU_ISAS:
        target = Target("cpu", arch)
        for fmt, compute in (
            ("vq.d8.k256.r256.in.rn", "int16"),
            ("vq.d8.k65536.in", "float"),
            ("vq.d4.k16.in.s8", "int16"),
        ):
            spec = spec_of(fmt, compute, (576,), 576)
            for m in M_CLASSES:
                found = list(BACKEND.schedules(spec, target, m))
                times = [BACKEND.predict(spec, s, target, m) for s in found]
                assert found
                assert times == sorted(times)
                assert times[0] > 0
                assert all(BACKEND.illegal(spec, s, target) is None for s in found), (arch, fmt, m)
                assert m > 1 or bool(found[0].get("sums", 0)) == (compute == "int16" and arch not in SUMLESS)
