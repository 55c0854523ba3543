"""Batch-invariant kernels: to the bit, a token's result does not depend on how many others are in the call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _cpp import Job, build, tensors_of
from _cpp import spec_of as cpp_spec
from _cuda import Layer
from _cuda import spec_of as cuda_spec

from lowbit.codegen import load_backend
from lowbit.codegen.backend import Launcher
from lowbit.codegen.check import sample_weight
from lowbit.codegen.cuda.emulate import Emulation
from lowbit.codegen.cuda.launch import core_spec
from lowbit.codegen.cuda.plan import Plan
from lowbit.codegen.cuda.space import illegal
from lowbit.codegen.invariant import one_for_all
from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.select import candidates
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.interpret import Call, run_interpreted
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target, host_target
from lowbit.quantizers.weights import pack_weights

TOKENS = (*range(1, 18), 64, 129)
H200 = Target("cuda", "sm_90")
CPP = [("int4.g64.sym", "int16"), ("int3.g48.asym", "int16"), ("e3m2.ch", "int8"),
       ("vq.d4.k16.r4", "float"), ("vq.d6.k16.s8", "int16")]  # fmt: skip


def chosen(spec: KernelSpec, backend: str, target: Target) -> Schedule:
    return one_for_all(spec, target, [load_backend(backend)])[0][2]


def same_bits(run: Launcher, spec: KernelSpec, weight: object) -> None:
    """Every prefix of a batch, and each token on its own, gives the rows of the whole batch."""
    x = torch.randn(TOKENS[-1], spec.k, generator=torch.Generator().manual_seed(3))
    outs = {}
    for m in TOKENS:
        outs[m] = torch.full((m, spec.n_out), float("nan"))
        run(x[:m].contiguous(), weight, None, None, outs[m])  # type: ignore[arg-type]
    assert all(torch.equal(out, outs[TOKENS[-1]][:m]) for m, out in outs.items())
    alone = torch.empty(1, spec.n_out)
    for i in (5, 63, 128):
        run(x[i : i + 1].contiguous(), weight, None, None, alone)  # type: ignore[arg-type]
        assert torch.equal(alone[0], outs[TOKENS[-1]][i])


def test_cpp() -> None:
    specs = [cpp_spec(fmt, compute, (80,), 320, invariant=True) for fmt, compute in CPP]
    jobs = [Job(s, host_target().arch, 1, chosen(s, "cpp", host_target())) for s in specs]
    for spec, run in zip(specs, build(jobs), strict=True):
        same_bits(run, spec, pack_weights(tensors_of(spec), spec.layout_))


def test_the_reference_too() -> None:
    spec = cpp_spec("int4.g64.sym", "float", (80,), 320, invariant=True)
    run = load_backend("reference").load(None, spec, Schedule())  # type: ignore[arg-type]
    same_bits(run, spec, pack_weights(tensors_of(spec), spec.layout_))


@pytest.mark.parametrize("fmt", ["int4.g64.sym", pytest.param("e3m2.ch", marks=pytest.mark.slow)])
def test_cuda_emulated(fmt: str) -> None:
    """The choice itself, and another that shares tiles among thread blocks."""
    layer = Layer.make(replace(cuda_spec(fmt, (96,), 320), invariant=True))
    x = torch.randn(33, 320, generator=torch.Generator().manual_seed(3)).bfloat16()
    for schedule in (chosen(layer.spec, "cuda", H200), Schedule(8, 64, 64, 4, 3).with_extra(row_warps=1, resident=1)):
        emulation = Emulation(Plan(core_spec(layer.spec), schedule))
        outs = {m: torch.full((m, 96), float("nan")) for m in (1, 2, 9, 33)}
        for m, out in outs.items():
            emulation.launch(x[:m].contiguous(), layer.weight, None, None, out, 3, None)
        assert all(torch.equal(out, outs[33][:m]) for m, out in outs.items())


WARPGROUPS = Schedule(8, 64, 64, 4, 3, split_k=2).with_extra(row_warps=4, wgmma=1, bulk=1, resident=1)
GATED = ("silu_mul", "residual")
PIPELINES = {
    "shares": (cuda_spec("int4.g64.asym", (96,), 320, "f16"), WARPGROUPS),
    "whole tiles": (cuda_spec("int4.g128.sym", (96,), 320), replace(WARPGROUPS, tile_m=64, split_k=1)),
    "float16 operands, gate and up": (
        cuda_spec("e3m2.ch", (70, 70), 320, epilogue=GATED),
        replace(WARPGROUPS, tile_n=128, warps=8, split_k=3).with_extra(row_warps=8, half=1),
    ),
    "bytes": (
        cuda_spec("int4.g64.asym", (96,), 448, activation="int8.g64.w1x16"),
        replace(WARPGROUPS, tile_k=128, split_k=3),
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "shares")) for n in PIPELINES])
def test_pipelines_of_warpgroups(name: str) -> None:
    """The cuts of a tile are its own: as many thread blocks as a call of some size has leave the same bits."""
    spec, schedule = PIPELINES[name]
    layer = Layer.make(replace(spec, invariant=True))
    plan = Plan(core_spec(layer.spec), schedule)
    assert illegal(plan, H200) is None
    assert illegal(replace(plan, spec=spec), H200) is not None or schedule.split_k == 1
    emulation, (x, residual) = Emulation(plan), layer.inputs(TOKENS[-1])
    outs = {m: torch.full((m, spec.n_out), float("nan")) for m in TOKENS}
    for m, out in outs.items():
        rest = None if residual is None else residual[:m].contiguous()
        emulation.launch(x[:m].contiguous(), layer.weight, layer.bias, rest, out, 1 + m % 7)
    assert all(torch.equal(out, outs[TOKENS[-1]][:m]) for m, out in outs.items())
    want = run_reference(layer.spec, x, layer.weight, layer.bias, residual)
    assert float((outs[TOKENS[-1]] - want).norm() / want.norm()) < 1e-4


def test_warpgroups_are_chosen_where_they_win() -> None:
    spec = replace(cuda_spec("int4.g128.sym", (8192,), 8192, "bf16", "bf16"), invariant=True)
    backend = load_backend("cuda")
    best = chosen(spec, "cuda", H200)
    assert best.get("wgmma", 0)
    others = [s for s in backend.schedules(spec, H200, 512) if not s.get("wgmma", 0)]
    assert backend.predict(spec, best, H200, 512) < min(backend.predict(spec, s, H200, 512) for s in others)


def test_triton_interpreted() -> None:
    calls, tokens = [], (1, 3, 17)
    for fmt in ("int4.g64.sym", "int3.g48.asym"):
        spec = KernelSpec((64,), 192, fmt, str(LAYOUTS["words"]), "float", "bf16", "f32", invariant=True)
        weight, schedule = sample_weight(spec), chosen(spec, "triton", Target("cuda", "sm_80"))
        x = torch.randn(17, 192, generator=torch.Generator().manual_seed(3)).bfloat16()
        calls += [Call(spec, schedule, x[:m].contiguous(), weight) for m in tokens]
    outs = run_interpreted(calls)
    for at in range(0, len(outs), len(tokens)):
        assert all(torch.equal(outs[at + i], outs[at + 2][:m]) for i, m in enumerate(tokens))


def test_one_schedule_that_loses_little() -> None:
    """Scores are mean slowdowns against the best schedule of every size; the library's GEMM is never among them."""
    spec = cpp_spec("int4.g128.sym", "int16", (4096,), 4096)
    found = candidates(replace(spec, invariant=True), host_target(), 512)
    assert found == candidates(replace(spec, invariant=True), host_target(), 1)
    assert 1 <= found[0][0] < 2
    assert [c[1].name for c in found].count("library") == 0
    assert found[-1][1].name == "reference"
    assert "invariant" not in spec.key()
    assert replace(spec, invariant=True).key() != spec.key()
