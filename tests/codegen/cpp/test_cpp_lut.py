"""Kernels that look sums of activations up, or add them up as 16-bit numbers: the same bits as dot products."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from _cpp import BACKEND, Job, build, check_same, error, launch, spec_of, tensors_of

from lowbit.codegen.cpp.lut_plan import LOW_BITS, OFFSET, blocks_per_sum, factors, lut_problem, lut_steps
from lowbit.codegen.invariant import one_for_all
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS, plane_bits
from lowbit.compiler.ir.target import Target, isa_runs_here

AVX2 = Target("cpu", "avx2")
needs_avx2 = pytest.mark.skipif(
    BACKEND.available(AVX2) is not None or not isa_runs_here("avx2"), reason=str(BACKEND.available(AVX2))
)
EVERY = ("bias", "silu_mul", "residual")
# Format, products, segments, K, tokens and panels of a tile, more of the spec. Between them: every width and symmetry,
# one and two digits, whole and odd groups, several chunks to a group and one, a last chunk of every length, ragged
# rows, pairs of panels, activations of their own format, one of them with two rounds.
CASES: list[tuple[str, str, tuple[int, ...], int, int, int, dict[str, Any]]] = [
    ("int1.g128.asym", "int16", (257,), 601, 1, 2, {}),
    ("int1.g64.sym", "int8", (33,), 576, 2, 1, {"x_dtype": "bf16", "out_dtype": "bf16"}),
    ("int3.g32.asym", "int16", (17,), 100, 1, 4, {}),
    ("int2.g64.asym", "int8", (83, 83), 900, 1, 2, {"epilogue": EVERY, "out_dtype": "f16"}),
    ("int2.ch.fz", "int16", (131, 17), 577, 1, 1, {"epilogue": ("residual", "bias")}),
    ("int2.g48.sym", "int8", (40,), 160, 4, 1, {"activation": "int8.token.w32x16"}),
    ("int3.t.sym", "int8", (300,), 416, 2, 2, {"activation": "int4.token"}),
]
QUICK = 3
TOKENS = (0, 1, 2, 3, 5)


def schedule(height: int, panels: int, **extra: int) -> Schedule:
    return Schedule(height, 16 * panels).with_extra(lut=1, **extra)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_nibbles_of_the_packed_layout_are_indices_of_tables(bits: int) -> None:
    """Packed by the layout itself, so that only its definition says which columns a nibble belongs to."""
    codes = torch.randint(0, 2**bits, (16, 32), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    x, widths = torch.randint(-128, 128, (32,), generator=torch.Generator().manual_seed(9)), plane_bits(bits)
    planes, sums = LAYOUTS["panel16"].pack(codes, bits), torch.zeros(16, dtype=torch.int64)
    for step, table in product(lut_steps(LAYOUTS["panel16"], bits), range(4)):
        width = widths[step.plane]
        taken = x[[column + table for column in step.columns]]
        entries = (torch.tensor(factors(width)) * taken[:, None]).sum(0) + OFFSET
        assert int(entries.min()) >= 0
        assert int(entries.max()) >> LOW_BITS < 2**LOW_BITS
        index = planes[step.plane].reshape(-1, 16, 4)[step.vector, :, table] >> 4 * step.half & 15
        sums += (entries[index.long()] - OFFSET + (width - 1) * taken.sum()) << 2 * step.plane
    assert torch.equal(sums, (codes.long() * x).sum(1))


def test_bytes_and_words_hold_what_is_added_up() -> None:
    for width in (1, 2):
        most = (1 << LOW_BITS) - 1
        assert 4 * width * blocks_per_sum(width) * most <= 255
        assert 8 * width * 4 * 2 * OFFSET <= 2**16
    with pytest.raises(KernelError, match="LB0412"):
        lut_steps(LAYOUTS["words"].with_container(8), 2)


@needs_avx2
@pytest.mark.parametrize(
    "cases", [CASES[:QUICK], pytest.param(CASES[QUICK:], marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_results_are_those_of_dot_products_to_the_bit(cases: list[Any]) -> None:
    jobs = []
    for fmt, compute, segments, k, height, panels, rest in cases:
        spec = spec_of(fmt, compute, segments, k, **rest)
        products = Schedule(1, 32 if "silu_mul" in spec.epilogue else 16).with_extra(shorts=1)
        jobs += [Job(spec, "avx2", 1, schedule(height, panels, prefetch=1024)), Job(spec, "avx2", 1, products)]
    runs = build(jobs)
    for job, run, products_run in zip(jobs[::2], runs[::2], runs[1::2], strict=True):
        check_same(job.spec, run, products_run, TOKENS, threads=3)


@needs_avx2
def test_extreme_codes_and_activations_sum_exactly() -> None:
    """Digits of -128 and 127 everywhere, beside codes at both ends: sums of bytes and of words reach their bounds, be
    they of entries or of products."""
    formats, plain = {1: ("lut",), 3: ("lut", "shorts"), 5: ("shorts",)}, Schedule(1, 16)
    specs = {bits: spec_of(f"int{bits}.ch.asym.f32", "int16", (16,), 256) for bits in formats}
    extras = [(bits, {kind: 1}) for bits, kinds in formats.items() for kind in kinds] + [(bits, {}) for bits in formats]
    runs = build([Job(specs[bits], "avx2", 1, plain.with_extra(**extra)) for bits, extra in extras])
    wanted = {bits: run for (bits, extra), run in zip(extras, runs, strict=True) if not extra}
    for (bits, extra), run in zip(extras, runs, strict=True):
        for weight, x in extremes(specs[bits]):
            got = launch(run, specs[bits], x, [weight])
            assert torch.equal(got, launch(wanted[bits], specs[bits], x, [weight])), (bits, extra)
            assert error(got, x.double() @ weight.codes.double().T) < 1e-6


def extremes(spec: KernelSpec) -> Iterator[tuple[Any, torch.Tensor]]:
    """A weight and one token: sums of digits as far from zero as there are."""
    weight, top = tensors_of(spec)[0], 2**spec.fmt.bits - 1
    weight.scale.fill_(1.0)
    weight.zero.zero_()
    for value in (32639.0, -32639.0, 128.0, -128.0):
        x = torch.full((1, spec.k), value)
        x[:, ::128] = 32639.0  # the largest of a chunk: numbers are steps
        for codes in (torch.full((16, spec.k), top), torch.randint(0, top + 1, (16, spec.k))):
            weight.codes.copy_(codes)
            yield weight, x


def test_single_bits_are_looked_up_by_default_where_dot_products_take_several_instructions() -> None:
    def chosen(fmt: str, target: Target, m: int) -> int:
        spec = spec_of(fmt, "int16", (4096,), 4096)
        return next(iter(BACKEND.schedules(spec, target, m))).get("lut", 0)

    for fmt, m in product(("int1.g128.sym", "int1.ch.sym"), (1, 16)):
        assert chosen(fmt, AVX2, m) == (m == 1)
        assert not chosen(fmt, Target("cpu", "avx2vnni"), m)
    assert not any(chosen(fmt, AVX2, 1) for fmt in ("int2.g64.asym", "int3.g128.asym", "int4.g128.asym"))
    one = spec_of("int1.ch.sym", "int16", (4096,), 4096, invariant=True)
    assert not one_for_all(one, AVX2, [BACKEND])[0][2].get("lut", 0)  # tables of many tokens leave the caches
    spec = spec_of("int2.g64.asym", "int16", (4096,), 4096)
    tried = [s for s in BACKEND.space(spec, AVX2, 1) if BACKEND.illegal(spec, s, AVX2) is None]
    assert {s.get("lut", 0) for s in tried} == {0, 1}  # left to measurements


def test_where_sums_are_not_looked_up_a_line_says_why() -> None:
    assert "wider" in str(lut_problem(spec_of("int4.g64.sym", "int8", (64,), 64)))
    assert "wider" in str(lut_problem(spec_of("int6.g64.sym", "int16", (64,), 64)))
    assert "columns end" in str(lut_problem(spec_of("int2.g16.sym", "int8", (64,), 64)))
    assert "integer products" in str(lut_problem(spec_of("int2.g64.sym", "float", (64,), 64)))
    assert "integer products" in str(lut_problem(spec_of("vq.d4.k256.s8", "int8", (64,), 64)))
    spec = spec_of("int2.g64.sym", "int8", (64,), 64)
    assert BACKEND.illegal(spec, schedule(1, 1), AVX2) is None
    assert "instructions of" in str(BACKEND.illegal(spec, schedule(1, 1), Target("cpu", "avx512vnni")))
    assert "nor split" in str(BACKEND.illegal(spec, schedule(1, 1, accs=2), AVX2))
    assert "nor split" in str(BACKEND.illegal(spec, schedule(1, 1, buffered=1), AVX2))
    shorts = Schedule(1, 16).with_extra(shorts=1)
    assert BACKEND.illegal(spec, shorts, AVX2) is None
    assert "made of such pairs" in str(BACKEND.illegal(spec, shorts, Target("cpu", "avx512vnni")))
    assert "made of such pairs" in str(BACKEND.illegal(spec_of("int8.g64.sym", "int8", (64,), 64), shorts, AVX2))
    with pytest.raises(KernelError, match="LB0412"):
        BACKEND.emit(spec_of("int4.g64.sym", "int8", (64,), 64), schedule(1, 1), AVX2)
