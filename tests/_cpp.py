"""Building C++ kernels for tests, and what they should compute."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.codegen.backend import Launcher
from lowbit.codegen.cpp.backend import CppBackend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import Format, parse_format
from lowbit.quantizers.qtensor import QTensor, column_map, pack, padded_columns

BACKEND = CppBackend()
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Job:
    """One kernel to build: its spec, the instruction set, and the token count its schedule is chosen for."""

    spec: KernelSpec
    arch: str
    m: int
    schedule: Schedule | None = None

    def chosen(self) -> Schedule:
        """The given schedule, else the first one offered."""
        return self.schedule or next(iter(BACKEND.schedules(self.spec, Target("cpu", self.arch), self.m)))


def spec_of(fmt: str, compute: str, segments: tuple[int, ...], k: int, **rest: object) -> KernelSpec:
    """A spec in the C++ backend's layout."""
    return KernelSpec(segments, k, fmt, str(LAYOUTS["panel16"]), compute, **rest)  # type: ignore[arg-type]


def build(jobs: list[Job]) -> list[Launcher]:
    """Launchers of all jobs, compiled side by side."""
    folder = Path(tempfile.mkdtemp(prefix="lowbit-test-"))

    def one(n: int) -> Launcher:
        job = jobs[n]
        source = BACKEND.emit(job.spec, job.chosen(), Target("cpu", job.arch))
        artifact = folder / f"{n}.so"
        BACKEND.compile(source, artifact)
        return BACKEND.load(artifact, job.spec, job.chosen())

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(len(jobs))))


def random_qtensor(fmt: Format, n: int, k: int, seed: int) -> QTensor:
    """Random codes, scales and zero points."""
    rng = torch.Generator().manual_seed(seed)
    side = fmt.side_shape(n, k)
    codes = torch.randint(0, 2**fmt.bits, (n, k), generator=rng).to(torch.uint8)
    scale = (torch.rand(side, generator=rng) * 0.02 + 0.001).to(fmt.scale_dtype)
    zero = torch.randint(0, 2**fmt.bits, side, generator=rng).to(torch.uint8) if fmt.zero else None
    return QTensor(fmt, codes, scale, zero)


def tensors_of(spec: KernelSpec, seed: int = 0) -> list[QTensor]:
    """One random matrix per segment."""
    return [random_qtensor(parse_format(spec.format), n, spec.k, seed + i) for i, n in enumerate(spec.segments)]


def rounded_activations(spec: KernelSpec, x: torch.Tensor) -> torch.Tensor:
    """float64 [M, K]: what the kernel's integer activations stand for, by the rule in `activations.h`."""
    fmt, chunk = spec.fmt, spec.chunk_blocks * 32
    cols, where = padded_columns(fmt, spec.k), column_map(fmt, spec.k)
    chunks = -(-cols // chunk)
    wide = torch.zeros(x.shape[0], chunks * chunk)
    wide[:, where] = x.float()
    parts = wide.reshape(x.shape[0], chunks, chunk)
    top = 127.0 if spec.limbs == 1 else 32639.0
    largest = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 1e-30, torch.tensor(top) / largest, torch.zeros(()))
    digits = torch.round(parts * inverse)
    values = digits.double() * (largest / torch.tensor(top)).double()
    return values.reshape(x.shape[0], chunks * chunk)[:, where]


def expected(spec: KernelSpec, x: torch.Tensor, weights: list[QTensor]) -> torch.Tensor:
    """float64 [M, sum(segments)]: products before the epilogue, with the spec's rounding of activations."""
    dense = torch.cat([w.dequantize() for w in weights]).double()
    return (rounded_activations(spec, x) if spec.limbs else x.double()) @ dense.T


def launch(
    run: Launcher,
    spec: KernelSpec,
    x: torch.Tensor,
    weights: list[QTensor],
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel's output; checks that nothing outside the output was written."""
    m, n, guard = x.shape[0], spec.n_out, 64
    room = torch.full((m * n + 2 * guard,), 7.0, dtype=DTYPES[spec.out_dtype])
    out = room[guard : guard + m * n].view(m, n)
    out.fill_(float("nan"))
    run(x.contiguous(), pack(weights, LAYOUTS["panel16"]), bias, residual, out)
    assert bool((room[:guard] == 7).all())
    assert bool((room[guard + m * n :] == 7).all())
    return out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference relative to the root mean square of what is expected."""
    if want.numel() == 0:
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().square().mean().sqrt().clamp_min(1e-30))
