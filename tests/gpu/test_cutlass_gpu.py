"""CUTLASS kernels on a real GPU: against the dequantized matrix, in CUDA graphs, beside the CUDA backend's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _cuda import spec_of
from _gpu import DTYPES, Problem

from lowbit.codegen import load_backend
from lowbit.codegen.backend import Launcher
from lowbit.codegen.cutlass.backend import CutlassBackend
from lowbit.codegen.cutlass.toolchain import installed
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not installed(), reason="nvidia-cutlass-dsl is not installed")]

SCHEDULES = {
    "small": Schedule(32, 64, 64, 4, 2),
    "warps": Schedule(64, 128, 64, 4, 3),
    "warpgroup": Schedule(64, 128, 64, 4, 4).with_extra(wgmma=1),
    "many": Schedule(128, 256, 64, 8, 4).with_extra(wgmma=1),
    "wide": Schedule(256, 128, 64, 8, 3).with_extra(wgmma=1),
}
Load = Callable[[KernelSpec, Schedule], Launcher]


def here() -> Target:
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", f"sm_{major}{minor}")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    backend = CutlassBackend()

    def build(spec: KernelSpec, schedule: Schedule) -> Launcher:
        if why := backend.builds(here()) or backend.illegal(spec, schedule, here()):
            pytest.skip(why)
        path = tmp_path / f"{spec.digest()}.cute"
        backend.compile(backend.emit(spec, schedule, here()), path)
        return backend.load(path, spec, schedule)

    return build


def problem_of(fmt: str, segments: tuple[int, ...], k: int, x: str = "bf16", epilogue: tuple[str, ...] = ()) -> Problem:
    return Problem.of(spec_of(fmt, segments, k, x, x, epilogue))


@pytest.mark.parametrize("shape", SCHEDULES)
@pytest.mark.parametrize("fmt", ["int4.g128.sym", "int3.g64.asym", "int2.g64.fz", "int8.ch.sym", "bcq2.g64", "nvfp4"])
def test_formats(fmt: str, shape: str, load: Load) -> None:
    problem = problem_of(fmt, (200,), 576)
    launch = load(problem.spec, SCHEDULES[shape])
    for m in (1, 33, 300):
        problem.run(launch, m)


@pytest.mark.parametrize("shape", ["warps", "warpgroup", "many"])
def test_epilogues(shape: str, load: Load) -> None:
    gated = problem_of("int4.g64.asym", (136, 136), 576, "f16", ("bias", "silu_mul", "residual"))
    gated.run(load(gated.spec, SCHEDULES[shape]), 70)
    chain = problem_of("int4.g48.sym", (136, 70), 581, "bf16", ("bias", "residual"))
    chain.run(load(chain.spec, SCHEDULES[shape]), 70)


def test_in_a_graph_and_beside_the_cuda_backend(load: Load, tmp_path: Path) -> None:
    """The same packed bytes give the same numbers, up to the rounding of weights times scales."""
    problem = problem_of("int4.g128.sym", (1024,), 2048)
    launch = load(problem.spec, SCHEDULES["many" if here().arch == "sm_90" else "warps"])
    x, _ = problem.tokens(500)
    out, theirs = problem.out(500), problem.out(500)
    launch(x, problem.weight, None, None, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(x, problem.weight, None, None, out)
    out.fill_(float("nan"))
    graph.replay()
    problem.check(x, None, out)
    cuda = load_backend("cuda")
    if why := cuda.available(here()):
        pytest.skip(why)
    schedule = next(iter(cuda.schedules(problem.spec, here(), 500)))
    cuda.compile(cuda.emit(problem.spec, schedule, here()), tmp_path / "kernel.cubin")
    cuda.load(tmp_path / "kernel.cubin", problem.spec, schedule)(x, problem.weight, None, None, theirs)
    assert out.dtype == DTYPES["bf16"]
    assert float((out.float() - theirs.float()).norm() / theirs.float().norm()) < 6e-3
