"""The kernels' own source, compiled for the CPU and run lane by lane, against the reference."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from _cuda import FRAGMENTS, Layer, spec_of

from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.cuda.backend import CudaBackend
from lowbit.codegen.cuda.emulate import Emulation
from lowbit.codegen.cuda.launch import core_spec, finish_in_torch, split_float
from lowbit.codegen.cuda.plan import Plan
from lowbit.codegen.cuda.space import illegal
from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import scalar_format
from lowbit.quantizers.qtensor import QTensor, pack
from lowbit.quantizers.weights import pack_weights, random_weight

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"),
    pytest.mark.real_kernels,
]

# Emulated sums are rounded to float32 once a matrix instruction. float16 operands put 4-bit integers on top of 1024,
# whose rounding errors are what the larger bound allows.
LIMIT = {"bf16": 4e-6, "f16": 4e-5}
ONE = Schedule(1, 64, 128, 4, 4)
SOME = Schedule(8, 64, 64, 2, 3).with_extra(bulk=1)
SHARED = Schedule(32, 128, 64, 8, 3).with_extra(row_warps=4, exact=1, bulk=1)
WIDE = Schedule(64, 256, 64, 8, 3).with_extra(row_warps=8, exact=1)
WARPGROUPS = Schedule(64, 128, 64, 8, 4).with_extra(row_warps=8, wgmma=1, bulk=1, resident=1)
BYTES = replace(WARPGROUPS, tile_k=128, stages=3)
FP8 = BYTES.with_extra(fp8=1)
NIBBLES = Schedule(16, 128, 128, 4, 3).with_extra(row_warps=4, s4=1)
GATED = ("bias", "silu_mul", "residual")

CASES: dict[str, tuple[KernelSpec, Schedule, int]] = {
    "one token": (spec_of("int4.g128.sym", (200,), 576, "f16"), ONE, 1),
    "padded groups, odd columns": (spec_of("int3.g48.asym", (70, 30), 501, epilogue=("bias", "residual")), SOME, 5),
    "gate and up": (
        spec_of("int4.g64.asym", (136, 136), 576, epilogue=GATED),
        Schedule(8, 128, 64, 4, 3).with_extra(bulk=1),
        11,
    ),
    "two-level scales": (spec_of("nvfp4", (70, 30), 520, "f16"), Schedule(4, 64, 128, 4, 3), 3),
    "shared activations, offsets": (spec_of("int2.g64.fz", (150,), 576), SHARED, 40),
    "many tokens": (spec_of("int4.g64.asym", (200, 100), 320, "bf16", "bf16", ("bias",)), WIDE, 70),
    "warpgroups": (spec_of("int4.g64.asym", (200, 100), 581, epilogue=("bias", "residual")), WARPGROUPS, 70),
    "sums for whole rows": (spec_of("e3m2.ch", (100,), 320, "f16"), SOME, 9),
    "W4A8, one group": (spec_of("int4.ch.sym", (200,), 576, "f16", activation="int8.token.c90"), ONE, 3),
    "W4A8, zero points, groups of both": (
        spec_of("int4.g64.asym", (70, 30), 576, epilogue=("bias", "residual"), activation="int8.g64"),
        SOME,
        5,
    ),
    "mixed blocks": (spec_of("int4.g64.sym.perm", (100,), 576, "f32", activation="int4.g64.w2"), SOME, 5),
    "ranges": (spec_of("int4.g64.sym.perm", (100,), 576, "f32", activation="int4.g64.w2.asym"), SOME, 5),
    "ranges of tokens": (spec_of("int4.ch.asym", (100,), 581, activation="int4.token.c90.asym"), ONE, 3),
    "four bits by four": (spec_of("int4.g64.sym", (70, 30), 581, "f16", activation="int4.g64"), NIBBLES, 11),
    "ranges of four bits": (
        spec_of("int4.g64.sym.perm", (136, 136), 576, "f32", epilogue=GATED, activation="int4.g64.w2.asym"),
        replace(NIBBLES, warps=8),
        37,
    ),
    "two bits by three, one scale": (spec_of("int2.ch.sym", (100,), 200, activation="int3.token"), NIBBLES, 5),
    "leading columns of four bits": (
        spec_of("int3.g128.sym", (64,), 704, activation="int4.token.w64.asym"),
        replace(NIBBLES, tile_m=32),
        33,
    ),
    "columns of two digits": (spec_of("int4.g64.asym", (100,), 576, activation="int4.g64.w1x16"), SOME, 5),
    "leading columns": (spec_of("int8.ch.sym", (100,), 200, "f32", activation="int8.token.w32x16"), ONE, 3),
    "leading columns of one digit": (spec_of("int8.ch.asym", (70, 30), 320, activation="int8.token.w96"), SOME, 3),
    "numbers and two digits": (spec_of("e3m2.g64", (100,), 320, activation="int8.token.w32x16"), SOME, 5),
    "padded groups of two digits": (spec_of("int4.g48.sym", (64,), 200, activation="int8.g96.w1x16"), SOME, 3),
    "all columns of two digits": (spec_of("int4.g64.sym", (64,), 64, activation="int8.g64.w1x16"), ONE, 1),
    "two digits, warpgroups": (spec_of("int4.g64.sym", (130,), 448, activation="int8.g64.w2x16"), BYTES, 70),
    "static scales": (spec_of("int8.ch.asym", (100,), 200, activation="int8.token.static"), SOME, 3),
    "rounded to numbers": (spec_of("e2m1.g32.e8m0", (100,), 581, activation="e4m3.g32"), SOME, 5),
    "W4A8, warpgroups": (
        spec_of("int4.g64.asym", (136, 136), 581, epilogue=GATED, activation="int8.g64"),
        BYTES,
        70,
    ),
    "W6A8, warpgroups": (spec_of("e3m2.ch", (200,), 576, activation="e4m3.token"), FP8, 70),
    "groups over units, 256 tokens": (spec_of("int4.g128.sym", (200,), 320), replace(WARPGROUPS, tile_m=256), 300),
}
HEAVY = ("static scales", "groups over units, 256 tokens", "leading columns of one digit",
         "padded groups of two digits", "all columns of two digits", "two digits, warpgroups")  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in HEAVY)) for n in CASES])
def test_kernels_agree_with_the_reference(name: str) -> None:
    spec, schedule, m = CASES[name]
    limit = LIMIT.get(spec.x_dtype, LIMIT["bf16"]) + (4e-3 if spec.out_dtype == "bf16" else 0)
    assert Layer.make(spec).error(schedule, m) <= limit


def test_any_number_and_order_of_thread_blocks() -> None:
    """Whoever comes last finishes a tile, and gets the same bits: parts are added in their own order."""
    layer = Layer.make(spec_of("int4.g64.sym", (200,), 900))
    emulation = Emulation(Plan(layer.spec, Schedule(2, 64, 64, 2, 3)))
    x, _ = layer.inputs(3)
    want = run_reference(layer.spec, x, layer.weight)
    for blocks in (1, 5, 13, 60):
        found = []
        for seed in range(3):
            order = list(range(min(blocks, emulation.plan.units) * 2))
            random.Random(seed).shuffle(order)
            out = torch.full_like(want, float("nan"))
            emulation.launch(x, layer.weight, None, None, out, blocks, order)
            found.append(out)
        assert float((found[0] - want).norm() / want.norm()) <= LIMIT["bf16"]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("schedule", [SOME, BYTES], ids=["mma", "wgmma"])
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_integers_are_exact(bits: int, schedule: Schedule) -> None:
    """With scales of 1 the output is the product of two integer matrices, whoever adds which part of it."""
    fmt, rng = scalar_format(f"int{bits}.ch.sym"), torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (130, 448), generator=rng).to(torch.uint8)
    q = QTensor(fmt, codes, torch.ones(130, 1, dtype=fmt.scale_dtype))
    x = torch.randint(-127, 128, (11, 448), generator=rng)
    x[:, 7] = 127
    spec = spec_of(str(fmt), (130,), 448, activation="int8.token")
    out = torch.full((11, 130), float("nan"))
    Emulation(Plan(spec, schedule)).launch(x.bfloat16(), pack([q], FRAGMENTS), None, None, out, 5)
    assert torch.equal(out.long(), x @ (codes.long() - 2 ** (bits - 1)).T)


def test_all_blocks_of_a_pipeline_get_the_same_bits() -> None:
    """More tiles than blocks, and fewer: whole waves, a shared line, any order."""
    layer = Layer.make(spec_of("int4.g64.sym", (200,), 320))
    emulation = Emulation(Plan(layer.spec, replace(WARPGROUPS, tile_m=8, stages=2)))
    x, _ = layer.inputs(20)
    want = run_reference(layer.spec, x, layer.weight)
    for blocks in (1, 4, 6, 13):
        found = []
        for seed in range(2):
            order = list(range(blocks))
            random.Random(seed).shuffle(order)
            out = torch.full_like(want, float("nan"))
            emulation.launch(x, layer.weight, None, None, out, blocks, order)
            found.append(out)
        assert float((found[0] - want).norm() / want.norm()) <= LIMIT["bf16"]
        assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
def test_every_scale_of_a_byte(kind: str) -> None:
    """A row for every byte that is a number; one weight of 1 and one activation of 1 give the scale itself."""
    fmt = scalar_format(f"int4.ch.sym.{kind}")
    codes = torch.full((256, 64), 8, dtype=torch.uint8)
    codes[:, 5] = 9
    scale = torch.arange(256, dtype=torch.uint8).view(fmt.scale_dtype)[:, None]
    scale = torch.where(scale.float().isfinite(), scale.float(), torch.ones(())).to(fmt.scale_dtype)
    spec = spec_of(str(fmt), (256,), 64)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 5] = 1.0
    out = torch.empty(1, 256)
    Emulation(Plan(spec, ONE)).launch(x, pack([QTensor(fmt, codes, scale)], FRAGMENTS), None, None, out)
    assert torch.equal(out[0], scale.float()[:, 0])


def test_float32_activations_are_three_of_bfloat16() -> None:
    layer = Layer.make(spec_of("int4.g64.sym", (136, 136), 320, "f32", "f32", GATED))
    x, residual = layer.inputs(3)
    limbs = split_float(x)
    assert torch.equal(limbs.view(3, 3, 320).double().sum(0), x.double())
    plan = Plan(core_spec(layer.spec), Schedule(16, 64, 64, 2, 3))
    y = torch.empty(9, 272)
    Emulation(plan).launch(limbs, layer.weight, None, None, y)
    out = torch.empty(3, 136)
    finish_in_torch(layer.spec, y, layer.bias, residual, out)
    want = run_reference(layer.spec, x, layer.weight, layer.bias, residual)
    assert float((out - want).norm() / want.norm()) <= LIMIT["bf16"]


def test_a_copy_out_of_bounds_is_an_error() -> None:
    spec = spec_of("int4.g64.sym", (64,), 128)
    short = pack_weights([random_weight(spec.weight_format, 64, 64, torch.Generator())], FRAGMENTS)
    with pytest.raises(KernelError, match=r"LB0461.*outside its tensor"):
        Emulation(Plan(spec, ONE)).launch(torch.zeros(1, 128).bfloat16(), short, None, None, torch.empty(1, 64))


BACKEND = CudaBackend()
FORMATS = [f"int{b}.{g}.{s}" for b in range(1, 9) for g, s in (("ch", "sym"), ("g32", "asym"), ("g96", "sym"))]
FORMATS += ["int2.g64.fz", "int4.ch.fz", "int8.g128.fz", "e2m1.g32.e8m0", "nvfp4", "e3m2.ch", "e2m3.g64", "e4m3.g128",
            "e5m2.ch", "e2m2.g48.f32", "int4.t.asym", "int5.g16.asym", "e3m1.g16", "int4.g100.asym", "int3.g20.sym",
            "int6.g128.asym.f32"]  # fmt: skip


NIBBLE_FORMATS = [f"int{b}.{g}.sym" for b in range(1, 5) for g in ("ch", "g64", "g96", "g128")]


def draw(seed: int, s4: bool = False) -> tuple[KernelSpec, Schedule, int, int]:
    """A kernel that may exist, and tokens and thread blocks to run it with. s4: of nibbles."""
    r, target = random.Random(seed), Target.parse("sm_80" if s4 else "sm_90")
    while True:
        fmt, k = r.choice(NIBBLE_FORMATS if s4 else FORMATS), r.choice((64, 100, 128, 192, 257, 320, 448, 581))
        gated, dtype = r.random() < 0.25, r.choice(("bf16", "f16"))
        n = r.randrange(1, 200)
        segments = (n, n) if gated else (n, *[r.randrange(1, 100) for _ in range(r.randrange(3))])
        steps = tuple(s for s in ("bias", "silu_mul", "residual") if (gated if s == "silu_mul" else r.random() < 0.3))
        if scalar_format(fmt).granularity.group > k:
            continue
        row_warps = r.choice((1, 1, 2, 4, 8))
        schedule = Schedule(
            r.choice((1, 2, 4, 8, 16, 32, 64)), r.choice((64, 128, 256)), r.choice((64, 128)),
            row_warps * r.choice((1, 2, 4)), r.choice((2, 3, 4)),
        ).with_extra(row_warps=row_warps, exact=r.randrange(2), bulk=r.randrange(2), resident=1)  # fmt: skip
        activation = r.choice(("", "", "int8.token", "int8.g64", "int4.g32.w1", "int4.g96", "e4m3.token", "e5m2.g64",
                               "int8.g64.w1x16", "int8.token.w32x16"))  # fmt: skip
        if r.random() < 0.3:
            n = r.choice((64, 128, 192))
            schedule = replace(
                WARPGROUPS, tile_m=r.choice((8, 64, 128)), tile_n=n, warps=n // 16, stages=r.choice((2, 3, 4)),
                tile_k=r.choice((64, 128)),
            ).with_extra(row_warps=n // 16, fp8=r.randrange(2))  # fmt: skip
        if s4:
            schedule = replace(schedule, tile_k=128).with_extra(exact=0, bulk=0, s4=1)
            activation = r.choice(("int4.token", "int3.token.w64.asym", "int4.g64.c90", "int4.g128.w1", "int2.g64.asym",
                                   "int4.g64.w2.asym", "int3.g192.w1.asym", "int4.g64.static"))  # fmt: skip
        if r.random() < 0.1 and "perm" not in fmt:
            fmt += ".perm" if fmt.startswith("int") and "fz" not in fmt else ""
        if activation and BACKEND.serves(scalar_format(fmt), activation):
            continue
        spec = spec_of(fmt, segments, k, r.choice((dtype, "f32")) if activation else dtype, "f32", steps, activation)
        if BACKEND.supports(spec, target):
            continue
        if illegal(Plan(spec, schedule), target) is None:
            return spec, schedule, r.randrange(1, 2 * schedule.tile_m + 2), r.randrange(1, 9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "s4"), [(seed, s4) for s4, count in ((False, 320), (True, 80)) for seed in range(count)]
)
def test_odd_shapes(seed: int, s4: bool) -> None:
    spec, schedule, m, blocks = draw(seed, s4)
    # Row scales of cancelling rows, and integers above 1024 in float16, leave a larger relative error in short sums.
    assert (
        Layer.make(spec, seed).error(schedule, m, blocks)
        <= 5 * LIMIT[spec.x_dtype if spec.x_dtype in LIMIT else "bf16"]
    )
