"""CUTLASS kernels against the reference: PTX of the compiler, run on the CPU thread by thread."""

from __future__ import annotations

import pytest
import torch
from _cuda import Layer
from _cutlass import AMPERE, HOPPER, Compiled, compiled, mma, needs_dsl, spec_of, wgmma

from lowbit.codegen.check import Oracle, Sample
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import scalar_format
from lowbit.quantizers.qtensor import QTensor, pack

pytestmark = needs_dsl

EXACT, ROUNDED = 1e-6, {"f16": 3e-4, "bf16": 2.5e-3}
"""Relative errors: where scales meet sums in float32, and where weights times scales are rounded to 16 bits."""

Case = tuple[KernelSpec, Schedule, Target, int, float]
ALL = ("bias", "silu_mul", "residual")
CASES: dict[str, Case] = {
    # Zero points in groups, ragged segments, rows and tokens, two tiles of tokens, a last group that is shorter.
    "asym": (
        spec_of("int4.g64.asym", (100, 30), 200, "bf16", "bf16", ("bias", "residual")), wgmma(rows=128, warps=8),
        HOPPER, 37, 4e-3,
    ),
    "asym mma": (spec_of("int3.g32.asym", (65,), 96, "f16", "f16", ("bias",)), mma(rows=128), AMPERE, 40, 5e-4),
    # Gate and up, in one thread.
    "gated": (spec_of("int4.g64.sym", (80, 80), 128, "bf16", "bf16", ALL), wgmma(rows=128), HOPPER, 40, 4e-3),
    # Float offsets; packed columns with gaps; rows of x that are no whole pieces.
    "offset": (spec_of("int2.g48.fz", (64,), 150, "bf16", "f32"), wgmma(64, 128, 4, 4), HOPPER, 66, ROUNDED["bf16"]),
    "offset mma": (spec_of("int2.g64.fz", (64,), 192, "f16", "f32"), mma(stages=3), AMPERE, 9, ROUNDED["f16"]),
    # A scale for every 16 columns, in eight bits, and one for the matrix.
    "nvfp4": (spec_of("e2m1.g16.e4m3.t32", (70,), 136, "bf16", "f32"), wgmma(), HOPPER, 3, ROUNDED["bf16"]),
    # One scale a row: products are exact. Three planes; a zero point for all columns.
    "rows": (spec_of("int7.ch.asym", (61,), 70, "f16", "f32"), wgmma(), HOPPER, 33, EXACT),
    "table": (spec_of("iq4nl.g32", (64,), 128, "f16", "f32"), mma(), AMPERE, 9, ROUNDED["f16"]),
}  # fmt: skip
SLOW: dict[str, Case] = {
    f"{fmt} {x} {'wgmma' if hopper else 'mma'}": (
        spec_of(fmt, (64,), 192, x, "f32"), (wgmma if hopper else mma)(rows=128), HOPPER if hopper else AMPERE, 9,
        limit or ROUNDED[x],
    )
    for fmt, limit in {
        "int1.g64.sym": 0, "int2.g96.sym": 0, "int3.g128.asym": 0, "int4.g64.fz": 0, "int5.g48.sym": 0,
        "int6.t.sym": EXACT, "int7.g64.asym": 0, "int8.ch.asym": EXACT, "int8.g64.sym": 0, "e3m2.ch": EXACT,
        "e2m3.g64": 0, "e4m3.ch.f32": EXACT, "e5m2.g64": 0, "mxfp4": 0, "bcq2.g64": 0, "iq4nl.g32": 0,
        "int4.g128.asym.i8ch": 0, "int4.g64.asym.perm": 0,
    }.items()
    for x in ("f16", "bf16")
    for hopper in (False, True)
    if x == "bf16" or fmt not in ("mxfp4", "int4.g128.asym.i8ch")  # scales that float16 does not hold
}  # fmt: skip


def check(case: Case) -> Compiled:
    spec, schedule, target, m, limit = case
    found = compiled(spec, schedule, target)
    assert found.report.stack == 0
    assert found.error(m) < limit
    return found


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str) -> None:
    check(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_kind_of_format(name: str) -> None:
    check(SLOW[name])


@pytest.mark.parametrize("hopper", [True, False], ids=["wgmma", "mma"])
def test_warps_that_are_far_apart(hopper: bool) -> None:
    """More steps than the ring has stages, an odd number of them; whoever comes first waits for the others."""
    spec = spec_of("int4.g128.sym", (128,), 320, "f16", "f32")
    schedule = (wgmma if hopper else mma)(rows=128, warps=8, stages=3)
    kernel = compiled(spec, schedule, HOPPER if hopper else AMPERE)
    assert kernel.error(9, (4, 5, 6, 7, 0, 1, 2, 3) if hopper else (7, 6, 5, 4, 3, 2, 1, 0)) < ROUNDED["f16"]


@pytest.mark.slow
def test_the_largest_tile() -> None:
    spec = spec_of("int4.g128.sym", (300,), 320, "bf16", "bf16", ("bias",))
    check((spec, wgmma(128, 256, 8, 4), HOPPER, 150, 4e-3))


@pytest.mark.parametrize("name", ["rows", "table"])
def test_a_token_does_not_depend_on_others(name: str) -> None:
    """To the bit, in tiles that are full or nearly empty; nothing is written beyond the last token."""
    spec, schedule, target, *_ = CASES[name]
    kernel, layer = compiled(spec, schedule, target), Layer.make(spec)
    x, _ = layer.inputs(40)
    out = {m: torch.full((41, spec.n_out), 7.0) for m in (1, 33, 40)}
    for m, y in out.items():
        kernel.launch(x[:m].contiguous(), layer.weight, None, None, y[:m])
        assert bool((y[m:] == 7.0).all())
    assert torch.equal(out[40][:33], out[33][:33])
    assert torch.equal(out[40][:1], out[1][:1])


def test_the_check_before_use_takes_them() -> None:
    """The oracle with which a kernel is compared before it is used: its limit for 16 bits holds what rounding costs."""
    spec, schedule, target, *_ = CASES["asym"]
    oracle = Oracle(Sample(spec, Target("ref", "ref")), 5)
    out = oracle.output()
    compiled(spec, schedule, target).launch(*oracle.operands, out)
    error = float((out.float() - oracle.want).square().mean().sqrt()) / oracle.size
    assert error < 2**-8


def test_every_code_and_every_place() -> None:
    """A matrix with one activation at a time: each weight comes out as itself, wherever it lies."""
    spec, schedule, target, *_ = CASES["rows"]
    fmt, (n,), k = scalar_format(spec.format), spec.segments, spec.k
    codes = torch.arange(n * k).reshape(n, k) % 2**fmt.bits
    zero = (torch.arange(n) * 5 % 128).to(torch.uint8)[:, None]
    q = QTensor(fmt, codes.to(torch.uint8), torch.ones(n, 1, dtype=fmt.scale_dtype), zero)
    out = torch.full((k, n), float("nan"))
    compiled(spec, schedule, target).launch(torch.eye(k).half(), pack([q], spec.layout_), None, None, out)
    assert torch.equal(out, q.dequantize().T)
