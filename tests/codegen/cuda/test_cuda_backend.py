"""What the CUDA backend serves, which layout is chosen on which machine, and that its schedules exist."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _cuda import FRAGMENTS, spec_of

from lowbit.codegen.cuda.backend import CudaBackend
from lowbit.codegen.cuda.plan import Plan
from lowbit.codegen.cuda.space import illegal
from lowbit.codegen.cuda.toolchain import arch_of, find_nvcc, nvcc_version
from lowbit.codegen.schedule import M_CLASSES, Schedule
from lowbit.codegen.select import kernel_layout, layout_name
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import parse_format

BACKEND, HOPPER, AMPERE = CudaBackend(), Target.parse("sm_90"), Target.parse("sm_80")


@pytest.mark.parametrize(
    "fmt", ["int1.ch.sym", "int4.g128.asym", "int8.t.asym", "int2.g64.fz", "int3.g48.sym", "nvfp4", "mxfp4", "e5m2.ch"]
)
def test_scalar_formats_are_served(fmt: str) -> None:
    for x in ("bf16", "f16", "f32"):
        assert BACKEND.supports(spec_of(fmt, (100,), 320, x, x), HOPPER) is None


@pytest.mark.parametrize(
    ("fmt", "why"), [("vq.d4.k256.f32", "float16"), ("int4.g8.sym", "smaller than a step"), ("e6m1.ch", "no exact f16")]
)
def test_what_is_not_served_says_why(fmt: str, why: str) -> None:
    assert why in str(BACKEND.serves(parse_format(fmt)))


@pytest.mark.parametrize(
    ("fmt", "activation", "compute"),
    [("int8.ch.sym", "int8.token.w32x16", "int8"), ("int4.g64.sym.perm", "int4.g64.w2x16", "int8"),
     ("e3m2.ch", "e4m3.token", "float"), ("e2m1.g16.e4m3.t32", "int8.token.static", "float")],
)  # fmt: skip
def test_rounded_activations_are_served(fmt: str, activation: str, compute: str) -> None:
    spec = spec_of(fmt, (100,), 320, activation=activation)
    assert spec.compute == compute
    assert BACKEND.supports(spec, HOPPER) is None
    assert "multiple of 16" in str(BACKEND.serves(parse_format(fmt), "int8.g24"))
    assert "mantissa" in str(BACKEND.serves(parse_format(fmt), "e4m0.token"))


def test_groups_that_do_not_nest_are_refused() -> None:
    spec = spec_of("int4.g96.sym", (64,), 192, activation="int8.g64")
    assert BACKEND.supports(spec, HOPPER) is None  # all columns of both in steps of 32
    padded = spec_of("int4.g48.sym", (64,), 192, activation="int8.g64")
    assert "whole groups" in str(BACKEND.supports(padded, HOPPER))


def test_bytes_meet_warpgroups_on_hopper_only() -> None:
    """Four-bit products as such are emulated there; activations of four bits are multiplied as bytes."""
    spec = spec_of("int4.g64.sym.perm", (8192,), 8192, "bf16", "bf16", activation="int4.g64.w2")
    for target, warpgroups in ((HOPPER, 1), (AMPERE, 0)):
        best = next(iter(BACKEND.schedules(spec, target, 512)))
        assert best.get("wgmma", 0) == warpgroups
        text = BACKEND.emit(spec, best, target).text
        assert "BITS = 8;" in text
        assert ("k32.s32.s8.s8 " in text) == bool(warpgroups)
    fp8 = spec_of("e3m2.ch", (8192,), 8192, "bf16", "bf16", activation="e4m3.token")
    assert next(iter(BACKEND.schedules(fp8, HOPPER, 512))).get("fp8", 0)
    assert not any(s.get("fp8", 0) for s in BACKEND.schedules(fp8, AMPERE, 512))


def test_nibbles_meet_between_ampere_and_ada_only() -> None:
    """Where groups are long enough for one more operation a sum to pay; not where a side has no four bits."""
    spec = spec_of("int4.g128.sym.perm", (8192,), 8192, "bf16", "bf16", activation="int4.g128.w4.asym")
    for arch, has in (("sm_80", True), ("sm_89", True), ("sm_90", False)):
        target = Target.parse(arch)
        best = next(iter(BACKEND.schedules(spec, target, 512)))
        assert bool(best.get("s4", 0)) == has
        assert ("BITS = 4;" in BACKEND.emit(spec, best, target).text) == has
        assert has == any(s.get("s4", 0) for s in BACKEND.schedules(spec, target, 16))
    s4 = next(s for s in BACKEND.schedules(spec, AMPERE, 512) if s.get("s4", 0))
    assert "does not multiply" in str(BACKEND.illegal(spec, s4, HOPPER))
    for fmt, activation, why in (
        ("int4.g128.sym", "int8.g128", "activations of as many"),
        ("int4.g128.sym", "int4.g128.w2x16", "activations of as many"),
        ("int4.g128.asym", "int4.g128", "zero points"),
        ("int8.g128.sym", "int4.g128", "four bits"),
    ):
        assert why in str(BACKEND.illegal(spec_of(fmt, (64,), 256, activation=activation), s4, AMPERE))


def test_groups_smaller_than_a_step_of_bytes() -> None:
    """They are multiplied in halves, also where activations are FP8."""
    spec = spec_of("nvfp4", (512,), 1024, "bf16", "bf16", activation="e4m3.token")
    found = list(BACKEND.schedules(spec, HOPPER, 128))
    assert found
    assert not any(s.get("fp8", 0) for s in found)
    bytes_ = Schedule(64, 128, 128, 8, 3).with_extra(row_warps=8, wgmma=1, bulk=1, resident=1, fp8=1)
    assert "smaller than a step of 32" in str(BACKEND.illegal(spec, bytes_, HOPPER))


def test_specs_that_are_not_supported_say_why() -> None:
    spec = spec_of("int4.g64.sym", (64,), 128)
    assert "layout" in str(BACKEND.supports(replace(spec, layout=str(LAYOUTS["words"])), HOPPER))
    assert "rounded by their format" in str(BACKEND.supports(replace(spec, compute="int8"), HOPPER))
    assert "order" in str(BACKEND.supports(replace(spec, epilogue=("residual", "bias")), HOPPER))


def on_machine(monkeypatch: pytest.MonkeyPatch, *, nvcc: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("lowbit.codegen.cuda.backend.no_compiler", lambda: None if nvcc else "nothing compiles")


def test_layout_by_machine_and_format(monkeypatch: pytest.MonkeyPatch) -> None:
    int4 = parse_format("int4.g64.sym")
    on_machine(monkeypatch, nvcc=True)
    assert kernel_layout(int4, HOPPER) == FRAGMENTS
    assert layout_name(parse_format("vq.d4.k256"), HOPPER) == "vectors8"
    assert layout_name(parse_format("vq.d4.k256.f32"), HOPPER) == "vectors"
    assert layout_name(parse_format("int4.g8.sym"), HOPPER) == "words"
    assert layout_name(int4, HOPPER, "int8.token") == "fragments"
    on_machine(monkeypatch, nvcc=False)
    assert layout_name(int4, HOPPER) == "words"
    assert layout_name(int4, Target("cpu", "generic")) == "panel16"


def test_backends_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, nvcc=True)
    monkeypatch.setenv("LOWBIT_BACKENDS", "triton,reference")
    assert layout_name(parse_format("int4.g64.sym"), HOPPER) == "words"


@pytest.mark.parametrize("target", [HOPPER, AMPERE, Target.parse("sm_86"), Target.parse("sm_89")], ids=str)
@pytest.mark.parametrize("fmt", ["int4.g128.sym", "int8.g32.asym", "int2.g64.fz", "nvfp4"])
def test_every_token_class_has_legal_schedules(fmt: str, target: Target) -> None:
    for epilogue in ((), ("silu_mul",)):
        spec = spec_of(fmt, (1000, 1000) if epilogue else (1000,), 1056, "bf16", "bf16", epilogue)
        for m in M_CLASSES[::3]:
            found = list(BACKEND.schedules(spec, target, m))
            assert found
            assert all(illegal(Plan(spec, s), target) is None for s in found[:20])
            times = [BACKEND.predict(spec, s, target, m) for s in found[:20]]
            assert times == sorted(times)


def test_predictions_follow_bytes_and_tokens() -> None:
    def best(fmt: str, m: int) -> float:
        spec = spec_of(fmt, (8192,), 8192, "bf16", "bf16")
        return min(BACKEND.predict(spec, s, HOPPER, m) for s in BACKEND.schedules(spec, HOPPER, m))

    assert best("int2.g128.sym", 1) < best("int4.g128.sym", 1) < best("int8.g128.sym", 1)
    assert 9e-6 < best("int4.g128.sym", 1) < 16e-6  # 35 MB at 4.3 TB/s take 8 us
    assert best("int4.g128.sym", 16) < best("int4.g128.sym", 64) < best("int4.g128.sym", 512)


@pytest.mark.parametrize(
    ("schedule", "why"),
    [
        (Schedule(3, 64, 64, 4, 3), "no tiles"),
        (Schedule(8, 64, 64, 4, 1), "two stages"),
        (Schedule(8, 64, 64, 4, 3).with_extra(row_warps=3), "cannot share"),
        (Schedule(64, 64, 128, 16, 6), "shared memory"),
        (Schedule(64, 256, 64, 8, 3).with_extra(row_warps=8, resident=1), "registers"),
    ],
)
def test_schedules_that_cannot_run_are_refused(schedule: Schedule, why: str) -> None:
    spec = spec_of("int4.g128.asym", (512,), 1024)
    assert why in str(illegal(Plan(spec, schedule), HOPPER))
    with pytest.raises(KernelError, match="LB0460"):
        BACKEND.emit(spec, schedule, HOPPER)
    assert "bulk" in str(illegal(Plan(spec, Schedule(8, 64, 64, 4, 3).with_extra(bulk=1)), AMPERE))


def test_a_missing_nvcc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.codegen.cuda.toolchain.find_nvcc", lambda: None)
    with pytest.raises(KernelError, match="LB0463"):
        nvcc_version()


def test_architectures() -> None:
    assert [arch_of(Target.parse(t)) for t in ("sm_80", "sm_90", "sm_90a")] == ["80", "90a", "90a"]
    if find_nvcc():
        assert nvcc_version().startswith("nvcc release")
