"""What GPU kernel benchmarks share: the grid, random packed weights, an oracle, and timing with cold weights.

Weights, oracle and timing are those of tuning (`codegen.check`, `codegen.tune.measure`): every call reads its own copy
of the weights, all copies are several times the last-level cache, and the median replay of a CUDA graph counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lowbit.codegen import load_backend
from lowbit.codegen.check import dense_on_device, random_words, sample_weight
from lowbit.codegen.reference.backend import decode_weight
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune.measure import graph_burst, seconds_of
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.quantizers.formats import VectorFormat, parse_format
from lowbit.quantizers.qtensor import PackedWeight

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
            return spec.rows * fmt.positions(self.k) * width + fmt.dim * (fmt.centroids + fmt.residual) * stored
        side = spec.groups * self.n * (stored * (1 + spec.fmt.offset) + spec.fmt.zero)
        return self.n * self.k * spec.fmt.bits // 8 + side


def problems(backend: str = "triton") -> Iterator[Problem]:
    """The grid, most wanted first: the first format on every shape, then the others that a backend serves."""
    for fmt in FORMATS:
        for n, k in SHAPES:
            if load_backend(backend).serves(parse_format(fmt)) is None:
                yield Problem(fmt, n, k, backend)


def random_weight(problem: Problem, seed: int = 0) -> PackedWeight:
    """On the GPU where any words are valid codes; few formats need the CPU."""
    if (made := random_words(problem.spec, DEVICE, seed)) is not None:
        return made
    packed = sample_weight(problem.spec, seed)
    return replace(packed, tensors={name: t.to(DEVICE) for name, t in packed.tensors.items()})


def dequantize(weight: PackedWeight) -> torch.Tensor:
    """float32 [N, K] on the weight's device, by the layout's own inverse. Vector formats by the reference."""
    if isinstance(weight.fmt, VectorFormat):
        return decode_weight(weight).to(next(iter(weight.tensors.values())).device)
    return dense_on_device(weight)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||; not a number when an element was not written."""
    return float((got.float() - want).norm() / want.norm())


def seconds_per_call(calls: Sequence[Callable[[], object]], budget_s: float = 0.05) -> float:
    """Median seconds of one call, from replays of a graph that makes all `calls` once."""
    return seconds_of(graph_burst(calls), budget_s)
