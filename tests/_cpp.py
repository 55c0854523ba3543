"""Building C++ kernels for tests, and what they should compute."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowbit.codegen.backend import Launcher, Source
from lowbit.codegen.cpp.backend import CppBackend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.qtensor import column_map, padded_columns
from lowbit.quantizers.vqtensor import VQTensor
from lowbit.quantizers.weights import QWeight, pack_weights, random_weight

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


def spec_of(
    fmt: str, compute: str, segments: tuple[int, ...], k: int, arch: str = "generic", **rest: object
) -> KernelSpec:
    """A spec in the layout that the C++ backend's kernels for `arch` read best; all of them read it."""
    layout = LAYOUTS[BACKEND.layout_of(parse_format(fmt), Target("cpu", arch))]
    return KernelSpec(segments, k, fmt, str(layout), compute, **rest)  # type: ignore[arg-type]


def build(jobs: list[Job], changed: Callable[[Source], Source] = lambda source: source) -> list[Launcher]:
    """Launchers of all jobs, compiled side by side, with their sources `changed`."""

    def one(n: int) -> Launcher:
        job = jobs[n]
        source = changed(BACKEND.emit(job.spec, job.chosen(), Target("cpu", job.arch)))
        artifact = Path(folder) / f"{n}.so"
        BACKEND.compile(source, artifact)
        return BACKEND.load(artifact, job.spec, job.chosen())

    with tempfile.TemporaryDirectory(prefix="lowbit-test-") as folder, ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(len(jobs))))


def tensors_of(spec: KernelSpec, seed: int = 0) -> list[Any]:
    """One random matrix per segment."""
    seeds = [torch.Generator().manual_seed(seed + i) for i in range(len(spec.segments))]
    return [random_weight(spec.weight_format, n, spec.k, s) for n, s in zip(spec.segments, seeds, strict=True)]


def rounded_activations(spec: KernelSpec, x: torch.Tensor) -> torch.Tensor:
    """float64 [M, K]: what the kernel's integer activations stand for, by the rule in `scalar_rows.h`."""
    fmt, chunk = spec.fmt, spec.chunk_blocks * 32
    cols, where = padded_columns(fmt, spec.k), column_map(fmt, spec.k)
    chunks = -(-cols // chunk)
    wide = torch.zeros(x.shape[0], chunks * chunk)
    wide[:, where] = x.float()
    parts = wide.reshape(x.shape[0], chunks, chunk)
    top = 127.0 if spec.limbs == 1 else 32639.0
    largest = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 1e-30, 1 / (largest / torch.tensor(top)), torch.zeros(()))
    digits = torch.round(parts * inverse)
    values = digits.double() * (largest / torch.tensor(top)).double()
    return values.reshape(x.shape[0], chunks * chunk)[:, where]


def rounded_vectors(spec: KernelSpec, x: torch.Tensor, q: VQTensor) -> torch.Tensor:
    """float64 [M, K]: the same for vector formats, whose chunks are of columns in stored order, and never of two groups
    or of outliers and others. Column norms are in it."""
    if spec.rounding is not None:
        return spec.rounding.apply(x.float()).double()
    perm = torch.arange(q.k) if q.perm is None else q.perm
    stored = (x.float() * q.norm_scale.float() if q.fmt.norm == "col" else x.float())[:, perm]
    outliers, size = q.fmt.partition(q.k)
    chunk, top, done = min(128, -(-max(size, outliers) // 16) * 16), 127.0 if spec.limbs == 1 else 32639.0, []
    for part in stored.split([outliers] * bool(outliers) + [size] * q.fmt.groups, 1):
        for piece in part.split(chunk, 1):
            step = piece.abs().amax(1, keepdim=True) / torch.tensor(top)
            done.append(torch.round(piece * (1 / step)).double() * step.double())
    return torch.cat(done, 1)[:, torch.argsort(perm)]


def expected(
    spec: KernelSpec, x: torch.Tensor, weights: list[QWeight], schedule: Schedule | None = None
) -> torch.Tensor:
    """float64 [M, sum(segments)]: products before the epilogue, with the spec's rounding of activations, unless the
    schedule's products are of bfloat16 numbers, which round nothing."""
    if spec.vector and spec.limbs:
        q = weights[0]
        ready = rounded_vectors(spec, x, q)
        if spec.vector.norm != "col":
            return ready @ torch.cat([w.dequantize() for w in weights]).double().T
        plain = replace(q, fmt=replace(q.fmt, norm="none"), norm_scale=None, norm_bias=None)
        return ready @ plain.dequantize().double().T + (x.double() @ q.norm_bias.double())[:, None]
    dense = torch.cat([w.dequantize() for w in weights]).double()
    rounds = spec.limbs and not (schedule and schedule.get("bf16", 0))
    return (rounded_activations(spec, x) if rounds else x.double()) @ dense.T


def launch(
    run: Launcher,
    spec: KernelSpec,
    x: torch.Tensor,
    weights: list[QWeight],
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel's output; checks that nothing outside the output was written."""
    m, n, guard = x.shape[0], spec.n_out, 64
    room = torch.full((m * n + 2 * guard,), 7.0, dtype=DTYPES[spec.out_dtype])
    out = room[guard : guard + m * n].view(m, n)
    out.fill_(float("nan"))
    run(x.contiguous(), pack_weights(weights, spec.layout_), bias, residual, out)
    assert bool((room[:guard] == 7).all())
    assert bool((room[guard + m * n :] == 7).all())
    return out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference relative to the root mean square of what is expected."""
    if want.numel() == 0:
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().square().mean().sqrt().clamp_min(1e-30))


def finished(spec: KernelSpec, y: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """y [M, rows], a product in float64, after the spec's epilogue."""
    for step in spec.epilogue:
        if step == "silu_mul":
            gate, up = y.chunk(2, dim=1)
            y = torch.nn.functional.silu(gate) * up
        else:
            y = y + (bias if step == "bias" else residual.double())
    return y


def check_bits(run: Launcher, spec: KernelSpec, weights: list[QWeight], x: torch.Tensor) -> torch.Tensor:
    """The kernel's output, whose bits depend neither on the number of threads nor on that of tokens."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        got = launch(run, spec, x, weights)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(launch(run, spec, x, weights), got)
            assert torch.equal(launch(run, spec, x[:1], weights), got[:1])
    finally:
        torch.set_num_threads(before)
    return got


def check_same(spec: KernelSpec, run: Launcher, plain: Launcher, tokens: Iterable[int], threads: int = 1) -> None:
    """A kernel has the bits of another one, on one thread and on `threads`, and is what the format defines."""
    weights, limit = tensors_of(spec), {"f32": 1e-5, "bf16": 2**-5, "f16": 2**-8}[spec.out_dtype]
    before = torch.get_num_threads()
    try:
        for m in tokens:
            rng = torch.Generator().manual_seed(m)
            x = torch.randn(m, spec.k, generator=rng).to(DTYPES[spec.x_dtype])
            bias = torch.randn(sum(spec.segments), generator=rng)
            residual = torch.randn(m, spec.n_out, generator=rng).to(DTYPES[spec.out_dtype])
            torch.set_num_threads(1)
            got = launch(run, spec, x, weights, bias, residual)
            assert torch.equal(got, launch(plain, spec, x, weights, bias, residual)), (spec, m)
            if not spec.activation:
                assert error(got, finished(spec, expected(spec, x, weights), bias, residual)) < limit, (spec, m)
            torch.set_num_threads(threads)
            assert threads == 1 or torch.equal(got, launch(run, spec, x, weights, bias, residual)), (spec, m)
    finally:
        torch.set_num_threads(before)
