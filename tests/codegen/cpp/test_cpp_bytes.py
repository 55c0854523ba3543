"""C++ kernels that multiply codebooks of bytes as integers: the definition of the format, on odd shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from _cpp import BACKEND, DTYPES, Job, build, error, expected, finished, launch, spec_of, tensors_of

from lowbit.codegen.cpp.bytes_plan import BytesPlan, vector_plan
from lowbit.codegen.schedule import M_CLASSES
from lowbit.codegen.select import able, layout_name
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import FormatError, KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import CPU_ISAS, Target, host_target, isa_runs_here
from lowbit.compiler.runtime.modules import check_activation, target_compute
from lowbit.quantizers.formats import parse_format

HOST = host_target().arch
needs_compiler = pytest.mark.skipif(
    BACKEND.available(host_target()) is not None, reason=str(BACKEND.available(host_target()))
)
SILU = ("bias", "silu_mul", "residual")
# Format, products, segments, K, token class, epilogue, activation, types of x and out. Between them: centroids of 4, 8
# and 16 packed bytes, whole and padded, indices of both widths, residual codebooks, column groups, outliers whose
# vectors pad otherwise, both norms, several segments, one and two digits, both kernel shapes, columns beyond a step.
CASES = [
    ("vq.d8.k4096.s8", "int8", (100,), 301, 1, (), "", "f32", "f32"),
    ("vq.d6.k16.r16.c4.o9v13k16.cn.s8", "int8", (131,), 333, 16, ("bias", "residual"), "", "f16", "f32"),
    ("vq.d4.k256.r256.s8", "int16", (33, 140), 477, 16, ("bias",), "", "bf16", "bf16"),
    ("vq.d12.k512.rn.s8", "int8", (150, 17), 200, 1, (), "int8.token", "f32", "f32"),
    ("vq.d6.k4096.c4.o2pv4k4096.s8", "int16", (97,), 133, 2, ("residual",), "", "f32", "f16"),
    ("vq.d3.k16.rn.s8", "int8", (41, 41), 65, 16, SILU, "", "f32", "f32"),
    ("vq.d2.k16.r16.rn.s8", "int16", (41, 41), 66, 2, SILU, "", "f32", "f32"),
    ("vq.d4.k256.o5v8k65536.s8", "int8", (300,), 391, 16, (), "int4.token", "f32", "f32"),
    ("vq.d7.k16.c2.s8", "float", (100,), 90, 1, (), "", "f32", "f32"),
    ("vq.d16.k16.s8", "float", (40,), 90, 16, (), "", "f32", "f32"),
]
QUICK = 3
ELSEWHERE = [("vq.d6.k256.o5v4k16.cn.s8", "int16", 1), ("vq.d12.k16.r16.s8", "int8", 16), ("vq.d4.k4096.s8", "int8", 2)]


def check(run, spec: KernelSpec, tokens: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    weights, rng = tensors_of(spec), torch.Generator().manual_seed(5)
    limit = {"f32": 1e-5, "bf16": 2**-5, "f16": 2**-8}[spec.out_dtype]
    for m in tokens:
        x = torch.randn(m, spec.k, generator=rng).to(DTYPES[spec.x_dtype])
        bias = torch.randn(sum(spec.segments), generator=rng)
        residual = torch.randn(m, spec.n_out, generator=rng).to(DTYPES[spec.out_dtype])
        want = finished(spec, expected(spec, x, weights), bias, residual)
        assert error(launch(run, spec, x, weights, bias, residual), want) < limit, (spec.format, m)


@needs_compiler
@pytest.mark.parametrize(
    "cases", [CASES[:QUICK], pytest.param(CASES[QUICK:], marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_every_part_of_the_format_and_both_kernel_shapes(cases: list[Any]) -> None:
    jobs = []
    for fmt, compute, segments, k, m, epilogue, activation, x, out in cases:
        rest = {"epilogue": epilogue, "activation": activation, "x_dtype": x, "out_dtype": out}
        jobs.append(Job(spec_of(fmt, compute, segments, k, **rest), HOST, m))
    for job, run in zip(jobs, build(jobs), strict=True):
        check(run, job.spec, (0, 1, 2, 3, 16, 193))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("arch", [a for a in CPU_ISAS if a not in (HOST, "avx512") and isa_runs_here(a)])
def test_every_instruction_set_this_machine_runs(arch: str) -> None:
    jobs = [Job(spec_of(fmt, compute, (97,), 67), arch, m) for fmt, compute, m in ELSEWHERE]
    for job, run in zip(jobs, build(jobs), strict=True):
        check(run, job.spec, (1, 5, 33))


@needs_compiler
def test_threads_change_nothing_and_what_is_not_finite_reaches_only_its_own_token() -> None:
    spec = spec_of("vq.d8.k256.r256.o8v4k16.s8", "int16", (900,), 320)
    weights, x = tensors_of(spec), torch.randn(33, 320)
    bad = x.clone()
    bad[1, 40], bad[2, 300] = float("nan"), float("inf")
    before = torch.get_num_threads()
    try:
        for run in build([Job(spec, HOST, 1), Job(spec, HOST, 32)]):
            torch.set_num_threads(1)
            want = launch(run, spec, x, weights)
            torch.set_num_threads(3)
            assert torch.equal(launch(run, spec, x, weights), want)
            got = launch(run, spec, bad, weights)
            assert torch.equal(got[[0, *range(3, 33)]], want[[0, *range(3, 33)]])
            assert not torch.isfinite(got[[1, 2]]).any()
    finally:
        torch.set_num_threads(before)


def test_products_are_of_integers_by_default_on_cpus_and_gpus_fall_to_triton() -> None:
    fmt = parse_format("vq.d4.k256.s8")
    assert target_compute(fmt, Target("cpu", "avx2")) == "int16"
    assert target_compute(parse_format("vq.d4.k256"), Target("cpu", "avx2")) == "float"
    gpu = Target.parse("sm_90")
    assert target_compute(fmt, gpu) == "float"
    assert layout_name(fmt, gpu) == "vectors"
    spec = spec_of("vq.d4.k256.s8", "int8", (64,), 64)
    assert isinstance(vector_plan(spec, next(iter(BACKEND.schedules(spec, host_target(), 1)))), BytesPlan)
    assert [b.name for b in able(spec, host_target())][-1] == "reference"
    elsewhere = replace(spec, layout=str(LAYOUTS["vectors"]))
    assert "read layout" in str(BACKEND.supports(elsewhere, host_target()))


@pytest.mark.parametrize(
    ("fmt", "activation", "compute", "why"),
    [
        ("vq.d4.k256", "int8.token", "float", "f16 codebooks"),
        ("vq.d4.k256.cn.s8", "int8.token", "int8", "norms of columns"),
        ("vq.d4.k256.s8", "int8.g64", "int8", "one scale per token"),
        ("vq.d4.k256.s8", "int8.token.static", "int8", "one scale per token"),
        ("vq.d4.k256.s8", "e4m3.token", "float", "not of e4m3"),
    ],
)
def test_activations_that_are_not_rounded_say_why(fmt: str, activation: str, compute: str, why: str) -> None:
    with pytest.raises(KernelError, match=f"LB0416.*{why}"):
        spec_of(fmt, compute, (64,), 128, activation=activation)
    with pytest.raises(FormatError, match=f"LB0243.*{why}"):
        check_activation(parse_format(fmt), 64, 128, activation)


def test_schedules_are_legal_and_ranked_and_cost_what_lookups_do() -> None:
    def best(fmt: str, m: int, compute: str = "int8") -> float:
        spec = spec_of(fmt, compute, (4096,), 4096)
        return next(BACKEND.predict(spec, s, host_target(), m) for s in BACKEND.schedules(spec, host_target(), m))

    for arch in CPU_ISAS:
        target, spec = Target("cpu", arch), spec_of("vq.d6.k4096.c4.o2pv4k4096.s8", "int16", (576,), 576)
        for m in M_CLASSES:
            found = list(BACKEND.schedules(spec, target, m))
            assert found
            assert all(BACKEND.illegal(spec, s, target) is None for s in found if arch != "generic")
            assert all(s in BACKEND.space(spec, target, m) for s in found)
    assert best("vq.d8.k256.s8", 1) < best("vq.d8.k65536.s8", 1)
    assert best("vq.d8.k256.s8", 1) < best("vq.d8.k256.r256.s8", 1)
    assert best("vq.d8.k4096.s8", 16) <= best("vq.d8.k4096.s8", 16, "int16") < best("vq.d8.k4096.s8", 512)
