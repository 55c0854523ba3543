"""Triton kernels on a real GPU: against the dequantized matrix, in CUDA graphs, on the current stream, at any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from _gpu import TOLERANCE, Problem

from lowbit.codegen.attend import AttendSpec
from lowbit.codegen.backend import Launcher
from lowbit.codegen.reference.kvstate import KVState, allocate, attend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.backend import TritonBackend
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime.attend import gpu_attend_kernel
from lowbit.compiler.runtime.dispatch import kernel_for
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import parse_format, scalar_format
from lowbit.quantizers.hadamard import rotate
from lowbit.quantizers.qtensor import QTensor

pytestmark = pytest.mark.gpu

GEMV = Schedule(1, 32, 128, 4, 2).with_extra(gemv=1, scale_after=1)
GEMV_SPLIT = Schedule(4, 32, 128, 4, 2, split_k=2).with_extra(gemv=1)
DOT = Schedule(16, 64, 64, 4, 3)
SWAP = Schedule(16, 64, 64, 4, 3).with_extra(swap=1, scale_after=1, evict_first=1)
SPLIT = Schedule(16, 64, 64, 4, 3, split_k=4).with_extra(scale_after=1)
WIDE = Schedule(64, 128, 64, 4, 3)
WIDE_SWAP = Schedule(128, 128, 64, 8, 3).with_extra(swap=1)
SHAPES = {"gemv": GEMV, "gemv-split": GEMV_SPLIT, "dot": DOT, "swap": SWAP, "split": SPLIT, "wide": WIDE,
          "wide-swap": WIDE_SWAP}  # fmt: skip

Load = Callable[[KernelSpec, Schedule], Launcher]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    backend = TritonBackend()
    major, minor = torch.cuda.get_device_capability()
    target = Target("cuda", f"sm_{major}{minor}")

    def build(spec: KernelSpec, schedule: Schedule) -> Launcher:
        path = tmp_path / f"{spec.digest()}-{len(list(tmp_path.iterdir()))}.py"
        backend.compile(backend.emit(spec, schedule, target), path)
        return backend.load(path, spec, schedule)

    return build


def problem_of(
    fmt: str,
    segments: tuple[int, ...],
    k: int,
    x: str = "bf16",
    epilogue: tuple[str, ...] = (),
    compute: str = "float",
) -> Problem:
    layout = LAYOUTS[TritonBackend().layout_of(parse_format(fmt))]
    return Problem.of(KernelSpec(segments, k, fmt, str(layout), compute, x, x, epilogue))  # type: ignore[arg-type]


def tokens_for(schedule: Schedule) -> tuple[int, ...]:
    return (1, 3, 6) if schedule.get("gemv", 0) else (1, 17, 100)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "fmt",
    ["int4.g128.sym", "int3.g64.asym", "int8.ch.sym", "int1.g48.sym", "int7.t.asym", "bcq2.g64", "tcq2.g64", "tcq3.ch"],
)
def test_formats(fmt: str, shape: str, load: Load) -> None:
    problem = problem_of(fmt, (200,), 576)
    launch = load(problem.spec, SHAPES[shape])
    for m in tokens_for(SHAPES[shape]):
        problem.run(launch, m)


WIDTHS = [(bits, s) for s in ("sym", "asym", "fz") for bits in range(1, 9) if s != "fz" or bits in (2, 3, 4, 8)]


@pytest.mark.parametrize(("bits", "symmetry"), WIDTHS)
def test_every_width(bits: int, symmetry: str, load: Load) -> None:
    problem = problem_of(f"int{bits}.g32.{symmetry}", (136,), 320)
    problem.run(load(problem.spec, DOT), 5)
    problem.run(load(problem.spec, GEMV), 1)


@pytest.mark.parametrize("x", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("shape", ["gemv", "dot", "split", "wide", "wide-swap"])
def test_dtypes(x: str, shape: str, load: Load) -> None:
    problem = problem_of("int4.g64.asym", (200,), 576, x)
    problem.run(load(problem.spec, SHAPES[shape]), 9)


@pytest.mark.parametrize("shape", SHAPES)
def test_epilogues(shape: str, load: Load) -> None:
    gated = problem_of("int4.g64.asym", (136, 136), 576, epilogue=("bias", "silu_mul", "residual"))
    gated.run(load(gated.spec, SHAPES[shape]), 5)
    chain = problem_of("int4.g64.asym", (136, 70), 576, epilogue=("bias", "residual"))
    chain.run(load(chain.spec, SHAPES[shape]), 5)


@pytest.mark.parametrize("fmt", ["int4.g128.sym", "int8.ch.asym", "int2.g64.asym", "int4.g96.sym", "int2.g64.fz"])
def test_int8_products(fmt: str, load: Load) -> None:
    problem = problem_of(fmt, (200,), 576, compute="int8")
    for schedule in (DOT, WIDE, DOT.with_extra(swap=1), Schedule(16, 64, 64, 4, 3, split_k=2)):
        problem.run(load(problem.spec, schedule), 33)


VECTOR_SHAPES = {
    "gemv": Schedule(1, 64, 64, 4, 2).with_extra(gemv=1),
    "gemv-split": Schedule(4, 32, 64, 4, 2, split_k=4).with_extra(gemv=1),
    "dot": Schedule(16, 64, 64, 4, 3),
    "split": Schedule(16, 64, 32, 4, 3, split_k=4),
    "swap": Schedule(16, 128, 64, 4, 3).with_extra(swap=1),
    "wide": Schedule(64, 128, 64, 8, 3),
    "wide-swap": Schedule(128, 128, 32, 8, 3).with_extra(swap=1),
}
VECTOR_FORMATS = [
    "vq.d4.k256",
    "vq.d8.k256.r256",
    "vq.d8.k4096.rn",
    "vq.d16.k65536",
    "vq.d2.k16.cn.f32",
    "vq.d6.k4096.r16.c4.o2pv4k4096.cn",
    "vq.d7.k256.r16.in.rn",
]


@pytest.mark.parametrize("shape", VECTOR_SHAPES)
@pytest.mark.parametrize("fmt", VECTOR_FORMATS)
def test_vector_formats(fmt: str, shape: str, load: Load) -> None:
    problem = problem_of(fmt, (203,), 581)
    launch = load(problem.spec, VECTOR_SHAPES[shape])
    for m in tokens_for(VECTOR_SHAPES[shape]):
        problem.run(launch, m)


@pytest.mark.parametrize("shape", ["gemv-split", "split", "wide"])
def test_vector_segments_and_epilogues(shape: str, load: Load) -> None:
    gated = problem_of("vq.d8.k256.r256", (133, 133), 576, epilogue=("bias", "silu_mul", "residual"))
    gated.run(load(gated.spec, VECTOR_SHAPES[shape]), 5)
    chain = problem_of("vq.d4.k256.rn", (133, 70, 31), 576, "f16", epilogue=("bias", "residual"))
    chain.run(load(chain.spec, VECTOR_SHAPES[shape]), 5)
    rows = problem_of("vq.d8.k65536.in.rn", (133, 133), 576, epilogue=("bias", "silu_mul", "residual"))
    rows.run(load(rows.spec, VECTOR_SHAPES[shape]), 5)


def test_prepared_activations_in_a_cuda_graph(load: Load) -> None:
    """Two kernels and a workspace in one capture, replayed on new inputs."""
    problem = problem_of("vq.d8.k256.c2.o1pv4k256.cn", (200,), 584)
    launch = load(problem.spec, VECTOR_SHAPES["split"])
    x, out = problem.tokens(9)[0], problem.out(9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(x, problem.weight, None, None, out)
    for _ in range(3):
        x.copy_(problem.tokens(9)[0])
        out.fill_(float("nan"))
        graph.replay()
        problem.check(x, None, out)


@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize("fmt", ["int4.g128.sym", "int3.g64.asym", "int2.g64.fz", "vq.d4.k256", "vq.d8.k256.r256"])
def test_predicted_best_schedules(fmt: str, m: int, load: Load) -> None:
    problem = problem_of(fmt, (1024,), 2048)
    major, minor = torch.cuda.get_device_capability()
    target = Target("cuda", f"sm_{major}{minor}")
    for schedule in list(TritonBackend().schedules(problem.spec, target, m))[:2]:
        problem.run(load(problem.spec, schedule), m)


def test_many_tokens_cross_band_edges(load: Load) -> None:
    """More than 8 token tiles, so that several bands of programs exist and the last one is partial."""
    problem = problem_of("int4.g128.sym", (200,), 256)
    problem.run(load(problem.spec, DOT), 16 * 19 + 5)


@pytest.mark.parametrize("schedule", [DOT, SPLIT, GEMV_SPLIT], ids=["dot", "split", "gemv-split"])
def test_cuda_graph(schedule: Schedule, load: Load) -> None:
    """Captured once, replayed on new inputs, with eager calls between replays."""
    problem = problem_of("int4.g64.asym", (200,), 576)
    launch = load(problem.spec, schedule)
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


@pytest.fixture
def side_stream() -> Iterator[torch.cuda.Stream]:
    stream = torch.cuda.Stream()
    yield stream
    stream.synchronize()


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_current_stream(compute: str, load: Load, side_stream: torch.cuda.Stream) -> None:
    """The launch waits for work queued before it on the current stream, and for nothing else to be right."""
    problem = problem_of("int4.g64.asym", (200,), 576, compute=compute)
    launch = load(problem.spec, SPLIT)
    x, fresh, out = problem.tokens(4)[0], problem.tokens(4)[0], problem.out(4)
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(fresh)
        launch(x, problem.weight, None, None, out)
    side_stream.synchronize()
    problem.check(fresh, None, out)


def test_two_streams_do_not_share_counters(load: Load) -> None:
    problem = problem_of("int4.g64.asym", (2048,), 2048)
    launch = load(problem.spec, SPLIT)
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


def test_split_k_is_deterministic(load: Load) -> None:
    problem = problem_of("int4.g64.asym", (200,), 2048)
    launch = load(problem.spec, SPLIT)
    x, first, again = problem.tokens(16)[0], problem.out(16), problem.out(16)
    launch(x, problem.weight, None, None, first)
    for _ in range(20):
        launch(x, problem.weight, None, None, again)
        assert torch.equal(first, again)


def test_unaligned_activations(load: Load) -> None:
    problem = problem_of("int4.g64.asym", (200,), 576)
    launch = load(problem.spec, DOT)
    flat = torch.randn(3 * 576 + 1, device="cuda").bfloat16()
    x, out = flat[1:].view(3, 576), problem.out(3)
    launch(x, problem.weight, None, None, out)
    problem.check(x, None, out)


def test_module_dispatches_by_tokens() -> None:
    """A quantized layer on the GPU runs this backend for every token count, with another schedule where it helps."""
    problem = problem_of("int4.g64.asym", (512,), 576)
    rng = torch.Generator().manual_seed(1)
    fmt = scalar_format("int4.g64.asym")
    codes = torch.randint(0, 16, (512, 576), generator=rng).to(torch.uint8)
    zero = torch.randint(0, 16, (512, 9), generator=rng).to(torch.uint8)
    q = QTensor(fmt, codes, (torch.rand(512, 9, generator=rng) * 0.02 + 0.005).half(), zero)
    layer = QuantLinear.from_qtensor(q, None).to("cuda")
    dense = q.dequantize().double().cuda()
    for m in (1, 2, 5, 17, 64, 130, 700):
        x = torch.randn(m, 576, device="cuda", dtype=torch.bfloat16)
        want = x.double() @ dense.T
        assert float((layer(x).double() - want).norm() / want.norm()) <= TOLERANCE["bf16"]
    key = problem.spec.key()
    kernels = [kernel_for(key, torch.bfloat16, torch.device("cuda"), m) for m in (1, 64, 512)]
    assert {k.backend for k in kernels} == {"triton"}
    assert len({k.schedule for k in kernels}) > 1


@pytest.mark.parametrize("text", ["kv4.kc64.vt.w64", "k2v4.kc32.vt32.w32.rot", "kv8.kc64.vc32.w64", "k16v4.vt.w64"])
@pytest.mark.parametrize(("dims", "tokens", "queries", "groups"), [(64, 200, 1, 3), (128, 4099, 1, 4), (80, 333, 3, 7)])
def test_attention_over_packed_caches(text: str, dims: int, tokens: int, queries: int, groups: int) -> None:
    """The operator on the GPU uses the kernel, and gives what the reference gives on the same tensors."""
    spec, device = AttendSpec(text, dims), torch.device("cuda", torch.cuda.current_device())
    assert gpu_attend_kernel(spec.key(), device) is not None
    capacity = -(-tokens // spec.span) * spec.span
    state = list(allocate(spec, 2, 2, capacity, device).values())
    keys, values = (torch.randn(2, 2, tokens, dims, device="cuda") for _ in "kv")
    length = torch.zeros((), dtype=torch.int64)
    torch.ops.lowbit.append_kv(keys, values, state, length, capacity, spec.key())
    length += tokens
    q = torch.randn(2, 2 * groups, queries, dims, device="cuda")
    mask = torch.ones(2, 1, queries, tokens, dtype=torch.bool, device="cuda")
    mask[0, :, :, : tokens // 3] = False
    wide = rotate(q, dims) if spec.fmt.rotate else q
    for given in (None, mask):
        want = attend(wide, KVState.of(spec, state), tokens, given, 0.1)
        got = torch.ops.lowbit.attend_kv(q, state, length, given, 0.1, spec.key())
        assert float((got - want).norm() / want.norm()) < 1e-4
