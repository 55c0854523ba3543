"""Kernels of float formats: every code comes out of every backend as exactly its number, and sums are right."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import cycle

import pytest
import torch
from _cpp import BACKEND, Job, build, error, expected, launch, spec_of, tensors_of

from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.interpret import Call, run_interpreted
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import CPU_ISAS, host_target, isa_runs_here
from lowbit.quantizers.formats import scalar_format
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.weights import pack_weights, random_weight

FORMATS = ["e2m1.g16.e4m3.t32", "e3m2.ch", "e2m3.g32.e8m0", "e4m3.ch.f32", "e5m2.g48"]
K, ROWS = 64, 24


def all_codes(text: str) -> QTensor:
    """Every finite code of the format, several times over, [ROWS, K]."""
    q = random_weight(scalar_format(text), ROWS, K, torch.Generator().manual_seed(0))
    assert isinstance(q, QTensor)
    codes = q.fmt.element.levels().isfinite().nonzero().flatten().to(torch.uint8)
    return QTensor(
        q.fmt, codes[torch.arange(ROWS * K) % len(codes)].reshape(ROWS, K), q.scale, tensor_scale=q.tensor_scale
    )


@pytest.mark.parametrize("text", FORMATS)
def test_reference_gives_every_number(text: str) -> None:
    q = all_codes(text)
    for layout in ("panel16", "words"):
        spec = KernelSpec((ROWS,), K, text, str(LAYOUTS[layout]), "float")
        out = run_reference(spec, torch.eye(K), pack_weights([q], spec.layout_))
        assert torch.equal(out, q.dequantize().T)


@pytest.mark.skipif(BACKEND.available(host_target()) is not None, reason="no C++ compiler")
def test_cpp_gives_every_number() -> None:
    """Few tokens and many, and every instruction set this machine runs."""
    archs = cycle([a for a in CPU_ISAS if isa_runs_here(a)])
    jobs = []
    for i, (text, arch) in enumerate(zip(FORMATS, archs, strict=False)):
        schedule = Schedule(2, 16).with_extra(buffered=i % 2)
        jobs.append(Job(spec_of(text, "float", (ROWS,), K), arch, 2, schedule))
    for job, run in zip(jobs, build(jobs), strict=True):
        q = all_codes(job.spec.format)
        assert torch.equal(launch(run, job.spec, torch.eye(K), [q]), q.dequantize().T), (job.spec.format, job.arch)
        x, weights = torch.randn(5, K, generator=torch.Generator().manual_seed(1)), tensors_of(job.spec)
        assert error(launch(run, job.spec, x, weights), expected(job.spec, x, weights)) < 3e-6


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_gives_every_number() -> None:
    shapes = [Schedule(64, 32, 64, 4, 3), Schedule(2, 32, 64, 4, 2).with_extra(gemv=1, scale_after=1)]
    calls = []
    for text in FORMATS:
        spec = KernelSpec((ROWS,), K, text, str(LAYOUTS["words"]), "float")
        weight = pack_weights([all_codes(text)], spec.layout_)
        calls += [Call(spec, s, torch.eye(K)[: 64 if s.tile_m > 2 else 6], weight) for s in shapes]
    for call, out in zip(calls, run_interpreted(calls), strict=True):
        want = all_codes(call.spec.format).dequantize().T[: call.x.shape[0]]
        assert torch.equal(out, want), (call.spec.format, call.schedule)
