"""What nvcc makes of the kernels, inline assembly and all: their PTX, run on the CPU, against the reference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from _cuda import DTYPES, Layer, spec_of
from _ptx import Loaded, PtxError, Struct, TensorMap
from _ptx.nvcc import compile_ptx

from lowbit.codegen.cuda.any_plan import AnyPlan, make_plan
from lowbit.codegen.cuda.arguments import Args, fill, order_of
from lowbit.codegen.cuda.backend import CudaBackend
from lowbit.codegen.cuda.emit import emit_text
from lowbit.codegen.cuda.launch import core_spec
from lowbit.codegen.cuda.plan import PREPARE_THREADS
from lowbit.codegen.cuda.space import illegal
from lowbit.codegen.cuda.toolchain import find_nvcc
from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.qtensor import PackedWeight

pytestmark = [
    pytest.mark.skipif(find_nvcc() is None, reason="no nvcc, which makes PTX of CUDA C++"),
    pytest.mark.real_kernels,
]

# float16 operands put 4-bit integers on top of 1024, whose rounding errors are what the larger bound allows.
LIMIT = {"bf16": 4e-6, "f16": 4e-5}
ONE = Schedule(1, 64, 128, 4, 4)
SOME = Schedule(8, 64, 64, 2, 3)
BULK = SOME.with_extra(bulk=1)
SHARED = Schedule(32, 128, 64, 8, 3).with_extra(row_warps=4, exact=1, bulk=1)
WIDE = Schedule(64, 256, 64, 8, 3).with_extra(row_warps=8, exact=1)
WARPGROUPS = Schedule(64, 128, 64, 8, 4).with_extra(row_warps=8, wgmma=1, bulk=1, resident=1)
BYTES = replace(WARPGROUPS, tile_k=128, stages=3)
FP8 = BYTES.with_extra(fp8=1)
NIBBLES = Schedule(16, 128, 128, 4, 3).with_extra(row_warps=4, s4=1)
NEAR = Schedule(8, 64, 64, 4, 2)
GATED = ("bias", "silu_mul", "residual")


@dataclass(frozen=True)
class Case:
    """A kernel, and the number of tokens to run it with. blocks: along the matrix."""

    spec: KernelSpec
    schedule: Schedule
    m: int
    blocks: int = 3
    limit: float = 0.0

    @property
    def arch(self) -> str:
        """Bulk copies and warpgroups are Hopper's."""
        return "sm_90a" if self.schedule.get("bulk", 0) or self.schedule.get("wgmma", 0) else "sm_80"

    @property
    def bound(self) -> float:
        """Relative error that the spec's types explain."""
        rounding = 4e-3 if self.spec.out_dtype == "bf16" else 0.0
        return self.limit or LIMIT.get(self.spec.x_dtype, LIMIT["bf16"]) + rounding


CASES = {
    "one token": Case(spec_of("int4.g128.sym", (100,), 320, "f16"), ONE, 1),
    "padded groups": Case(spec_of("int3.g48.asym", (70, 30), 277, epilogue=("bias", "residual")), SOME, 5),
    "floats, bulk copies": Case(spec_of("e3m2.ch", (100,), 320, "f16"), BULK, 9),
    "int8 by int4": Case(spec_of("int4.g64.asym", (70, 30), 320, activation="int8.g64"), SOME, 5),
    "nibbles": Case(spec_of("int4.g64.sym", (70, 30), 261, "f16", activation="int4.g64"), NIBBLES, 11),
    "vectors": Case(spec_of("vq.d4.k256.r256", (70, 30), 205, epilogue=("bias",)), NEAR, 11),
    "warpgroups": Case(spec_of("int4.g64.asym", (136, 136), 197, epilogue=GATED), WARPGROUPS, 70),
    "warpgroups, int8": Case(spec_of("int4.g64.asym", (130,), 261, activation="int8.g64"), BYTES, 70),
}
HEAVY = {
    "two-level scales": Case(spec_of("nvfp4", (70, 30), 520, "f16"), Schedule(4, 64, 128, 4, 3), 3),
    "offsets": Case(spec_of("int2.g64.fz", (150,), 576), SHARED, 40),
    "gate and up": Case(spec_of("int4.g64.asym", (136, 136), 576, epilogue=GATED), replace(BULK, tile_n=128), 11),
    "many tokens": Case(spec_of("int4.g64.asym", (200, 100), 320, "bf16", "bf16", ("bias",)), WIDE, 70),
    "order of columns": Case(spec_of("int4.g64.sym.perm", (100,), 576, "f32", activation="int4.g64.w2.asym"), BULK, 5),
    "two digits": Case(spec_of("int4.g64.asym", (100,), 576, activation="int8.g64.w1x16"), BULK, 5),
    "static scales": Case(spec_of("int8.ch.asym", (100,), 200, activation="int8.token.static"), SOME, 3),
    "rounded to numbers": Case(spec_of("e2m1.g32.e8m0", (100,), 581, activation="e4m3.g32"), SOME, 5),
    "nibbles, ranges": Case(
        spec_of("int4.g64.sym.perm", (136, 136), 576, "f32", epilogue=GATED, activation="int4.g64.w2.asym"),
        replace(NIBBLES, warps=8),
        37,
    ),
    "halved": Case(spec_of("int4.g128.sym", (130,), 320), SHARED.with_extra(half=1), 33, limit=LIMIT["f16"]),
    "warpgroups, fp8": Case(spec_of("e3m2.ch", (200,), 320, activation="e4m3.token"), FP8, 70),
    "warpgroups, 256 tokens": Case(spec_of("int4.g128.sym", (200,), 320), replace(WARPGROUPS, tile_m=256), 300),
    "warpgroups, two digits": Case(spec_of("int4.g64.sym", (130,), 448, activation="int8.g64.w2x16"), BYTES, 70),
    "wide vectors": Case(spec_of("vq.d8.k4096.c4.o16v4k256", (100,), 320, "f16"), NEAR, 3),
    "vectors in memory": Case(spec_of("vq.d16.k256", (100,), 200, "f16"), NEAR.with_extra(far=1), 5),
    "column norms": Case(spec_of("vq.d8.k256.c3.o20v4k64.cn", (100,), 320), NEAR, 5, limit=3e-4),
}
ALL = CASES | HEAVY


class Machine:
    """A kernel's PTX, launched as a `Launcher` launches its cubin."""

    def __init__(self, case: Case) -> None:
        self.plan: AnyPlan = make_plan(core_spec(case.spec), case.schedule)
        text = compile_ptx(emit_text(self.plan), case.arch)
        self.kernel = Loaded(text, "lb_kernel")
        self.before = Loaded(text, "lb_prepare") if self.plan.prepared else None

    def run(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
        blocks: int,
        order: Sequence[int] | None = None,
        apart: Sequence[int] | None = None,
    ) -> None:
        """Raises PtxError, and AssertionError where counters are left behind."""
        plan, x = self.plan, order_of(self.plan, x, weight)
        m = x.shape[0]
        lines = plan.token_blocks(m) if plan.warpgroup else 1
        grid = (min(blocks, plan.units * lines), plan.token_blocks(m) // lines)
        part = torch.full((plan.part_floats(grid, m),), float("nan"))
        count = torch.zeros(plan.counts(grid, m), dtype=torch.int32)
        args = fill(Args(), x, weight, bias, residual, out)
        args.part, args.count = part.data_ptr(), count.data_ptr()
        held = [t for t in (x, *weight.tensors.values(), bias, residual, out, part, count) if t is not None]
        if self.before is not None:
            ready, scales = (torch.full((n,), 0xFF, dtype=torch.uint8) for n in plan.x_bytes(m))
            args.ready, args.x_scale = ready.data_ptr(), scales.data_ptr()
            held += [ready, scales]
            self.before.launch((m,), (PREPARE_THREADS,), 1024, [Struct(bytes(args), held)])
        given = Struct(bytes(args), held, {0: self._map(args.ready, m)} if plan.warpgroup else {})
        self.kernel.launch(grid, (plan.threads,), plan.shared_bytes, [given], order=order, apart=apart)
        assert not count.any()

    def _map(self, address: int, m: int) -> TensorMap:
        plan = self.plan
        width = plan.operand_bits // 8
        line = plan.spec.x_width if plan.reads_rows else plan.x_columns * width
        return TensorMap(address, (plan.x_columns, m), (line,), (128 // width, plan.schedule.tile_m), width, 128)


def error(case: Case, order: Sequence[int] | None = None, apart: bool = False, seed: int = 0) -> float:
    """||computed - reference|| / ||reference||; NaN when an element was not written."""
    layer, machine = Layer.make(case.spec, seed), Machine(case)
    x, residual = layer.inputs(case.m)
    out = torch.full((case.m, case.spec.n_out), float("nan"), dtype=DTYPES[case.spec.out_dtype])
    warps = list(range(machine.plan.threads // 32))[::-1] if apart else None
    machine.run(x, layer.weight, layer.bias, residual, out, case.blocks, order, warps)
    want = run_reference(case.spec, x, layer.weight, layer.bias, residual).float()
    return float((out.float() - want).norm() / want.norm())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in HEAVY)) for n in ALL])
def test_ptx_agrees_with_the_reference(name: str) -> None:
    assert error(ALL[name]) <= ALL[name].bound


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "one token")) for n in ALL])
def test_warps_need_not_go_in_step(name: str) -> None:
    """The last warp runs as far as it gets, then the one before it: what lacks a barrier fails."""
    assert error(ALL[name], apart=True) <= ALL[name].bound


def test_a_matrix_that_is_too_short_is_noticed() -> None:
    case = CASES["one token"]
    layer, machine = Layer.make(case.spec), Machine(case)
    short = dict(layer.weight.tensors)
    short["plane0"] = short["plane0"].view(-1)[: short["plane0"].numel() // 2].clone()
    x, _ = layer.inputs(1)
    out = torch.empty(1, case.spec.n_out)
    with pytest.raises(PtxError, match=r"lb_kernel, block .*, thread .*line .*cp.async.* outside of all buffers"):
        machine.run(x, replace(layer.weight, tensors=short), None, None, out, 3)


FORMATS = [f"int{b}.{g}.{s}" for b in range(1, 9) for g, s in (("ch", "sym"), ("g32", "asym"), ("g96", "sym"))]
FORMATS += ["int2.g64.fz", "int4.ch.fz", "e2m1.g32.e8m0", "nvfp4", "e2m3.g64", "e4m3.g128", "e5m2.ch", "e2m2.g48.f32",
            "int4.t.asym", "int5.g16.asym", "e3m1.g16", "int4.g100.asym"]  # fmt: skip


def draw(seed: int) -> Case:
    """A kernel that may exist."""
    r, backend = random.Random(seed), CudaBackend()
    while True:
        k, dtype, wide = r.choice((64, 100, 192, 257, 320)), r.choice(("bf16", "f16")), r.random() < 0.4
        row_warps = r.choice((1, 1, 2, 4))
        schedule = Schedule(
            r.choice((1, 2, 8, 16, 32)), r.choice((64, 128)), r.choice((64, 128)), row_warps * r.choice((1, 2)),
            r.choice((2, 3, 4)),
        ).with_extra(row_warps=row_warps, exact=r.randrange(2), bulk=r.randrange(2), resident=1)  # fmt: skip
        if wide:
            n = r.choice((64, 128, 192))
            schedule = replace(WARPGROUPS, tile_m=r.choice((8, 64, 128)), tile_n=n, warps=n // 16,
                               stages=r.choice((2, 3)), tile_k=r.choice((64, 128)))  # fmt: skip
            schedule = schedule.with_extra(row_warps=n // 16, fp8=r.randrange(2))
        activation = r.choice(("", "", "int8.token", "int8.g64", "int4.g32.w1", "e4m3.token", "int8.g64.w1x16"))
        segments = (r.randrange(1, 200),)
        spec = spec_of(r.choice(FORMATS), segments, k, dtype, "f32", ("bias",) * r.randrange(2), activation)
        target = Target.parse("sm_90")
        if spec.fmt.granularity.group > k or backend.supports(spec, target):
            continue
        if illegal(make_plan(spec, schedule), target) is None:  # type: ignore[arg-type]
            m = r.randrange(1, 2 * min(schedule.tile_m, 40) + 2)
            return Case(spec, schedule, m, r.randrange(1, 9), 5 * LIMIT.get(dtype, LIMIT["bf16"]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_odd_shapes(seed: int) -> None:
    assert error(draw(seed), apart=bool(seed % 2), seed=seed) <= draw(seed).bound
