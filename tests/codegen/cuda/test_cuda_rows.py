"""Kernels that round their own output, and kernels that read it: their source run on the CPU, against the reference."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from _cuda import DTYPES, Layer, spec_of

from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.cuda.backend import CudaBackend
from lowbit.codegen.cuda.emit import emit_text
from lowbit.codegen.cuda.emulate import Emulation
from lowbit.codegen.cuda.header import header
from lowbit.codegen.cuda.plan import Plan
from lowbit.codegen.cuda.space import candidates, illegal
from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.rounded import ROUNDED
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import parse_activation, scalar_format

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"),
    pytest.mark.real_kernels,
]

ONE = Schedule(1, 128, 128, 4, 4)
SOME = Schedule(8, 64, 64, 2, 3).with_extra(bulk=1)
PAIRS = Schedule(8, 128, 64, 4, 3).with_extra(bulk=1)
SHARED = Schedule(32, 128, 64, 8, 3).with_extra(row_warps=4, exact=1, bulk=1)
WARPGROUPS = Schedule(64, 128, 64, 8, 4).with_extra(row_warps=8, wgmma=1, bulk=1, resident=1)
BYTES = replace(WARPGROUPS, tile_k=128, stages=3)
FP8 = BYTES.with_extra(fp8=1)
GATED = ("bias", "silu_mul", "residual")


def writer(spec: KernelSpec, activation: str) -> KernelSpec:
    return replace(spec, out_activation=activation)


def reader(fmt: str, segments: tuple[int, ...], k: int, activation: str, out: str = "f32") -> KernelSpec:
    return replace(spec_of(fmt, segments, k, out=out, activation=activation), x_dtype=ROUNDED)


def run(layer: Layer, schedule: Schedule, x: torch.Tensor, residual: torch.Tensor | None, blocks: int) -> torch.Tensor:
    """The kernel's output, poisoned beforehand."""
    spec = layer.spec
    out = torch.full((x.shape[0], spec.n_out), float("nan"), dtype=DTYPES[spec.out_dtype])
    if spec.out_rows:
        out = torch.full((x.shape[0], spec.out_width), 0xFF, dtype=torch.uint8)
    Emulation(Plan(spec, schedule)).launch(x, layer.weight, layer.bias, residual, out, blocks)
    return out


def writes(spec: KernelSpec, schedule: Schedule, m: int, blocks: int = 3, seed: int = 0) -> None:
    """The rows are, to the bit, those of the numbers that the same kernel stores when it does not round."""
    layer = Layer.make(spec, seed)
    x, residual = layer.inputs(m)
    plain = replace(layer, spec=replace(spec, out_activation=""))
    numbers, scale = run(plain, schedule, x, residual, blocks), layer.weight.tensors.get("output_scale")
    assert spec.out_rows is not None
    found, want = run(layer, schedule, x, residual, blocks), spec.out_rows.write(numbers.float(), scale)
    used = spec.out_rows.level_bytes + 4 * spec.out_rows.scales
    assert torch.equal(found[:, :used], want[:, :used])
    assert int((spec.out_rows.read(found, scale)[0] != 0).sum()) > 0.1 * m * spec.n_out


def reads(spec: KernelSpec, schedule: Schedule, m: int, blocks: int = 3, seed: int = 0) -> None:
    layer = Layer.make(spec, seed)
    x, residual = layer.inputs(m)
    out, want = run(layer, schedule, x, residual, blocks), run_reference(spec, x, layer.weight, layer.bias, residual)
    assert float((out.float() - want).norm() / want.norm()) <= 4e-5


WRITERS: dict[str, tuple[KernelSpec, Schedule, int]] = {
    "gate and up": (
        writer(spec_of("int4.g64.asym", (136, 136), 320, "bf16", "bf16", GATED, "int8.g64"), "int8.g64"), PAIRS, 11,
    ),
    "a ragged group, one token": (writer(spec_of("int4.g128.sym", (200,), 576, "f16"), "int8.g128"), ONE, 1),
    "half a warp": (writer(spec_of("int4.ch.sym", (70,), 320, out="f16", epilogue=("bias",)), "int4.g16"), SOME, 5),
    "ranges": (writer(spec_of("int4.g64.sym", (150,), 200), "int4.g32.w2.c90.asym"), SOME, 9),
    "static": (writer(spec_of("int4.g64.sym", (100, 100), 320, epilogue=GATED), "int8.token.static"), SHARED, 40),
    "static groups": (writer(spec_of("int4.g64.sym", (100,), 320), "int8.g48.w1.static"), SOME, 3),
    "fp8": (writer(spec_of("e3m2.ch", (200,), 320, "bf16", "bf16"), "e4m3.g64"), SHARED, 9),
    "warpgroups": (
        writer(spec_of("int4.g64.asym", (136, 136), 320, "bf16", "bf16", GATED, "int8.g64"), "int8.g64"), BYTES, 70,
    ),
    "fixed shares": (
        replace(writer(spec_of("int4.g64.asym", (136, 136), 448, epilogue=GATED), "int4.g32.asym"), invariant=True),
        replace(WARPGROUPS, split_k=3), 70,
    ),
    "both sides": (
        replace(writer(spec_of("int4.g64.asym", (136, 136), 449, epilogue=GATED, activation="int8.g64"), "int8.g64"),
                x_dtype=ROUNDED),
        BYTES, 70,
    ),
    "warpgroups, static e2m1": (writer(spec_of("int4.g64.sym", (200,), 320), "e2m1.token.static"), WARPGROUPS, 70),
}  # fmt: skip
READERS: dict[str, tuple[KernelSpec, Schedule, int]] = {
    "groups": (reader("int4.g64.asym", (70, 30), 581, "int8.g64"), SOME, 5),
    "groups of both, one token": (reader("int4.g64.sym", (200,), 576, "int4.g128"), ONE, 1),
    "shared": (reader("int4.g128.sym", (136,), 320, "int8.g64"), replace(SHARED, extra=()).with_extra(row_warps=4), 37),
    "ranges, wide groups": (reader("int4.ch.asym", (100,), 200, "int4.g64.w1.asym"), ONE, 3),
    "static": (reader("int8.ch.sym", (100,), 200, "int8.token.static"), SOME, 3),
    "static groups": (reader("int4.g64.sym", (100,), 321, "int8.g64.static"), SOME, 9),
    "leading columns": (reader("int8.ch.sym", (100,), 200, "int8.token.w64"), SOME, 3),
    "one scale a token": (reader("int8.ch.sym", (100,), 200, "int8.token"), ONE, 2),
    "padded groups": (reader("int4.g48.sym", (64,), 200, "int8.g96"), SOME, 3),
    "as float16": (reader("e3m2.ch", (100,), 321, "int8.g64"), SOME, 5),
    "fp8 as float16": (reader("e2m1.g32.e8m0", (100,), 321, "e4m3.g32"), SOME, 5),
    "fp8, one token": (reader("e4m3.ch", (100,), 200, "e4m3.token.static"), ONE, 1),
    "shared float16, ranges": (reader("e2m3.g64", (136,), 321, "int4.g64.asym"), SHARED, 37),
    "fp8": (reader("e3m2.ch", (200,), 321, "e4m3.token.static"), FP8, 70),
    "warpgroups, static": (reader("int8.ch.sym", (130,), 449, "int8.token.static"), replace(BYTES, tile_m=8), 11),
    "warpgroups, groups": (reader("int4.g64.sym", (130,), 449, "int8.g64"), BYTES, 70),
    "warpgroups, fixed shares": (
        replace(reader("int4.g64.asym", (130,), 449, "int8.g64"), invariant=True),
        replace(BYTES, split_k=3),
        70,
    ),
    "warpgroups, float16": (reader("e3m2.ch", (130,), 449, "int8.g64"), WARPGROUPS, 70),
}
QUICK = ("half a warp", "warpgroups", "groups", "fp8 as float16", "warpgroups, groups")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in WRITERS])
def test_outputs_are_rounded(name: str) -> None:
    spec, schedule, m = WRITERS[name]
    writes(spec, schedule, m)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in READERS])
def test_rounded_activations_are_read(name: str) -> None:
    spec, schedule, m = READERS[name]
    reads(spec, schedule, m)


@pytest.mark.slow
def test_two_kernels_give_what_three_did() -> None:
    """gate and up, rounded, down: the same bits as with a kernel between that rounds."""
    first = writer(spec_of("int4.g64.sym", (136, 136), 192, out="bf16", epilogue=("silu_mul",)), "int8.g64")
    second = reader("int4.g64.asym", (70,), 136, "int8.g64")
    up, down = Layer.make(first), Layer.make(second)
    x, _ = up.inputs(11)
    rows = run(up, PAIRS, x, None, 3)
    numbers = run(replace(up, spec=replace(first, out_activation="")), PAIRS, x, None, 3)
    apart = replace(down, spec=replace(second, x_dtype="bf16"))
    assert torch.equal(run(down, SOME, rows, None, 3), run(apart, SOME, numbers, None, 3))


def test_other_kernels_have_nothing_of_it() -> None:
    """Their text is what it was before there were rows: measurements, caches and compiled kernels go by it."""
    spec = spec_of("int4.g64.sym", (64,), 128, activation="int8.g64")
    for schedule in (SOME, BYTES):
        text = emit_text(Plan(spec, schedule))
        assert not [word for word in ("LB_ROWS", "rows_out", "output_scale", "row_scale", '#include "') if word in text]
        rows = replace(spec, x_dtype=ROUNDED, out_activation="int8.g64")
        text = emit_text(Plan(rows, schedule))
        assert "LB_ROWS" not in text
        assert all(word in text for word in ("write_rows", "row_scale"))
    assert header("ptx", {}).count("#if __CUDA_ARCH__ >= 900") == 3


def draw(seed: int, reading: bool) -> tuple[KernelSpec, Schedule, int, int]:
    """A kernel of one side that may exist, with tokens and thread blocks to run it with."""
    r, target, backend = random.Random(seed), Target.parse("sm_90"), CudaBackend()
    while True:
        fmt = r.choice(
            ("int4.g64.sym", "int4.ch.asym", "int3.g32.asym", "int8.ch.sym", "int2.g64.fz", "e3m2.ch", "int6.g96.sym")
        )
        k, n, gated = r.choice((64, 100, 192, 257, 448, 581)), r.randrange(1, 300), r.random() < 0.4
        segments = (n, n) if gated else (n,)
        steps = tuple(s for s in GATED if (gated if s == "silu_mul" else r.random() < 0.3))
        activation = r.choice(("int8.g64", "int4.g32.w1", "int4.g128.asym", "int8.g16", "e4m3.g64", "int8.g96",
                               "int8.token.static", "int8.g48.static", "e4m3.token.static",
                               "int4.g64.c90"))  # fmt: skip
        if scalar_format(fmt).granularity.group > k:
            continue
        if reading:
            if backend.serves(scalar_format(fmt), activation):
                continue
            spec = replace(spec_of(fmt, segments, k, "bf16", "f32", steps, activation), x_dtype=ROUNDED)
        else:
            spec = writer(
                spec_of(fmt, segments, k, r.choice(("bf16", "f16")), r.choice(("bf16", "f16", "f32")), steps),
                activation,
            )
        if backend.supports(spec, target):
            continue
        m = r.choice((1, 2, 5, 8, 17, 33, 70))
        found = [s for s in candidates(spec, target, m) if s.warps <= 8]
        if found:
            return spec, r.choice(found), m, r.randrange(1, 9)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "reading"), [(s, reading) for reading in (False, True) for s in range(60)])
def test_odd_shapes(seed: int, reading: bool) -> None:
    spec, schedule, m, blocks = draw(seed, reading)
    (reads if reading else writes)(spec, schedule, m, blocks, seed)


def test_what_is_not_served_is_said() -> None:
    """Groups that no thread block holds; nibbles; vectors; tiles that cut groups."""
    backend, target = CudaBackend(), Target.parse("sm_80")
    gated = writer(spec_of("int4.g64.sym", (256, 256), 128, epilogue=("silu_mul",)), "int8.g128")
    assert "64 outputs of a token side by side" in str(backend.supports(gated, target))
    vectors = writer(spec_of("vq.d4.k256", (256,), 128), "int8.g64")
    assert "vector formats" in str(backend.supports(vectors, target))
    floats = writer(spec_of("int4.g64.sym", (256,), 128, "f32"), "int8.g64")
    assert "torch's" in str(backend.supports(floats, target))
    long = writer(spec_of("int4.g64.sym", (256,), 128), "int8.g128")
    assert "no whole groups of 128" in str(illegal(Plan(long, SOME), target))
    nibbles = Schedule(16, 128, 128, 4, 3).with_extra(row_warps=4, s4=1)
    assert "are bytes" in str(illegal(Plan(reader("int4.g64.sym", (64,), 128, "int4.g64"), nibbles), target))
    assert parse_activation("int8.g64").group == 64
