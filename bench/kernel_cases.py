"""What GPU kernel benchmarks share: the grid, random packed weights, an oracle, and timing with cold weights.

Timing: every call reads its own copy of the weights, and the copies together are several times the last-level cache,
so weights come from memory as they do in a model. Calls are captured into one CUDA graph, whose replays are timed with
events; the median replay divided by its calls is reported. Launch gaps of Python are not in it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lowbit.codegen import load_backend
from lowbit.codegen.reference.backend import decode_weight
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS, plane_bits
from lowbit.quantizers.formats import VectorFormat, parse_format, scalar_format
from lowbit.quantizers.qtensor import PackedWeight
from lowbit.quantizers.weights import pack_weights
from lowbit.quantizers.weights import random_weight as random_matrix

FORMATS = ("int4.g128.sym", "int4.g64.asym", "int8.ch.sym", "int2.g64.asym", "int3.g64.asym", "int2.g64.fz",
           "vq.d4.k256", "vq.d8.k256.r256", "vq.d8.k4096")  # fmt: skip
SHAPES = ((8192, 8192), (4096, 4096), (11008, 4096), (4096, 11008), (28672, 4096), (4096, 14336))  # (N, K)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ERROR_LIMIT = 1e-2  # relative, Frobenius: operands and output are bfloat16
DEVICE = "cuda"
COLD_BYTES = 256 << 20  # all copies together; the H200's L2 has 60 MB


@dataclass(frozen=True)
class Problem:
    """One matrix: format and [N, K]; and whose kernels multiply with it."""

    fmt: str
    n: int
    k: int
    backend: str = "triton"

    def __str__(self) -> str:
        return f"{self.fmt}-{self.n}x{self.k}"

    @property
    def spec(self) -> KernelSpec:
        """bfloat16 in and out, no epilogue."""
        layout = LAYOUTS[load_backend(self.backend).layout_of(parse_format(self.fmt))]
        return KernelSpec((self.n,), self.k, self.fmt, str(layout), "float", "bf16", "bf16")

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrix as the kernel reads it."""
        spec = self.spec
        stored = 2 if spec.scale_dtype == "f16" else 4
        if (fmt := spec.vector) is not None:
            width = sum(1 if size <= 256 else 2 for size in (fmt.centroids, fmt.residual) if size)
            return spec.rows * self.k * width + fmt.dim * (fmt.centroids + fmt.residual) * stored
        side = spec.groups * self.n * (stored * (1 + spec.fmt.offset) + spec.fmt.zero)
        return self.n * self.k * spec.fmt.bits // 8 + side


def problems(backend: str = "triton") -> Iterator[Problem]:
    """The grid, most wanted first: the first format on every shape, then the others that a backend serves."""
    for fmt in FORMATS:
        for n, k in SHAPES:
            if load_backend(backend).serves(parse_format(fmt)) is None:
                yield Problem(fmt, n, k, backend)


def random_weight(problem: Problem, seed: int = 0) -> PackedWeight:
    """Random words are valid codes: K is a multiple of every group here, so there is no padding. Vector formats, few
    in number, are made on the CPU."""
    if isinstance(fmt := parse_format(problem.fmt), VectorFormat):
        matrix = random_matrix(fmt, problem.n, problem.k, torch.Generator().manual_seed(seed))
        packed = pack_weights([matrix], problem.spec.layout_)
        return replace(packed, tensors={name: t.to(DEVICE) for name, t in packed.tensors.items()})
    rng, n, k = torch.Generator(device=DEVICE).manual_seed(seed), problem.n, problem.k
    scalar, layout = scalar_format(problem.fmt), problem.spec.layout_
    parts = {
        f"plane{i}": torch.randint(
            -(2**31), 2**31 - 1, (k * bits // 32 * n,), generator=rng, device=DEVICE, dtype=torch.int32
        )
        for i, bits in enumerate(plane_bits(scalar.bits))
    }
    groups, tile = scalar.granularity.groups(k), layout.row_tile
    side = (groups, n) if tile == 1 else (n // tile, groups, tile)
    parts["scale"] = (torch.rand(side, generator=rng, device=DEVICE) * 0.02 + 0.001).to(scalar.scale_dtype)
    if scalar.zero:
        parts["zero"] = torch.randint(0, 2**scalar.bits, side, generator=rng, device=DEVICE, dtype=torch.uint8)
    if scalar.offset:
        parts["offset"] = (torch.randn(side, generator=rng, device=DEVICE) * 0.02).to(scalar.scale_dtype)
    return PackedWeight(scalar, layout, (n,), k, parts)


def dequantize(weight: PackedWeight) -> torch.Tensor:
    """float32 [N, K] on the weight's device, by the layout's own inverse. Vector formats by the reference."""
    device = next(iter(weight.tensors.values())).device
    if isinstance(weight.fmt, VectorFormat):
        return decode_weight(weight).to(device)
    n, k, fmt, layout = weight.n, weight.k, scalar_format(str(weight.fmt)), weight.layout
    values = fmt.element.levels().to(device)[layout.unpack(list(weight.planes), fmt.bits, n, k).long()]
    size = fmt.granularity.group_size(k)

    def spread(side: torch.Tensor) -> torch.Tensor:
        return layout.unpack_side(side).float().repeat_interleave(size, dim=1)[:, :k]

    if weight.zero is not None:
        values -= spread(weight.zero)
    values *= spread(weight.scale)
    if weight.offset is not None:
        values += spread(weight.offset)
    return values


def copies_of(weight: PackedWeight, nbytes: int) -> list[PackedWeight]:
    """The weight and copies of it, `COLD_BYTES` together, at least 4."""
    count = max(4, math.ceil(COLD_BYTES / nbytes))
    copies = [{name: t.clone() for name, t in weight.tensors.items()} for _ in range(count - 1)]
    return [weight, *[replace(weight, tensors=tensors) for tensors in copies]]


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
