"""C++ kernels that look codebooks up by permutes of registers: bit for bit what loads of centroids give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from _cpp import BACKEND, Job, build, error, expected, finished, launch, spec_of, tensors_of
from _vbmi import emulated

from lowbit.codegen.cpp.bytes_plan import PERMUTED, BytesPlan
from lowbit.codegen.schedule import M_CLASSES, Schedule
from lowbit.compiler.ir.target import CPU_ISAS, Target, host_target, isa_runs_here

needs_compiler = pytest.mark.skipif(
    BACKEND.available(host_target()) is not None, reason=str(BACKEND.available(host_target()))
)
needs_vnni = pytest.mark.skipif(
    not isa_runs_here("avx512vnni"), reason="emulating avx512vbmi needs a machine with avx512vnni"
)
# Format, products, segments, K, schedule without `permute`. Between them: tables of one and of several registers, of
# one to sixteen coordinates, sums of some coordinates at a time, residual codebooks, column groups, outliers that are
# looked up the other way, both norms, gate and up, odd shapes, one and two digits, both kernel shapes; and, without
# VBMI, tables of words, of an odd number of coordinates too, beside tables of bytes.
SMALL = [
    ("vq.d6.k64.r16.c4.o9v13k512.cn.s8", "int16", (131,), 333, Schedule(2, 64)),
    ("vq.d4.k16.rn.s8", "int8", (41, 41), 67, Schedule(1, 64)),
    ("vq.d3.k32.o2pv8k64.s8", "int8", (103,), 130, Schedule(3, 32).with_extra(buffered=1, tokens=192)),
    ("vq.d2.k64.r32.s8", "int16", (70, 33), 90, Schedule(1, 32)),
    ("vq.d16.k2.c3.s8", "int8", (140,), 93, Schedule(1, 128)),
    ("vq.d7.k64.o5v1k16.s8", "int16", (120,), 61, Schedule(4, 64).with_extra(buffered=1, tokens=192)),
]
LARGE = [
    ("vq.d6.k256.r64.c4.o9v13k128.cn.s8", "int8", (131,), 333, Schedule(2, 64)),
    ("vq.d5.k128.r256.o3pv3k256.s8", "int8", (103,), 130, Schedule(3, 64).with_extra(buffered=1, tokens=192)),
    ("vq.d3.k256.rn.s8", "int8", (41, 41), 67, Schedule(1, 32)),
    ("vq.d8.k256.s8", "int16", (300,), 71, Schedule(6, 64).with_extra(buffered=1, tokens=192)),
    ("vq.d2.k128.r256.s8", "int8", (100,), 90, Schedule(1, 32)),
    ("vq.d4.k256.o5v8k512.rn.s8", "int16", (82,), 66, Schedule(1, 64)),
    ("vq.d3.k64.s8", "int16", (41, 41), 67, Schedule(4, 32)),
    ("vq.d16.k16.r128.s8", "int8", (97,), 45, Schedule(1, 128)),
]
QUICK = 1


def jobs_of(case: Any, arch: str) -> list[Job]:
    """The kernel of a case by permutes, and by loads."""
    fmt, compute, segments, k, loads = case
    epilogue = ("silu_mul",) if len(set(segments)) < len(segments) else ()
    spec, permutes = spec_of(fmt, compute, segments, k, epilogue=epilogue), loads.with_extra(permute=PERMUTED[arch])
    assert BytesPlan(spec, permutes).permutes
    assert not BytesPlan(spec, loads).permutes
    return [Job(spec, arch, 1, schedule) for schedule in (permutes, loads)]


def words_of(case: Any) -> list[Job]:
    """The kernel of a case by permutes of words, and the same for many tokens."""
    (job, _), many = jobs_of(case, "avx512vnni"), Schedule(3, 64).with_extra(buffered=1, tokens=192, permute=256)
    return [job, replace(job, schedule=many)]


def check(runs: list[Any], job: Job) -> None:
    """Two launchers agree to the bit, whatever the threads, and the first one with the definition."""
    spec, weights, rng = job.spec, tensors_of(job.spec), torch.Generator().manual_seed(7)
    for m in (1, 2, 7, 33):
        x = torch.randn(m, spec.k, generator=rng)
        found = launch(runs[0], spec, x, weights)
        assert torch.equal(found, launch(runs[1], spec, x, weights)), (spec.format, m)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(found, launch(runs[0], spec, x, weights)), (spec.format, m)
        finally:
            torch.set_num_threads(before)
        want = finished(spec, expected(spec, x, weights), torch.empty(0), torch.empty(0))
        assert error(found, want) < 1e-5, (spec.format, m)


@needs_compiler
@pytest.mark.parametrize(
    "cases", [SMALL[:QUICK], pytest.param(SMALL[QUICK:], marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_permutes_find_what_loads_find(cases: list[Any]) -> None:
    arch = host_target().arch
    if arch not in PERMUTED:
        pytest.skip(f"{arch} looks nothing up by permutes")
    compare(cases, arch)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("arch", [a for a in PERMUTED if a != host_target().arch and isa_runs_here(a)])
def test_permutes_of_other_instruction_sets(arch: str) -> None:
    compare(SMALL[: QUICK + 2], arch)


def compare(cases: list[Any], arch: str) -> None:
    pairs = [jobs_of(case, arch) for case in cases]
    runs = build([job for pair in pairs for job in pair])
    for i, (job, _) in enumerate(pairs):
        check(runs[2 * i : 2 * i + 2], job)


@needs_compiler
@needs_vnni
@pytest.mark.parametrize(
    "cases", [LARGE[:QUICK], pytest.param(LARGE[QUICK:], marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_permutes_of_vbmi_emulated_and_of_words(cases: list[Any]) -> None:
    pairs = [jobs_of(case, "avx512vbmi") for case in cases]
    permutes = build([job for job, _ in pairs], emulated)
    loads = build([replace(job, arch="avx512vnni") for _, job in pairs])
    words = build([job for case in cases for job in words_of(case)])
    for i, (job, _) in enumerate(pairs):
        few, many = words[2 * i : 2 * i + 2]
        check([permutes[i], loads[i]], job)
        check([few, loads[i]], job)
        check([many, many], job)


@needs_compiler
@needs_vnni
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["avx512vnni", "avx512"])
def test_permutes_of_words_find_what_loads_find(arch: str) -> None:
    compare(LARGE, arch)


@needs_compiler
@needs_vnni
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fmt", "compute", "m"),
    [("e3m2.ch", "int8", 1), ("e2m3.g64", "int16", 1), ("e3m2.g64", "int8", 17), ("e2m3.ch", "int16", 17)],
)
def test_tables_of_64_codes_of_vbmi_emulated(fmt: str, compute: str, m: int) -> None:
    spec = spec_of(fmt, compute, (131,), 333)
    job, weights = Job(spec, "avx512vbmi", m), tensors_of(spec)
    text = BACKEND.emit(spec, job.chosen(), Target("cpu", "avx512vbmi")).text
    assert "at_once(" in text.split("namespace {", 1)[1]
    (run,) = build([job], emulated)
    (pieces,) = build([Job(spec, "avx512vnni", m, job.chosen())])
    for tokens in (1, 5, 19):
        x = torch.randn(tokens, spec.k, generator=torch.Generator().manual_seed(tokens))
        assert torch.equal(found := launch(run, spec, x, weights), launch(pieces, spec, x, weights))
        assert error(found, expected(spec, x, weights)) < 1e-5


def test_small_codebooks_are_permuted_where_machines_can_and_what_cannot_be_says_why() -> None:
    def first(fmt: str, arch: str, m: int = 1) -> int:
        found = BACKEND.schedules(spec_of(fmt, "int8", (4096,), 4096), Target("cpu", arch), m)
        return next(iter(found)).get("permute", 0)

    for m in M_CLASSES:
        assert (first("vq.d4.k16.s8", "avx512vnni", m), first("vq.d4.k16.s8", "avx2", m)) == (256, 64)
        assert first("vq.d4.k256.s8", "avx512vnni", m) == first("vq.d4.k256.s8", "avx512vbmi", m) == 256
        assert first("vq.d8.k256.r256.s8", "avx512vnni", m) == first("vq.d4.k256.s8", "avx2", m) == 0
    assert (first("vq.d4.k16.s8", "neondot"), first("vq.d4.k512.s8", "avx512vbmi")) == (0, 0)
    spec, permutes = spec_of("vq.d4.k256.s8", "int8", (64,), 64), Schedule(1, 64).with_extra(permute=256)
    assert "look up 64 centroids, not 256" in str(BACKEND.illegal(spec, permutes, Target("cpu", "avx2")))
    assert "has at most 64" in str(BACKEND.illegal(spec, permutes.with_extra(permute=64), Target("cpu", "avx2")))
    for arch in CPU_ISAS:
        offered = {s.get("permute", 0) for s in BACKEND.space(spec, Target("cpu", arch), 1)}
        assert offered == ({0, 256} if arch.startswith("avx512") else {0}), arch


def test_predictions_of_permutes_follow_centroids_and_tokens() -> None:
    def seconds(fmt: str, m: int, permute: int = 256) -> float:
        spec = spec_of(fmt, "int8", (4096,), 4096)
        found = [s for s in BACKEND.schedules(spec, Target("cpu", "avx512vnni"), m) if s.get("permute", 0) == permute]
        return BACKEND.predict(spec, found[0], Target("cpu", "avx512vnni"), m)

    assert seconds("vq.d8.k16.s8", 1) < seconds("vq.d8.k64.s8", 1) < seconds("vq.d8.k64.s8", 1, permute=0)
    assert seconds("vq.d4.k64.s8", 1) < seconds("vq.d4.k128.s8", 1) < seconds("vq.d4.k256.s8", 1)
    assert seconds("vq.d4.k256.s8", 1) < seconds("vq.d4.k256.s8", 1, permute=0)
    assert seconds("vq.d8.k256.s8", 1) > seconds("vq.d8.k256.s8", 1, permute=0)  # as many permutes as loads
    assert seconds("vq.d4.k16.s8", 1) > 4096 * 1024 / 13e9  # indices come from memory
    assert seconds("vq.d4.k16.s8", 1) < seconds("vq.d4.k16.s8", 8) < seconds("vq.d4.k16.s8", 64)
