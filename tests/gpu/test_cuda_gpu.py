"""CUDA C++ kernels on a real GPU: against the dequantized matrix, in CUDA graphs, on any stream, at any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _cuda import FRAGMENTS, spec_of
from _gpu import DTYPES, TOLERANCE, Problem

from lowbit.codegen.backend import Launcher
from lowbit.codegen.check import sample_weight
from lowbit.codegen.cuda.any_plan import make_plan
from lowbit.codegen.cuda.backend import CudaBackend
from lowbit.codegen.cuda.launch import core_spec
from lowbit.codegen.cuda.nvrtc import nvrtc_version
from lowbit.codegen.cuda.schedules import illegal
from lowbit.codegen.cuda.toolchain import no_compiler
from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime.dispatch import kernel_for
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import scalar_format
from lowbit.quantizers.qtensor import QTensor, pack
from lowbit.quantizers.weights import random_weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(no_compiler() is not None, reason=str(no_compiler()))]

SCHEDULES = {
    "one": Schedule(1, 64, 128, 4, 4),
    "few": Schedule(8, 64, 64, 4, 3),
    "two tiles": Schedule(4, 128, 128, 4, 4),
    "bulk": Schedule(8, 64, 64, 4, 4).with_extra(bulk=1),
    "sixteen": Schedule(16, 64, 64, 4, 4),
    "shared": Schedule(32, 128, 64, 8, 3).with_extra(row_warps=4, exact=1, resident=1),
    "shared bulk": Schedule(32, 128, 64, 8, 3).with_extra(row_warps=4, bulk=1, resident=1),
    "warpgroups": Schedule(64, 128, 64, 8, 4).with_extra(row_warps=8, wgmma=1, bulk=1, resident=1),
    "wide warpgroups": Schedule(128, 128, 64, 8, 6).with_extra(row_warps=8, wgmma=1, bulk=1, resident=1),
    "three warpgroups": Schedule(64, 192, 64, 12, 4).with_extra(row_warps=12, wgmma=1, bulk=1, resident=1),
    "256 tokens": Schedule(256, 128, 64, 8, 3).with_extra(row_warps=8, wgmma=1, bulk=1, resident=1),
    "as float16": Schedule(8, 64, 64, 4, 3).with_extra(half=1),
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
        if why := illegal(make_plan(core_spec(spec), schedule), here()):
            pytest.skip(why)
        path = tmp_path / f"{spec.digest()}-{len(list(tmp_path.iterdir()))}.cubin"
        backend.compile(backend.emit(spec, schedule, here()), path)
        return backend.load(path, spec, schedule)

    return build


def problem_of(fmt: str, segments: tuple[int, ...], k: int, x: str = "bf16", epilogue: tuple[str, ...] = ()) -> Problem:
    return Problem.of(spec_of(fmt, segments, k, x, x, epilogue))


def agrees(spec: KernelSpec, launch: Launcher, m: int) -> None:
    """Against the reference, which rounds activations as well."""
    weight = sample_weight(spec)
    on_gpu = replace(weight, tensors={name: t.cuda() for name, t in weight.tensors.items()})
    x = torch.randn(m, spec.k, generator=torch.Generator().manual_seed(m)).to(DTYPES[spec.x_dtype])
    out = torch.full((m, spec.n_out), float("nan"), dtype=DTYPES[spec.out_dtype], device="cuda")
    launch(x.cuda(), on_gpu, None, None, out)
    want = run_reference(spec, x, weight).float()
    assert float((out.cpu().float() - want).norm() / want.norm()) <= TOLERANCE[spec.out_dtype]


@pytest.mark.parametrize("shape", SCHEDULES)
@pytest.mark.parametrize(
    "fmt", ["int4.g128.sym", "int3.g64.asym", "int8.ch.sym", "int1.g48.sym", "bcq2.g64", "e3m2.ch", "nvfp4"]
)
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


BYTES = Schedule(64, 128, 128, 8, 3).with_extra(row_warps=8, wgmma=1, bulk=1, resident=1)
ROUNDED = {
    "few": SCHEDULES["few"],
    "bulk": SCHEDULES["bulk"],
    "shared": SCHEDULES["shared"].with_extra(exact=0),
    "warpgroups": BYTES,
    "256 tokens": replace(BYTES, tile_m=256),
    "fp8": BYTES.with_extra(fp8=1),
}


@pytest.mark.parametrize("shape", ROUNDED)
@pytest.mark.parametrize(
    ("fmt", "activation"),
    [("int8.ch.sym", "int8.token"), ("int4.g128.sym", "int8.token"), ("int4.g64.asym", "int8.g64"),
     ("int4.g64.sym.perm", "int4.g64.w2"), ("e3m2.ch", "e4m3.token"), ("e2m1.g32.e8m0", "int8.g32"),
     ("int4.g64.asym", "int8.g64.w1x16"), ("int8.ch.sym", "int8.token.w32x16")],
)  # fmt: skip
def test_rounded_activations(fmt: str, activation: str, shape: str, load: Load) -> None:
    for x in ("bf16", "f16", "f32"):
        spec = spec_of(fmt, (200,), 576, x, "f32", activation=activation)
        launch = load(spec, ROUNDED[shape])
        for m in (1, 17, 300):
            agrees(spec, launch, m)


@pytest.mark.parametrize("shape", ["few", "warpgroups"])
def test_integer_sums_are_exact(shape: str, load: Load) -> None:
    fmt = scalar_format("int8.ch.sym")
    spec = spec_of(str(fmt), (130,), 448, out="f32", activation="int8.token")
    codes = torch.randint(0, 256, (130, 448)).to(torch.uint8)
    packed = pack([QTensor(fmt, codes, torch.ones(130, 1, dtype=fmt.scale_dtype))], FRAGMENTS)
    weight = replace(packed, tensors={name: t.cuda() for name, t in packed.tensors.items()})
    x = torch.randint(-127, 128, (40, 448))
    x[:, 7] = 127
    out = torch.full((40, 130), float("nan"), device="cuda")
    load(spec, ROUNDED[shape])(x.bfloat16().cuda(), weight, None, None, out)
    assert torch.equal(out.cpu().long(), x @ (codes.long() - 128).T)


@pytest.mark.parametrize("activation", ["int8.g64", "int4.g32.w1.asym", "int8.token.static", "e4m3.g64"])
@pytest.mark.parametrize("shape", ["few", "two tiles", "shared", "warpgroups", "many"])
def test_outputs_are_rounded(shape: str, activation: str, load: Load) -> None:
    """To the bit what rounding the same kernel's numbers gives."""
    gated = SCHEDULES[shape].tile_n == 128
    segments, steps = ((136, 136), ("silu_mul",)) if gated else ((200,), ())
    spec = replace(spec_of("int4.g64.asym", segments, 576, out="bf16", epilogue=steps), out_activation=activation)
    weight = sample_weight(spec)
    on_gpu = replace(weight, tensors={name: t.cuda() for name, t in weight.tensors.items()})
    write, plain = load(spec, SCHEDULES[shape]), load(replace(spec, out_activation=""), SCHEDULES[shape])
    assert spec.out_rows is not None
    for m in (1, 17, 300):
        x = torch.randn(m, 576, device="cuda").bfloat16()
        rows = torch.full((m, spec.out_width), 0xFF, dtype=torch.uint8, device="cuda")
        numbers = torch.empty(m, spec.n_out, dtype=torch.bfloat16, device="cuda")
        write(x, on_gpu, None, None, rows)
        plain(x, on_gpu, None, None, numbers)
        want = spec.out_rows.write(numbers.cpu().float(), weight.tensors.get("output_scale"))
        used = spec.out_rows.level_bytes + 4 * spec.out_rows.scales
        assert torch.equal(rows.cpu()[:, :used], want[:, :used])


@pytest.mark.parametrize("shape", ROUNDED)
@pytest.mark.parametrize(
    ("fmt", "activation"),
    [("int4.g64.asym", "int8.g64"), ("int8.ch.sym", "int8.token.static"), ("int4.g64.sym", "int4.g64.w1.asym"),
     ("e3m2.ch", "e4m3.token.static"), ("e2m1.g32.e8m0", "e4m3.g32"), ("int4.g48.sym", "int8.g96")],
)  # fmt: skip
def test_rounded_activations_are_read(fmt: str, activation: str, shape: str, load: Load) -> None:
    spec = replace(spec_of(fmt, (200,), 581, activation=activation), x_dtype="rounded")
    weight, launch = sample_weight(spec), load(spec, ROUNDED[shape])
    on_gpu = replace(weight, tensors={name: t.cuda() for name, t in weight.tensors.items()})
    for m in (1, 17, 300):
        x = spec.x_rows.write(torch.randn(m, 581), weight.tensors.get("input_scale"))
        out = torch.full((m, 200), float("nan"), device="cuda")
        launch(x.cuda(), on_gpu, None, None, out)
        want = run_reference(spec, x, weight).float()
        assert float((out.cpu() - want).norm() / want.norm()) <= 5e-5  # operands of 16 bits are float16


@pytest.mark.parametrize("far", [0, 1])
@pytest.mark.parametrize(
    "fmt",
    ["vq.d8.k4096", "vq.d4.k256.r256", "vq.d6.k64.rn", "vq.d8.k256.c3.o20v4k64.cn", "vq.d16.k256", "vq.d2.k256",
     "vq.d8.k65536"],
)  # fmt: skip
def test_vector_formats(fmt: str, far: int, load: Load) -> None:
    for tile_m in (8, 16):
        spec = spec_of(fmt, (600,), 576, "bf16", "bf16")
        launch = load(spec, Schedule(tile_m, 64, 64, 4, 2).with_extra(far=far))
        for m in (1, 5, 33):
            agrees(spec, launch, m)


@pytest.mark.parametrize("m", [200, 1500])
def test_waves_and_shared_tiles(m: int, load: Load) -> None:
    """More tiles than thread blocks: whole waves, then a shared line; the same bits every time."""
    problem = problem_of("int4.g64.sym", (4096,), 1024)
    launch = load(problem.spec, SCHEDULES["warpgroups"])
    x, first, again = problem.tokens(m)[0], problem.out(m), problem.out(m)
    launch(x, problem.weight, None, None, first)
    problem.check(x, None, first)
    for _ in range(10):
        launch(x, problem.weight, None, None, again)
        assert torch.equal(first, again)


INVARIANT = {
    "few": SCHEDULES["few"],
    "whole tiles": SCHEDULES["warpgroups"],
    "shares": replace(SCHEDULES["warpgroups"], split_k=3),
    "shares, 128 tokens": replace(SCHEDULES["wide warpgroups"], split_k=2),
}


@pytest.mark.parametrize("shape", INVARIANT)
def test_bits_do_not_depend_on_the_batch(shape: str, load: Load) -> None:
    problem = problem_of("int4.g64.asym", (1000,), 2048)
    spec = replace(problem.spec, invariant=True)
    launch = load(spec, INVARIANT[shape])
    x = problem.tokens(129)[0]
    outs = {m: problem.out(m) for m in (*range(1, 18), 64, 129)}
    for m, out in outs.items():
        launch(x[:m].contiguous(), problem.weight, None, None, out)
    problem.check(x, None, outs[129])
    assert all(torch.equal(out, outs[129][:m]) for m, out in outs.items())


def test_nvrtc_makes_kernels_that_run(monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    if nvrtc_version() is None:
        pytest.skip("cuda-bindings or NVRTC is not installed")
    monkeypatch.setattr("lowbit.codegen.cuda.toolchain.find_nvcc", lambda: None)
    problem = problem_of("int4.g64.asym", (200,), 576)
    problem.run(load(problem.spec, SCHEDULES["few"]), 5)


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
