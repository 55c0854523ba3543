"""Kernels compiled by TVM against the definition of the format, on odd shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
import torch
from _cpp import DTYPES, error, expected, finished, launch, tensors_of
from _tvm import BACKEND, BUFFERED, FEW, HOST, ONE, build, needs_tvm, spec_of

from lowbit.codegen.backend import Launcher
from lowbit.codegen.check import check_kernel
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import ALIASES, catalog
from lowbit.quantizers.weights import pack_weights

pytestmark = needs_tvm
TOKENS = (0, 1, 3, 17)
KINDS = (BUFFERED, ONE, BUFFERED, FEW)
SHAPES = [((33,), 100), ((17, 20), 160), ((1,), 33), ((40, 5, 16), 200)]
GRAINS = ["ch", "g48", "t", "g32", "g16"]
EVERY = ("bias", "silu_mul", "residual")
LIMITS = {"f32": 3e-6, "bf16": 2**-5, "f16": 2**-8}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def cases(turn: int) -> list[tuple[KernelSpec, Schedule]]:
    """Every scalar format, with granularities, shapes and schedules dealt out; `turn` deals the schedules anew."""
    names = [str(fmt) for fmt in catalog() if BACKEND.serves(fmt) is None]
    grains, shapes, kinds = cycle(GRAINS), cycle(SHAPES), cycle(KINDS[turn:] + KINDS[:turn])
    found = []
    for name, grain, (segments, k) in zip(names, grains, shapes, strict=False):
        fits = grain if not grain.startswith("g") or int(grain[1:]) <= k else "ch"
        found.append(spec_of(name.replace(".ch", f".{fits}"), segments, k))
    found += [spec_of(text, (24, 17), 100) for text in ALIASES.values()]
    return list(zip(found, kinds, strict=False))


def check(run: Launcher, spec: KernelSpec) -> None:
    """One launcher at every token count, with everything its epilogue wants."""
    weights = tensors_of(spec)
    for m in TOKENS:
        rng = torch.Generator().manual_seed(m)
        x = torch.randn(m, spec.k, generator=rng).to(DTYPES[spec.x_dtype])
        bias = torch.randn(sum(spec.segments), generator=rng)
        residual = torch.randn(m, spec.n_out, generator=rng).to(DTYPES[spec.out_dtype])
        got = launch(run, spec, x, weights, bias, residual)
        want = finished(spec, expected(spec, x, weights), bias, residual)
        assert error(got, want) < LIMITS[spec.out_dtype], (spec.format, m)


def test_every_scalar_format() -> None:
    for spec, schedule in cases(0):
        check(build(spec, schedule), spec)


@pytest.mark.slow
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_every_scalar_format_with_the_other_schedules(turn: int) -> None:
    for spec, schedule in cases(turn):
        check(build(spec, schedule), spec)


@pytest.mark.parametrize("schedule", [ONE, BUFFERED], ids=["direct", "buffered"])
@pytest.mark.parametrize(
    ("x", "out", "epilogue"),
    [("bf16", "bf16", EVERY), ("f16", "f16", ("silu_mul",)), ("f32", "bf16", ("residual", "bias"))],
)
def test_dtypes_and_epilogues(schedule: Schedule, x: str, out: str, epilogue: tuple[str, ...]) -> None:
    spec = spec_of("int4.g32.asym", (40, 40), 100, x_dtype=x, out_dtype=out, epilogue=epilogue)
    check(build(spec, schedule), spec)


@pytest.mark.parametrize("schedule", [ONE, BUFFERED], ids=["direct", "buffered"])
def test_outputs_in_bfloat16_are_rounded_as_torch_does(schedule: Schedule) -> None:
    """To the bit where sums are exact: weights pick out columns of numbers that are ties, infinite or none."""
    spec = spec_of("int2.ch.asym.f32", (64,), 64, out_dtype="bf16")
    weight = tensors_of(spec)[0]
    weight.codes.copy_(torch.eye(64))
    weight.scale.fill_(1.0)
    weight.zero.zero_()
    x = torch.randn(2, 64)
    x[0, :3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])
    got = launch(build(spec, schedule), spec, x, [weight])
    assert torch.equal(got, x.bfloat16())
    x[1, 5] = float("nan")
    got = launch(build(spec, schedule), spec, x, [weight])
    assert got[1].isnan().all()
    assert torch.equal(got[0], x[0].bfloat16())


@pytest.mark.parametrize("layout", ["whole16", pytest.param("signs16", marks=pytest.mark.slow)])
def test_codes_that_lie_whole(layout: str) -> None:
    for fmt, schedule in [("int5.g48.asym", FEW), ("int6.g32.sym", BUFFERED)]:
        spec = spec_of(fmt, (33,), 160, layout)
        check(build(spec, schedule), spec)


@pytest.mark.parametrize(
    ("fmt", "rest"),
    [
        ("int3.g64.asym.perm", {}),
        ("bcq3.g64", {}),
        ("int4.g64.asym.i8ch", {"compute": "int16"}),
        ("int4.g64.sym", {"rotate": 64, "norm_eps": 1e-5}),
        ("int8.ch.sym", {"compute": "int8", "activation": "int8.token"}),
        ("int4.g64.sym.perm", {"compute": "int8", "activation": "int4.g64.w2"}),
        ("bcq2.g64", {"compute": "int8", "activation": "int8.token"}),
    ],
)
def test_what_happens_before_the_kernel(fmt: str, rest: dict[str, object]) -> None:
    """Orders, terms, norms, rotations and rounding: compared with the reference, which does what the spec means."""
    spec = spec_of(fmt, (24, 17), 192, **rest)
    run = build(spec, FEW if len(rest) % 2 else BUFFERED)
    for m in (1, 3, 17):
        check_kernel(spec, run, HOST, m)


def test_instructions_that_every_machine_has() -> None:
    """No conversion of half floats, no fused multiply-add."""
    for fmt, schedule in [("e4m3.g32", ONE), ("int5.g48.sym", BUFFERED)]:
        spec = spec_of(fmt, (33,), 160)
        check(build(spec, schedule, Target("cpu", "generic")), spec)


@pytest.mark.parametrize("schedule", [ONE, FEW, BUFFERED], ids=["one", "few", "buffered"])
def test_threads_and_other_tokens_change_no_bit(schedule: Schedule, threads: Callable[[int], None]) -> None:
    spec = spec_of("int3.g48.fz", (600, 300), 160, epilogue=("bias",), invariant=True)
    run, weights, bias = build(spec, schedule), tensors_of(spec), torch.randn(900)
    x = torch.randn(23, spec.k)
    threads(1)
    want = launch(run, spec, x, weights, bias)
    assert error(want, finished(spec, expected(spec, x, weights), bias, want)) < LIMITS["f32"]
    for count in (1, 2, 3):
        threads(count)
        for rows in (slice(0, 23), slice(0, 1), slice(5, 12), slice(22, 23)):
            assert torch.equal(launch(run, spec, x[rows], weights, bias), want[rows]), (count, rows)


def test_more_tokens_than_one_call_takes() -> None:
    spec = spec_of("int4.g32.sym", (17,), 64, epilogue=("residual",))
    run, weights, x = build(spec, Schedule(6, 16).with_extra(buffered=1)), tensors_of(spec), torch.randn(1100, 64)
    residual = torch.randn(1100, 17)
    want = expected(spec, x, weights) + residual
    assert error(launch(run, spec, x, weights, None, residual), want) < LIMITS["f32"]


def test_nothing_is_written_outside_and_nothing_spreads() -> None:
    """Infinite and missing numbers reach only their own token."""
    spec = spec_of("int4.g32.asym", (17,), 100)
    weights = tensors_of(spec)
    for schedule in (FEW, BUFFERED):
        run, x = build(spec, schedule), torch.randn(4, 100)
        clean = launch(run, spec, x, weights)
        x[1, 40], x[2, 99] = float("nan"), float("inf")
        got = launch(run, spec, x, weights)
        assert torch.equal(got[[0, 3]], clean[[0, 3]])
        assert not torch.isfinite(got[[1, 2]]).any()


def test_wrong_operands_are_refused() -> None:
    spec = spec_of("int4.g32.sym", (17,), 64, epilogue=("bias",))
    run, weight, x = build(spec, ONE), pack_weights(tensors_of(spec), spec.layout_), torch.randn(2, 64)
    for bias, out in [(None, torch.empty(2, 17)), (torch.zeros(17), torch.empty(2, 17).half())]:
        with pytest.raises(KernelError, match="LB0415"):
            run(x, weight, bias, None, out)
    with pytest.raises(KernelError, match="LB0415"):
        run(x[:, :32].contiguous(), weight, torch.zeros(17), None, torch.empty(2, 17))
