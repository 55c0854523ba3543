"""Products of bfloat16 numbers, on machines that have them, and emulated on others with AVX-512 VNNI."""

from __future__ import annotations

import pytest
import torch
from _cpp import BACKEND, Job, build, check_bits, error, expected, finished, launch, spec_of, tensors_of
from _vbmi import emulated

from lowbit.codegen.backend import Source
from lowbit.codegen.cpp.bf16 import bf16_lookup, bf16_problem, folds
from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.schedule import Schedule
from lowbit.compiler.ir.target import Target, host_target, isa_runs_here
from lowbit.compiler.runtime import prebuilt
from lowbit.quantizers.formats import Format, parse_format

ARCH = "avx512bf16"
TARGET = Target("cpu", ARCH)
HERE = isa_runs_here(ARCH)
EVERY = ("bias", "silu_mul", "residual")
needs_avx512 = pytest.mark.skipif(
    BACKEND.builds(host_target()) is not None or not isa_runs_here("avx512vnni"),
    reason="a C++ compiler and a machine with avx512vnni, which emulates bfloat16 products, are needed",
)
FEW = Schedule(2, 32).with_extra(bf16=1, accs=2)
MANY = Schedule(5, 48).with_extra(bf16=1, buffered=1, tokens=10)
PAIRS = Schedule(3, 64).with_extra(bf16=1, buffered=1, tokens=9)
CASES = [
    ("e3m2.ch", "int16", (67,), 333, ()),  # six bits, one scale a row
    ("mxfp4", "int16", (131,), 500, ("bias",)),  # scales folded in, four chunks at a time
    ("nvfp4", "int16", (33, 41), 176, ()),  # two groups a block, scales of tensors
    ("e4m3.g48.f32", "float", (67,), 145, ("residual",)),  # bytes with signs, padded groups
    ("e5m2.ch", "float", (50,), 77, ()),
    ("int7.g32.sym", "int16", (67,), 160, ()),  # bytes of all codes
    ("int4.g16.sym", "int16", (40,), 200, ()),  # two groups a block, scales that do not fold
    ("int1.g64.sym", "float", (33,), 200, ()),
    ("iq4nl.g32", "int16", (48,), 96, ("bias", "residual")),
    ("int3.g128.sym.perm", "int16", (37,), 300, ()),
    ("bcq2.g64", "int16", (40,), 200, ()),  # two terms meet the same activations
    ("e2m1.g64.e8m0", "float", (65,), 301, ()),  # folded, two blocks a chunk
    ("e2m3.g64", "int16", (24, 24), 160, EVERY),
    ("mxfp4", "float", (40, 40), 96, EVERY),
]


def checked(source: Source) -> Source:
    """The source as it runs here, whose products are indeed of bfloat16 numbers."""
    assert "dot_bf16(a" in source.text
    return source if HERE else emulated(source)


@needs_avx512
def test_products_round_nothing() -> None:
    jobs = [
        Job(spec_of(fmt, compute, segments, k, x_dtype="bf16", epilogue=epilogue), ARCH, 1, schedule)
        for fmt, compute, segments, k, epilogue in CASES
        for schedule in (FEW, PAIRS if EVERY == epilogue else MANY)
    ]
    for job, run in zip(jobs, build(jobs, checked), strict=True):
        spec, weights = job.spec, tensors_of(job.spec)
        for m in (0, 1, 2, 3, 5, 11, 23):
            rng = torch.Generator().manual_seed(m)
            x = torch.randn(m, spec.k, generator=rng).bfloat16()
            bias, residual = torch.randn(sum(spec.segments), generator=rng), torch.randn(m, spec.n_out, generator=rng)
            want = finished(spec, expected(spec, x, weights, job.chosen()), bias, residual)
            assert error(launch(run, spec, x, weights, bias, residual), want) < 3e-6, (spec.format, job.schedule, m)


@needs_avx512
def test_all_tokens_and_threads_get_the_same_bits() -> None:
    spec = spec_of("mxfp4", "int16", (600,), 288, x_dtype="bf16")
    for run in build([Job(spec, ARCH, 1, schedule) for schedule in (FEW, MANY)], checked):
        check_bits(run, spec, tensors_of(spec), torch.randn(23, 288).bfloat16())


@needs_avx512
@pytest.mark.parametrize("schedule", [FEW, MANY])
def test_what_is_not_finite_stays_where_it_is(schedule: Schedule) -> None:
    spec = spec_of("e3m2.ch", "int16", (33,), 96, x_dtype="bf16")
    weights, x = tensors_of(spec), torch.randn(3, 96).bfloat16()
    x[1, 7] = float("inf")
    (run,) = build([Job(spec, ARCH, 1, schedule)], checked)
    got = launch(run, spec, x, weights)
    assert torch.isfinite(got[[0, 2]]).all()
    assert not torch.isfinite(got[1]).any()


FORMATS = ["e2m1.ch", "e3m2.ch", "e2m3.ch", "e4m3.ch", "e5m2.ch", "e3m3.ch", "iq4nl.ch", "int1.ch.sym", "int4.ch.sym"]


@pytest.mark.parametrize("text", [*FORMATS, "int7.ch.sym"])
def test_tables_hold_every_value(text: str) -> None:
    fmt = parse_format(text)
    assert isinstance(fmt, Format)
    levels, lookup = fmt.element.levels(), bf16_lookup(fmt.element)
    assert lookup is not None
    codes = torch.arange(len(levels))
    words = torch.tensor(lookup.words)[codes % len(lookup.words)]
    words |= codes // 128 * 0x8000 if lookup.signed else 0
    numbers = (words << 16).to(torch.int32).view(torch.float32)
    assert torch.equal(numbers.nan_to_num(7.0), levels.nan_to_num(7.0))
    assert lookup.bytewise == (fmt.bits > 6)


def test_scales_are_folded_in_only_where_nothing_is_lost() -> None:
    for fmt, whether in (("mxfp4", True), ("nvfp4", True), ("e4m3.g16.e4m3.t32", True), ("int7.g32.sym", False),
                         ("int6.g32.sym.e4m3", False), ("e3m2.g32.e8m0", True)):  # fmt: skip
        spec = spec_of(fmt, "float", (64,), 256, x_dtype="bf16")
        assert folds(spec) == whether, fmt
        if whether:
            weight = tensors_of(spec)[0]
            folded = weight.fmt.element.values(weight.codes) * weight.scale.float().repeat_interleave(spec.group, 1)
            assert torch.equal(folded.bfloat16().float(), folded)
    assert not Plan(spec_of("e4m3.ch", "float", (64,), 256, x_dtype="bf16"), MANY).folded


@pytest.mark.parametrize(
    ("fmt", "rest", "why"),
    [
        ("int4.g64.sym", {}, "where they arrive so"),
        ("int4.g64.sym", {"x_dtype": "bf16", "rotate": 64}, "and stay so"),
        ("int4.g64.sym", {"x_dtype": "bf16", "norm_eps": 1e-6}, "and stay so"),
        ("int4.g64.asym", {"x_dtype": "bf16"}, "zero points or offsets"),
        ("int8.ch.sym", {"x_dtype": "bf16"}, "no table of bfloat16 numbers holds the values of int8"),
        ("nf4.g64", {"x_dtype": "bf16"}, "no table of bfloat16 numbers holds the values of nf4"),
        ("tcq2.g64", {"x_dtype": "bf16"}, "no table of bfloat16 numbers"),
    ],
)
def test_what_cannot_be_multiplied_so_says_why(fmt: str, rest: dict[str, object], why: str) -> None:
    spec = spec_of(fmt, "float", (64,), 256, **rest)
    assert why in str(bf16_problem(spec))
    assert why in str(BACKEND.illegal(spec, FEW, TARGET))
    assert not any(s.get("bf16", 0) for m in (1, 512) for s in BACKEND.space(spec, TARGET, m))


def test_other_machines_and_other_products_are_refused() -> None:
    spec = spec_of("e3m2.ch", "int16", (64,), 256, x_dtype="bf16")
    assert "are instructions of avx512bf16" in str(BACKEND.illegal(spec, FEW, Target("cpu", "avx512vbmi")))
    assert "or of integers" in str(BACKEND.illegal(spec, FEW.with_extra(words=1), TARGET))
    for arch in ("avx512vbmi", "avx512vnni", "avx2", "neon"):
        assert not any(s.get("bf16", 0) for m in (1, 64) for s in BACKEND.space(spec, Target("cpu", arch), m)), arch


def test_they_are_chosen_where_they_are_faster() -> None:
    def chosen(fmt: str, compute: str, m: int, x_dtype: str = "bf16") -> set[int]:
        spec = spec_of(fmt, compute, (4096,), 4096, x_dtype=x_dtype)
        found = list(BACKEND.schedules(spec, TARGET, m))
        assert len(found) <= 8
        assert all(BACKEND.illegal(spec, s, TARGET) is None for s in found)
        return {s.get("bf16", 0) for s in found}

    for fmt, compute in (("e3m2.ch", "int16"), ("e4m3.ch", "float")):
        assert all(chosen(fmt, compute, m) == {1} for m in (1, 8, 64, 512)), fmt
    assert [chosen("int4.g128.sym", "int16", m) for m in (1, 8, 512)] == [{0}, {1}, {1}]
    assert [chosen("mxfp4", "int16", m) for m in (1, 8, 512)] == [{0}, {1}, {1}]
    assert chosen("e3m2.ch", "int16", 512, "f32") == chosen("int4.g128.sym", "int8", 512) == {0}


def test_kernels_of_other_machines_run_where_bfloat16_has_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints compiled for machines with less are still of use."""
    monkeypatch.setattr(prebuilt, "isa_runs_here", lambda isa: isa.startswith("avx"))
    assert Target("cpu", "avx512vbmi") in prebuilt.runnable_targets(TARGET)
