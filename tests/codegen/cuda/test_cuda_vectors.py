"""Kernels of vector formats: their own source, run lane by lane, against the reference; what is served, what is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from _cuda import Layer, spec_of

from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.cuda.backend import CudaBackend
from lowbit.codegen.cuda.vector_plan import VectorPlan
from lowbit.codegen.cuda.vector_space import illegal_vectors
from lowbit.codegen.schedule import M_CLASSES, Schedule
from lowbit.codegen.select import layout_name
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.backend import TritonBackend
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import parse_format

pytestmark = [pytest.mark.real_kernels]

BACKEND, HOPPER = CudaBackend(), Target.parse("sm_90")
NEAR = Schedule(8, 64, 64, 4, 2)
FAR = NEAR.with_extra(far=1)
EXACT = 4e-6  # activations of 16 bits, and centroids, are multiplied as they are
ROUNDED = 3e-4  # column norms meet activations, which are rounded to float16 again

CASES: dict[str, tuple[KernelSpec, Schedule, int, float]] = {
    "one row a centroid": (spec_of("vq.d8.k4096", (200,), 320, "f16"), NEAR, 3, EXACT),
    "two phases, residual, siblings": (
        spec_of("vq.d4.k256.r256", (70, 30), 333, epilogue=("bias", "residual")),
        NEAR,
        11,
        EXACT,
    ),
    "padded rows, row norms, gate and up": (
        spec_of("vq.d6.k64.rn", (100, 100), 200, epilogue=("bias", "silu_mul", "residual")),
        NEAR,
        5,
        EXACT,
    ),
    "column groups, outliers, column norms": (
        spec_of("vq.d8.k256.c3.o20v4k64.cn", (100,), 320),
        NEAR,
        5,
        ROUNDED,
    ),
    "two rows, codebook in memory": (spec_of("vq.d16.k256", (100,), 200, "f16"), FAR, 5, EXACT),
    "halves of rows from memory": (spec_of("vq.d4.k256.r64.c2", (100,), 200, "f16"), FAR, 5, EXACT),
    "four phases": (spec_of("vq.d2.k256", (100,), 200), replace(NEAR, tile_m=16), 12, EXACT),
}
HEAVY = ("padded rows, row norms, gate and up", "halves of rows from memory", "four phases")


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in HEAVY)) for n in CASES])
def test_kernels_agree_with_the_reference(name: str) -> None:
    spec, schedule, m, limit = CASES[name]
    assert Layer.make(spec).error(schedule, m) <= limit


@pytest.mark.parametrize(
    ("fmt", "far"), [("vq.d4.k256", False), ("vq.d8.k4096.r256", False), ("vq.d8.k65536", True), ("vq.d4.k8192", True)]
)
def test_codebooks_stay_where_they_fit(fmt: str, far: bool) -> None:
    spec = spec_of(fmt, (4096,), 4096, "bf16", "bf16")
    assert BACKEND.supports(spec, HOPPER) is None
    for m in M_CLASSES[::3]:
        best = next(iter(BACKEND.schedules(spec, HOPPER, m)))
        assert bool(best.get("far", 0)) == far
        assert illegal_vectors(VectorPlan(spec, best), HOPPER) is None
    assert "memory" in str(illegal_vectors(VectorPlan(spec, best.with_extra(far=0)), HOPPER)) or not far


def test_what_is_not_served_says_why() -> None:
    assert "float16" in str(BACKEND.supports(spec_of("vq.d4.k256.f32", (64,), 64), HOPPER))
    assert "bytes with a scale" in str(BACKEND.supports(spec_of("vq.d4.k256.s8", (64,), 64), HOPPER))
    assert BACKEND.serves(parse_format("vq.d4.k256.s8")) is not None
    assert "along the inputs" in str(BACKEND.supports(spec_of("vq.d4.k256.in", (64,), 64), HOPPER))
    assert layout_name(parse_format("vq.d4.k256.s8"), HOPPER) == TritonBackend.vector_layout  # `triton` serves it
    assert "column norms" in str(BACKEND.supports(spec_of("vq.d4.k256.cn", (64,), 64, "f32", "f32"), HOPPER))
    plan = VectorPlan(spec_of("vq.d6.k64", (96,), 64, "f16"), FAR)
    assert "one piece" in str(illegal_vectors(plan, HOPPER))
