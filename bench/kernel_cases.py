"""What GPU kernel benchmarks share: the grid, random packed weights, an oracle, and timing with cold weights.

Timing: every call reads its own copy of the weights, and the copies together are several times the last-level cache,
so weights come from memory as they do in a model. Calls are captured into one CUDA graph, whose replays are timed with
events; the median replay divided by its calls is reported. Launch gaps of Python are not in it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS, plane_bits
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.qtensor import PackedWeight

FORMATS = ("int4.g128.sym", "int4.g64.asym", "int8.ch.sym", "int2.g64.asym", "int3.g64.asym")
SHAPES = ((8192, 8192), (4096, 4096), (11008, 4096), (4096, 11008), (28672, 4096), (4096, 14336))  # (N, K)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ERROR_LIMIT = 1e-2  # relative, Frobenius: operands and output are bfloat16
DEVICE = "cuda"
COLD_BYTES = 256 << 20  # all copies together; the H200's L2 has 60 MB


@dataclass(frozen=True)
class Problem:
    """One matrix: format and [N, K]."""

    fmt: str
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.fmt}-{self.n}x{self.k}"

    @property
    def spec(self) -> KernelSpec:
        """bfloat16 in and out, no epilogue."""
        return KernelSpec((self.n,), self.k, self.fmt, str(LAYOUTS["words"]), "float", "bf16", "bf16")

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrix as the kernel reads it."""
        spec = self.spec
        side = spec.groups * self.n * ((2 if spec.scale_dtype == "f16" else 4) + spec.fmt.zero)
        return self.n * self.k * spec.fmt.bits // 8 + side


def problems() -> Iterator[Problem]:
    """The grid, most wanted first: the first format on every shape, then the others."""
    for fmt in FORMATS:
        for n, k in SHAPES:
            yield Problem(fmt, n, k)


def random_weight(problem: Problem, seed: int = 0) -> PackedWeight:
    """Random words are valid codes: K is a multiple of every group here, so there is no padding."""
    fmt, device = parse_format(problem.fmt), DEVICE
    rng = torch.Generator(device=device).manual_seed(seed)
    n, k = problem.n, problem.k
    planes = tuple(
        torch.randint(-(2**31), 2**31 - 1, (k * bits // 32 * n,), generator=rng, device=device, dtype=torch.int32)
        for bits in plane_bits(fmt.bits)
    )
    groups = fmt.granularity.groups(k)
    scale = (torch.rand((groups, n), generator=rng, device=device) * 0.02 + 0.001).to(fmt.scale_dtype)
    zero = None
    if fmt.zero:
        zero = torch.randint(0, 2**fmt.bits, (groups, n), generator=rng, device=device, dtype=torch.uint8)
    return PackedWeight(fmt, LAYOUTS["words"], (n,), k, planes, scale, zero)


def dequantize(weight: PackedWeight) -> torch.Tensor:
    """float32 [N, K] on the weight's device, by the layout's definition: column k is in word k // (32 / w)."""
    n, k, device = weight.n, weight.k, weight.scale.device
    codes, low = torch.zeros((k, n), dtype=torch.int32, device=device), 0
    for bits, plane in zip(plane_bits(weight.fmt.bits), weight.planes, strict=True):
        shifts = torch.arange(32 // bits, dtype=torch.int32, device=device) * bits
        part = (plane.view(-1, 1, n) >> shifts.view(1, -1, 1)) & (2**bits - 1)
        codes |= part.view(k, n) << low
        low += bits
    values = weight.fmt.element.levels().to(device)[codes.long()]
    size = weight.fmt.granularity.group_size(k)
    if weight.zero is not None:
        values -= weight.zero.float().repeat_interleave(size, dim=0)[:k]
    values *= weight.scale.float().repeat_interleave(size, dim=0)[:k]
    return values.t().contiguous()


def copies_of(weight: PackedWeight, nbytes: int) -> list[PackedWeight]:
    """The weight and copies of it, `COLD_BYTES` together, at least 4."""
    count = max(4, math.ceil(COLD_BYTES / nbytes))
    return [weight] + [
        PackedWeight(
            weight.fmt, weight.layout, weight.segments, weight.k, tuple(p.clone() for p in weight.planes),
            weight.scale.clone(), None if weight.zero is None else weight.zero.clone(),
        )
        for _ in range(count - 1)
    ]  # fmt: skip


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||; not a number when an element was not written."""
    return float((got.float() - want).norm() / want.norm())


def seconds_per_call(calls: Sequence[Callable[[], object]], budget_s: float = 0.05) -> float:
    """Median seconds of one call, from replays of a graph that makes all `calls` once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    first = _timed(graph)
    repeats = min(max(int(budget_s / max(first, 1e-6)), 3), 50)
    return statistics.median(_timed(graph) for _ in range(repeats)) / len(calls)


def _timed(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3
