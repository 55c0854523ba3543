"""CUDA C++ kernels on a real GPU: against the dequantized matrix, in CUDA graphs, on any stream, at any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _cuda import FRAGMENTS, spec_of
from _gpu import TOLERANCE, Problem

from lowbit.codegen.backend import Launcher
from lowbit.codegen.cuda.backend import CudaBackend
from lowbit.codegen.cuda.launch import core_spec
from lowbit.codegen.cuda.plan import Plan
from lowbit.codegen.cuda.space import illegal
from lowbit.codegen.cuda.toolchain import find_nvcc
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime.dispatch import kernel_for
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import scalar_format
from lowbit.quantizers.weights import random_weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(find_nvcc() is None, reason="nvcc was not found")]

SCHEDULES = {
    "one": Schedule(1, 64, 128, 4, 4),
    "few": Schedule(8, 64, 64, 4, 3),
    "two tiles": Schedule(4, 128, 128, 4, 4),
    "bulk": Schedule(8, 64, 64, 4, 4).with_extra(bulk=1),
    "sixteen": Schedule(16, 64, 64, 4, 4),
    "shared": Schedule(32, 128, 64, 8, 3).with_extra(row_warps=4, exact=1, resident=1),
    "shared bulk": Schedule(32, 128, 64, 8, 3).with_extra(row_warps=4, bulk=1, resident=1),
    "warpgroups": Schedule(64, 128, 64, 8, 4).with_extra(row_warps=8, exact=1, wgmma=1, bulk=1, resident=1),
    "wide warpgroups": Schedule(128, 128, 64, 8, 6).with_extra(row_warps=8, exact=1, wgmma=1, bulk=1, resident=1),
    "many": Schedule(64, 256, 64, 8, 3).with_extra(row_warps=8, exact=1, resident=1),
}
Load = Callable[[KernelSpec, Schedule], Launcher]


def here() -> Target:
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", f"sm_{major}{minor}")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    backend = CudaBackend()

    def build(spec: KernelSpec, schedule: Schedule) -> Launcher:
        if why := illegal(Plan(core_spec(spec), schedule), here()):
            pytest.skip(why)
        path = tmp_path / f"{spec.digest()}-{len(list(tmp_path.iterdir()))}.cubin"
        backend.compile(backend.emit(spec, schedule, here()), path)
        return backend.load(path, spec, schedule)

    return build


def problem_of(fmt: str, segments: tuple[int, ...], k: int, x: str = "bf16", epilogue: tuple[str, ...] = ()) -> Problem:
    return Problem.of(spec_of(fmt, segments, k, x, x, epilogue))


@pytest.mark.parametrize("shape", SCHEDULES)
@pytest.mark.parametrize("fmt", ["int4.g128.sym", "int3.g64.asym", "int8.ch.sym", "int1.g48.sym", "e3m2.ch", "nvfp4"])
def test_formats(fmt: str, shape: str, load: Load) -> None:
    problem = problem_of(fmt, (200,), 576)
    launch = load(problem.spec, SCHEDULES[shape])
    for m in (1, 3, 17, 100):
        problem.run(launch, m)


WIDTHS = [(bits, s) for s in ("sym", "asym", "fz") for bits in range(1, 9) if s != "fz" or bits in (2, 3, 4, 8)]


@pytest.mark.parametrize(("bits", "symmetry"), WIDTHS)
def test_every_width(bits: int, symmetry: str, load: Load) -> None:
    for x in ("bf16", "f16"):
        problem = problem_of(f"int{bits}.g32.{symmetry}", (136,), 320, x)
        problem.run(load(problem.spec, SCHEDULES["few"]), 5)


@pytest.mark.parametrize("x", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("shape", SCHEDULES)
def test_dtypes(x: str, shape: str, load: Load) -> None:
    problem = problem_of("int4.g64.asym", (200,), 576, x)
    problem.run(load(problem.spec, SCHEDULES[shape]), 9)


@pytest.mark.parametrize("shape", ["two tiles", "shared", "shared bulk", "warpgroups"])
def test_epilogues(shape: str, load: Load) -> None:
    gated = problem_of("int4.g64.asym", (136, 136), 576, epilogue=("bias", "silu_mul", "residual"))
    gated.run(load(gated.spec, SCHEDULES[shape]), 5)
    chain = problem_of("int4.g64.asym", (136, 70), 581, epilogue=("bias", "residual"))
    chain.run(load(chain.spec, SCHEDULES[shape]), 5)


@pytest.mark.parametrize("m", [1, 8, 16, 64, 300, 1024])
@pytest.mark.parametrize("fmt", ["int4.g128.sym", "int2.g64.asym", "e2m1.g32.e8m0", "int8.ch.sym"])
def test_predicted_best_schedules(fmt: str, m: int, load: Load) -> None:
    problem = problem_of(fmt, (4096,), 2048)
    for schedule in list(CudaBackend().schedules(problem.spec, here(), m))[:3]:
        problem.run(load(problem.spec, schedule), m)


@pytest.mark.parametrize("fmt", ["int4.ch.sym", "int8.ch.asym"])
def test_long_sums_of_float16_stay_accurate(fmt: str, load: Load) -> None:
    """Integers ride on top of 1024: what tensor cores round away must not add up along many columns."""
    problem = problem_of(fmt, (256,), 16384, "f16")
    problem.run(load(problem.spec, SCHEDULES["one"]), 1)


@pytest.mark.parametrize("shape", ["one", "bulk", "many", "warpgroups"])
def test_cuda_graph(shape: str, load: Load) -> None:
    """Captured once, replayed on new inputs, with eager calls between replays."""
    problem = problem_of("int4.g64.asym", (1000,), 2048)
    launch = load(problem.spec, SCHEDULES[shape])
    x, out = problem.tokens(4)[0], problem.out(4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(x, problem.weight, None, None, out)
        launch(x, problem.weight, None, None, out)
    for _ in range(3):
        x.copy_(problem.tokens(4)[0])
        out.fill_(float("nan"))
        graph.replay()
        problem.check(x, None, out)
        problem.run(launch, 4)


@pytest.mark.parametrize("early", [0, 1])
def test_current_stream(early: int, load: Load) -> None:
    """The launch waits for work queued before it on the current stream, also where it may start early."""
    problem = problem_of("int4.g64.asym", (200,), 576)
    launch = load(problem.spec, SCHEDULES["few"].with_extra(early=early))
    x, out = problem.tokens(4)[0], problem.out(4)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        fresh = problem.tokens(4)[0]
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            x.copy_(fresh)
            launch(x, problem.weight, None, None, out)
        side.synchronize()
        problem.check(fresh, None, out)


def test_two_streams_do_not_share_workspace(load: Load) -> None:
    problem = problem_of("int4.g64.asym", (2048,), 2048)
    launch = load(problem.spec, SCHEDULES["sixteen"])
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [problem.tokens(16)[0] for _ in range(16)]
    outs = [problem.out(16) for _ in inputs]
    torch.cuda.synchronize()
    for i, (x, out) in enumerate(zip(inputs, outs, strict=True)):
        with torch.cuda.stream(streams[i % 2]):
            launch(x, problem.weight, None, None, out)
    torch.cuda.synchronize()
    for x, out in zip(inputs, outs, strict=True):
        problem.check(x, None, out)


def test_split_sums_are_deterministic(load: Load) -> None:
    problem = problem_of("int4.g64.asym", (200,), 8192)
    launch = load(problem.spec, SCHEDULES["few"])
    x, first, again = problem.tokens(16)[0], problem.out(16), problem.out(16)
    launch(x, problem.weight, None, None, first)
    for _ in range(20):
        launch(x, problem.weight, None, None, again)
        assert torch.equal(first, again)


def test_unaligned_activations(load: Load) -> None:
    problem = problem_of("int4.g64.asym", (200,), 576)
    launch = load(problem.spec, SCHEDULES["few"])
    flat = torch.randn(3 * 576 + 1, device="cuda").bfloat16()
    x, out = flat[1:].view(3, 576), problem.out(3)
    launch(x, problem.weight, None, None, out)
    problem.check(x, None, out)


def test_modules_run_this_backend() -> None:
    """A quantized layer on the GPU packs for this backend and runs it for every token count."""
    q = random_weight(scalar_format("int4.g64.asym"), 512, 576, torch.Generator().manual_seed(1))
    layer = QuantLinear.from_qtensor(q, torch.zeros(512, device="cuda"))
    dense = q.dequantize().double().cuda()
    assert layer.inner is not None
    assert layer.inner.packed().layout == FRAGMENTS
    for m in (1, 2, 5, 17, 64, 130, 700):
        x = torch.randn(m, 576, device="cuda", dtype=torch.bfloat16)
        want = x.double() @ dense.T
        assert float((layer(x).double() - want).norm() / want.norm()) <= TOLERANCE["bf16"]
    kernels = [kernel_for(layer.inner.key, torch.bfloat16, torch.device("cuda"), m) for m in (1, 64, 512)]
    assert {k.backend for k in kernels} == {"cuda"}
