"""Ways to dot products that AVX2 has none of one instruction for: 16-bit sums, words, signs given to activations.

They are the same integers, so results are those of plain dot products to the bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _cpp import BACKEND, Job, build, check_same, error, launch, spec_of, tensors_of

from lowbit.codegen.cpp.plan import magnitudes
from lowbit.codegen.schedule import Schedule
from lowbit.compiler.ir.target import Target, isa_runs_here
from lowbit.quantizers.formats import parse_format

AVX2 = Target("cpu", "avx2")
needs_avx2 = pytest.mark.skipif(
    BACKEND.available(AVX2) is not None or not isa_runs_here("avx2"), reason=str(BACKEND.available(AVX2))
)
EVERY = ("bias", "silu_mul", "residual")
ONE, FEW, MANY = Schedule(1, 16), Schedule(2, 32), Schedule(4, 32).with_extra(buffered=1, tokens=8)
LOADED = Schedule(2, 16).with_extra(vectors=8)
SHORTS, WORDS, DIGITS, MADE, SIGNS = {"shorts": 1}, {"words": 1}, {"words": 2}, {"words": 3}, {"signs": 1}
# Format, products, segments, K, tiles, the ways that run them, more of the spec. Between them: sums of 2, 4 and 8 pairs
# and of more than a pass has, integers of a byte and of two digits, one and two digits an activation, magnitudes of one
# and of two digits, sorted as words and as sums, whole and odd groups, several scales in a block, a last chunk of every
# length, ragged rows; and codebooks of bytes, loaded and permuted.
CASES: list[tuple[str, str, tuple[int, ...], int, Schedule, tuple[dict[str, int], ...], dict[str, Any]]] = [
    ("int4.g128.asym", "int8", (257,), 601, MANY, (SHORTS,), {}),
    ("int8.ch.sym", "int8", (83, 83), 900, MANY, (WORDS,), {"epilogue": EVERY, "out_dtype": "f16"}),
    ("e3m2.g64", "int8", (33,), 333, FEW, (SIGNS, SIGNS | SHORTS, DIGITS, MADE), {}),
    ("e3m2.ch", "int16", (70,), 160, MANY, (DIGITS, MADE), {}),
    ("e3m2.g64", "int16", (33,), 333, ONE, (DIGITS, MADE), {}),
    ("mxfp6_e3m2", "int16", (40, 40), 300, FEW, (DIGITS, MADE), {"epilogue": EVERY, "out_dtype": "bf16"}),
    ("int6.g48.asym", "int16", (40,), 160, MANY, (SHORTS, WORDS), {"x_dtype": "bf16", "out_dtype": "bf16"}),
    ("int2.g64.fz", "int16", (131, 17), 577, MANY, (SHORTS, WORDS), {"epilogue": ("residual", "bias")}),
    ("int8.g64.asym", "int16", (100,), 200, FEW, (WORDS,), {}),
    ("e2m3.ch", "int8", (65, 65), 130, FEW, (SIGNS, SIGNS | SHORTS), {"epilogue": EVERY}),
    ("int3.g48.asym", "int8", (40,), 160, MANY, (SHORTS,), {}),
    ("nvfp4", "int16", (64,), 160, Schedule(2, 16).with_extra(buffered=1, tokens=8), (WORDS,), {}),
    ("int7.ch.sym", "int8", (300,), 416, MANY, (WORDS,), {"activation": "int8.token.w32x16"}),
    ("vq.d6.k4096.c4.o2pv4k4096.s8", "int8", (97,), 133, LOADED, (WORDS,), {"epilogue": ("bias", "residual")}),
    ("vq.d3.k16.rn.s8", "int8", (41,), 67, Schedule(1, 48).with_extra(permute=64), (WORDS,), {}),
    ("vq.d12.k512.r16.s8", "int16", (150, 17), 201, MANY, (WORDS,), {"x_dtype": "f16"}),
]
QUICK = 5
TOKENS = (0, 1, 2, 3, 5, 19)


@needs_avx2
@pytest.mark.parametrize(
    "cases", [CASES[:QUICK], pytest.param(CASES[QUICK:], marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_results_are_those_of_dot_products_to_the_bit(cases: list[Any]) -> None:
    jobs = []
    for fmt, compute, segments, k, tiles, ways, rest in cases:
        spec = spec_of(fmt, compute, segments, k, "avx2", **rest)
        jobs += [(Job(spec, "avx2", 1, tiles.with_extra(**way)), way) for way in ({}, *ways)]
    for job, way in jobs:
        assert BACKEND.illegal(job.spec, job.schedule, AVX2) is None, (job.spec.format, way)
    plain: Any = None
    for (job, way), run in zip(jobs, build([job for job, _ in jobs]), strict=True):
        plain = plain if way else run
        check_same(job.spec, run, plain, TOKENS, threads=3)


@needs_avx2
def test_weights_packed_for_other_machines_give_the_same_to_the_bit() -> None:
    """In planes, as AVX-512 has them, which AVX2 has not: kernels read every layout of panels."""
    specs = [(spec_of("e3m2.g64", "int8", (33,), 333, arch), FEW.with_extra(**SIGNS)) for arch in ("avx512", "avx2")]
    specs += [(spec_of("int3.g48.fz", "int16", (33,), 333, arch), MANY) for arch in ("avx512", "avx2")]
    runs = build([Job(spec, "avx2", 1, tiles) for spec, tiles in specs])
    for (planes, _), (whole, _), first, second in zip(specs[::2], specs[1::2], runs[::2], runs[1::2], strict=True):
        assert planes.layout != whole.layout
        weights, x = tensors_of(planes), torch.randn(5, 333, generator=torch.Generator().manual_seed(0))
        assert torch.equal(launch(first, planes, x, weights), launch(second, whole, x, weights))


@needs_avx2
def test_extreme_codes_and_activations_sum_exactly() -> None:
    """The largest magnitudes and activations everywhere: sums of 16 and of 32 bits reach their bounds."""
    cases = [("e3m2.ch.f32", "int8", FEW, SIGNS | SHORTS), ("int4.ch.sym.f32", "int8", MANY, SHORTS)]
    cases += [("int8.ch.sym.f32", "int16", MANY, WORDS), ("e3m2.ch.f32", "int16", MANY, DIGITS)]
    cases += [
        ("e3m2.ch.f32", "int16", FEW, MADE),
        ("e3m2.ch.f32", "int16", ONE, MADE),
        ("e3m2.ch.f32", "int8", MANY, MADE),
    ]
    jobs = [Job(spec_of(f, c, (32,), 256, "avx2"), "avx2", 1, tiles.with_extra(**way)) for f, c, tiles, way in cases]
    for job, run in zip(jobs, build(jobs), strict=True):
        (weight,) = tensors_of(job.spec)
        for code in range(2 ** parse_format(job.spec.format).bits):
            weight.codes.fill_(code)
            for sign in (1.0, -1.0):
                x = torch.full((4, 256), sign)
                got, want = launch(run, job.spec, x, [weight]), x.double() @ weight.dequantize().double().T
                assert error(got, want) < 1e-6 or not want.any(), (job.spec.format, code)
                assert want.any() or not got.any()


def test_magnitudes_make_the_integers_of_a_format() -> None:
    for fmt, digits in (("e3m2.ch", 2), ("e2m3.ch", 1)):
        spec = spec_of(fmt, "int8", (16,), 64)
        found, levels = magnitudes(spec), spec.integer_levels
        assert found is not None
        assert levels is not None
        made = [*found.low, *(i << found.shift for i in found.high)]
        assert (*made, *(-i for i in made)) == levels.integers
        assert len(found.digits) == digits
        assert max(map(max, found.digits)) < 128
    # Digits that may be -128 have no opposite.
    assert magnitudes(spec_of("e3m2.ch", "int16", (16,), 64)) is None
    assert magnitudes(spec_of("e3m2.ch", "int8", (16,), 64, activation="int8.token.c90")) is None
    assert magnitudes(spec_of("int6.ch.sym", "int8", (16,), 64)) is None


def test_what_an_instruction_set_lacks_is_said() -> None:
    e3m2, int8 = spec_of("e3m2.ch", "int8", (64,), 64), spec_of("int8.ch.sym", "int8", (64,), 64)
    few = Schedule(1, 16)
    assert "given to activations" in str(BACKEND.illegal(e3m2, few.with_extra(**SIGNS), Target("cpu", "avx512")))
    assert "given to activations" in str(BACKEND.illegal(int8, few.with_extra(**SIGNS), AVX2))
    for way in (DIGITS, {"buffered": 1, "tokens": 8}):
        assert "given to activations" in str(BACKEND.illegal(e3m2, few.with_extra(**SIGNS, **way), AVX2))
    assert "given to activations" in str(BACKEND.illegal(e3m2, few.with_extra(**SIGNS, **MADE), AVX2))
    assert "made of magnitudes" in str(BACKEND.illegal(int8, few.with_extra(**MADE), AVX2))
    assert "made of magnitudes" in str(BACKEND.illegal(e3m2, few.with_extra(**MADE), Target("cpu", "avx512")))
    vector = spec_of("vq.d8.k256.s8", "int8", (64,), 64)
    assert "multiplied as words" in str(BACKEND.illegal(vector, LOADED.with_extra(**WORDS), Target("cpu", "avx2vnni")))
    assert "looks up bytes" in str(BACKEND.illegal(e3m2, few.with_extra(**WORDS), AVX2))
    assert "dot products" in str(BACKEND.illegal(int8, few.with_extra(**WORDS), Target("cpu", "avx512vnni")))
    assert "products of words" in str(BACKEND.illegal(int8, few.with_extra(**WORDS), Target("cpu", "neon")))
    assert BACKEND.illegal(int8, few.with_extra(**WORDS), AVX2) is None
