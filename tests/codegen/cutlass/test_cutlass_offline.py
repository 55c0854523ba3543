"""Kernels compile for GPUs that are not here: matrix instructions, no spills, few instructions for a weight."""

from __future__ import annotations

import pytest
from _cutlass import AMPERE, BACKEND, HOPPER, compiled, mma, needs_dsl, spec_of, wgmma

from lowbit.codegen.cutlass.model import instructions
from lowbit.codegen.cutlass.plan import Plan
from lowbit.codegen.schedule import Schedule
from lowbit.compiler.ir.target import Target

pytestmark = needs_dsl


def check(fmt: str, x: str, schedule: Schedule, target: Target) -> None:
    spec = spec_of(fmt, (4096,), 4096, x, x)
    assert BACKEND.illegal(spec, schedule, target) is None
    plan, found = Plan(spec, schedule), compiled(spec, schedule, target).report
    assert found.stack == 0
    assert found.count("LDL", "STL") == 0
    assert found.registers <= 65536 // (plan.threads * plan.resident)
    assert (found.artifact.threads, found.artifact.shared) == (plan.threads, plan.shared_bytes)
    if plan.warpgroup:  # two steps of four instructions for every part
        assert found.count("HGMMA") == 8 * plan.parts
        assert found.count("FENCE.VIEW.ASYNC")  # copies are seen by what reads asynchronously
    else:
        assert found.count("HMMA.16816.F32") == 4 * plan.parts * schedule.tile_m // 8
    assert found.count("LDGSTS.E.BYPASS.128")
    # The whole kernel: two steps of its loop, another's decoding before that, and a dozen for each output of a thread.
    outputs = schedule.tile_m * schedule.tile_n / plan.threads
    assert sum(found.sass.values()) < 3.2 * instructions(plan) + 12 * outputs + 300


def test_hopper() -> None:
    check("int4.g128.sym", "bf16", wgmma(128, 256, 8, 4), HOPPER)


def test_ampere() -> None:
    check("int4.g128.sym", "f16", mma(64, 128, 4, 3), AMPERE)


@pytest.mark.slow
@pytest.mark.parametrize("m", [64, 4096])
@pytest.mark.parametrize("target", [AMPERE, HOPPER, Target("cuda", "sm_89")], ids=str)
@pytest.mark.parametrize(
    "fmt",
    ["int4.g64.asym", "int2.g64.fz", "int8.ch.sym", "int3.g64.asym", "e2m1.g16.e4m3.t32", "iq4nl.g32", "bcq2.g64"],
)
def test_what_is_chosen(fmt: str, target: Target, m: int) -> None:
    spec = spec_of(fmt, (4096,), 4096, "bf16", "bf16")
    schedule = next(iter(BACKEND.schedules(spec, target, m)))
    assert compiled(spec, schedule, target).report.stack == 0, schedule
