"""Generated C++ kernels against the definition of the format, on odd shapes."""

from __future__ import annotations

import pytest
import torch
from _cpp import (
    BACKEND,
    DTYPES,
    Job,
    build,
    check_bits,
    error,
    expected,
    launch,
    rounded_activations,
    spec_of,
    tensors_of,
)

from lowbit.codegen.schedule import Schedule
from lowbit.compiler.ir.target import CPU_ISAS, Target, host_target, isa_runs_here

pytestmark = pytest.mark.skipif(
    BACKEND.available(host_target()) is not None, reason=str(BACKEND.available(host_target()))
)
HOST = host_target().arch
SHAPES = [(1, 33), (17, 100), (33, 576), (40, 160)]
GRAINS = ["t", "ch", "g32", "g48", "g128"]
LIMITS = {"float": 3e-6, "int16": 3e-6, "int8": 3e-6}
TOKENS = (0, 1, 2, 3, 5, 8, 17, 33)


# Float offsets: both kernel shapes, several chunks to a group and one, every kind of products.
OFFSETS = [
    ("int2.g64.fz", "int8", 40, 160, 8),
    ("int2.ch.fz", "int16", 33, 576, 17),
    ("int3.g48.fz.f32", "int16", 33, 160, 3),
    ("int4.t.fz", "float", 17, 100, 17),
    ("int8.ch.fz.bf16", "int8", 17, 576, 3),
]


def cases() -> list[tuple[str, str, int, int, int]]:
    """(format, compute, N, K, M class): every width and symmetry, with granularities, shapes, kinds of products and
    kernel shapes dealt out so that each pair of neighbours occurs."""
    found = []
    for bits in range(1, 9):
        for i, symmetry in enumerate(("sym", "asym")):
            turn = 2 * bits + i
            (n, k), grain = SHAPES[turn % 4], GRAINS[(turn * 3 + i) % 5]
            if grain.startswith("g") and int(grain[1:]) > k:
                grain = "ch"
            compute = ("int16", "int8", "float")[turn % 3]
            if bits == 1 and symmetry == "sym":
                compute = "float"
            found.append((f"int{bits}.{grain}.{symmetry}", compute, n, k, 8 if turn % 2 else 17))
    return found + OFFSETS


def check(run, spec, seed=0):  # type: ignore[no-untyped-def]
    """One launcher at every token count."""
    weights = tensors_of(spec, seed)
    for m in TOKENS:
        x = torch.randn(m, spec.k, generator=torch.Generator().manual_seed(m)).to(DTYPES[spec.x_dtype])
        got = launch(run, spec, x, weights)
        assert error(got, expected(spec, x, weights)) < LIMITS[spec.compute], (spec.format, spec.compute, m)


def test_every_width_symmetry_and_granularity() -> None:
    jobs = [Job(spec_of(fmt, compute, (n,), k), HOST, m) for fmt, compute, n, k, m in cases()]
    for job, run in zip(jobs, build(jobs), strict=True):
        check(run, job.spec)


@pytest.mark.parametrize("arch", [a for a in CPU_ISAS if a != HOST and isa_runs_here(a)])
def test_every_instruction_set_this_machine_runs(arch: str) -> None:
    pairs = [("int8.g48.asym", "int16", 17), ("int7.g32.asym", "int8", 2), ("int6.g48.asym", "float", 1)]
    pairs += [("int3.g48.fz", "int16", 2), ("int2.g64.fz", "int8", 17)]
    jobs = [Job(spec_of(fmt, compute, (33,), 160), arch, m) for fmt, compute, m in pairs]
    for job, run in zip(jobs, build(jobs), strict=True):
        check(run, job.spec)


def test_codes_are_read_whole_by_every_kind_of_product() -> None:
    """Layouts of AVX2, by this machine's instructions and by none in particular."""
    cases = [("int3.g48.fz", "int8", 1), ("int5.ch.asym", "int16", 1), ("int5.g16.sym", "int8", 3)]
    cases += [("int6.g48.asym", "float", 1), ("int7.g32.asym", "int8", 17), ("int7.ch.asym", "float", 17)]
    cases += [("e3m2.g64", "float", 1), ("e3m2.g64", "float", 17), ("e2m3.ch", "int8", 1), ("e3m2.ch", "int8", 17)]
    jobs = [Job(spec_of(f, c, (33,), 160, "avx2"), arch, m) for f, c, m in cases for arch in {HOST, "generic"}]
    assert all(job.spec.layout_.whole for job in jobs)
    for job, run in zip(jobs, build(jobs), strict=True):
        check(run, job.spec)


def test_extreme_codes_and_activations_sum_exactly() -> None:
    """All codes at their largest and activations at +-1: sums reach the bound that must not saturate or overflow."""
    arches = [a for a in CPU_ISAS if isa_runs_here(a)]
    specs = [spec_of("int8.ch.asym.f32", "int16", (16,), 256), spec_of("int7.ch.asym.f32", "int16", (16,), 256)]
    jobs = [Job(spec, arch, m) for spec in specs for arch in arches for m in (1,)]
    for job, run in zip(jobs, build(jobs), strict=True):
        spec, fmt = job.spec, job.spec.fmt
        weight = tensors_of(spec)[0]
        weight.codes.fill_(2**fmt.bits - 1)
        weight.scale.fill_(1.0)
        assert weight.zero is not None
        weight.zero.zero_()
        for sign in (1.0, -1.0):
            x = torch.full((3, spec.k), sign)
            got = launch(run, spec, x, [weight])
            assert torch.allclose(got, torch.full_like(got, sign * spec.k * (2**fmt.bits - 1)), rtol=1e-6, atol=0)
        weight.zero.fill_(2**fmt.bits - 1)
        assert not launch(run, spec, torch.randn(3, spec.k), [weight]).any()


def test_int16_activations_are_close_to_exact_products() -> None:
    spec = spec_of("int4.g128.asym", "int16", (40,), 576)
    weights, x = tensors_of(spec), torch.randn(5, 576)
    (run,) = build([Job(spec, HOST, 8)])
    assert error(launch(run, spec, x, weights), x.double() @ weights[0].dequantize().double().T) < 3e-4


def test_schedules_agree_bit_for_bit_where_the_order_of_sums_is_the_same() -> None:
    """Every offered schedule of a class is legal and gives the same result; so do one and two threads."""
    spec = spec_of("int5.g48.asym", "int16", (600, 300), 160)
    target = Target("cpu", HOST)
    chosen = {s: m for m in (1, 4, 8, 64) for s in BACKEND.schedules(spec, target, m)}
    extra = [Schedule(3, 48).with_extra(accs=2), Schedule(5, 48).with_extra(buffered=1, tokens=10)]
    extra += [Schedule(2, 32).with_extra(residues=3, prefetch=1024)]
    jobs = [Job(spec, HOST, m, s) for s, m in list(chosen.items())[::4]] + [Job(spec, HOST, 1, s) for s in extra]
    weights, x = tensors_of(spec), torch.randn(23, 160)
    want = expected(spec, x, weights)
    for job, run in zip(jobs, build(jobs), strict=True):
        assert error(check_bits(run, spec, weights, x), want) < LIMITS["int16"], job.schedule


def test_dtypes_and_plain_epilogues() -> None:
    jobs = []
    for x_dtype, out_dtype, epilogue in [
        ("bf16", "bf16", ("bias",)),
        ("f16", "f16", ("residual", "bias")),
        ("f32", "f16", ("bias", "residual")),
        ("f16", "bf16", ()),
    ]:
        spec = spec_of("int4.g32.asym", "int16", (17, 24), 100, x_dtype=x_dtype, out_dtype=out_dtype, epilogue=epilogue)
        jobs.append(Job(spec, HOST, (2, 16)[len(jobs) % 2]))
    for job, run in zip(jobs, build(jobs), strict=True):
        spec = job.spec
        weights = tensors_of(spec)
        x = torch.randn(19, spec.k).to(DTYPES[spec.x_dtype])
        bias, residual = torch.randn(41), torch.randn(19, 41).to(DTYPES[spec.out_dtype])
        want = expected(spec, x, weights)
        want = (
            want + (bias if "bias" in spec.epilogue else 0) + (residual.double() if "residual" in spec.epilogue else 0)
        )
        got = launch(run, spec, x, weights, bias, residual)
        step = {"f32": 1e-6, "bf16": 2**-8, "f16": 2**-11}[spec.out_dtype]
        assert ((got.double() - want).abs() <= 1.01 * step * want.abs() + 3e-6).all()


def test_silu_mul_takes_gate_and_up_panels_together() -> None:
    every = ("bias", "silu_mul", "residual")
    jobs = [
        Job(spec_of("int4.ch.sym", compute, (40, 40), 100, epilogue=epilogue), HOST, m, schedule)
        for compute, epilogue, m, schedule in [
            ("int8", every, 1, None),
            ("int8", ("silu_mul",), 16, None),
            ("float", every, 2, None),
            ("int16", ("silu_mul", "residual"), 4, Schedule(4, 64)),
        ]
    ]
    for job, run in zip(jobs, build(jobs), strict=True):
        steps = job.spec.epilogue
        weights, x = tensors_of(job.spec), torch.randn(9, 100) * 4
        bias, residual = torch.randn(80), torch.randn(9, 40)
        y = expected(job.spec, x, weights) + (bias if "bias" in steps else 0)
        want = torch.nn.functional.silu(y[:, :40]) * y[:, 40:] + (residual if "residual" in steps else 0)
        assert error(launch(run, job.spec, x, weights, bias, residual), want) < 1e-5


def test_infinities_and_nans_reach_only_their_own_token() -> None:
    spec = spec_of("int4.g32.asym", "int16", (17,), 100)
    weights = tensors_of(spec)
    for run in build([Job(spec, HOST, 4), Job(spec, HOST, 16)]):
        x = torch.randn(4, 100)
        clean = launch(run, spec, x, weights)
        x[1, 40], x[2, 99] = float("nan"), float("inf")
        got = launch(run, spec, x, weights)
        assert torch.equal(got[[0, 3]], clean[[0, 3]])
        assert not torch.isfinite(got[[1, 2]]).any()
        assert torch.equal(launch(run, spec, torch.full((4, 100), 1e-38), weights), torch.zeros(4, 17))


def test_rounding_of_activations_is_the_documented_one() -> None:
    """With weights that pick out one column, the output is the rounded activation itself."""
    spec = spec_of("int2.ch.asym.f32", "int8", (64,), 64)
    weight = tensors_of(spec)[0]
    weight.codes.copy_(torch.eye(64))
    weight.scale.fill_(1.0)
    assert weight.zero is not None
    weight.zero.zero_()
    (run,) = build([Job(spec, HOST, 1)])
    x = torch.randn(3, 64)
    assert torch.equal(launch(run, spec, x, [weight]), rounded_activations(spec, x).float())
