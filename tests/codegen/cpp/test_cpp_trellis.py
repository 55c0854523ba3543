"""Trellises in generated C++: every kind of products on every instruction set, and the compiled search for codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _cpp import BACKEND, DTYPES, Job, build, error, expected, finished, launch, spec_of, tensors_of

from lowbit.codegen import load_backend
from lowbit.codegen.cpp.paths import PathsSpec, load_paths, paths_source
from lowbit.codegen.cpp.trellis import hash_of
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import CPU_ISAS, Target, host_target, isa_runs_here
from lowbit.quantizers.formats import TrellisElement, parse_format, scalar_format
from lowbit.quantizers.methods.trellis import cheapest_paths, value_table

pytestmark = pytest.mark.skipif(
    BACKEND.available(host_target()) is not None, reason=str(BACKEND.available(host_target()))
)
HOST = host_target().arch
# Every width in one plane and in two, padded columns, groups, several segments, few and many tokens.
CASES = [
    ("tcq2.ch", "int8", (33,), 200, 1),
    ("tcq2.g64", "int16", (48, 21), 320, 17),
    ("tcq3.g32.f32", "int16", (17, 20), 160, 1),
    ("tcq3.ch", "int8", (40,), 576, 17),
    ("tcq1.g96", "int16", (33,), 330, 2),
    ("tcq4.ch", "int8", (17,), 100, 1),
    ("tcq4.g64", "float", (33,), 200, 1),
    ("tcq3.ch", "float", (17,), 133, 17),
]


@pytest.mark.parametrize("arch", [HOST, *(a for a in CPU_ISAS if a != HOST and isa_runs_here(a))])
def test_kernels_of_every_kind(arch: str) -> None:
    jobs = [Job(spec_of(*case[:4], arch, epilogue=("bias",)), arch, case[4]) for case in CASES]
    for job, run in zip(jobs, build(jobs), strict=True):
        spec, weights = job.spec, tensors_of(job.spec)
        for m in (1, 3, 17):
            rng = torch.Generator().manual_seed(m)
            x = torch.randn(m, spec.k, generator=rng).to(DTYPES[spec.x_dtype])
            bias = torch.randn(sum(spec.segments), generator=rng)
            want = finished(spec, expected(spec, x, weights), bias, torch.empty(0))
            assert error(launch(run, spec, x, weights, bias), want) < 3e-6, (spec.format, job.arch, job.chosen(), m)


def test_only_their_own_layout_is_read() -> None:
    target = Target("cpu", "avx2")
    assert BACKEND.layout_of(parse_format("tcq2.g64"), target) == "runs16"
    spec = spec_of("tcq2.g64", "int8", (16,), 64)
    assert BACKEND.supports(spec, target) is None
    for other in ("panel16", "whole16"):
        assert "layout" in (BACKEND.supports(spec_in(other, "tcq2.g64"), target) or "")
    assert "layout" in (BACKEND.supports(spec_in("runs16", "int2.g64.sym"), target) or "")


def spec_in(layout: str, fmt: str) -> KernelSpec:
    return KernelSpec((16,), 64, fmt, str(LAYOUTS[layout]), "int8")


def test_gpu_kernels_of_cuda_decline_by_name() -> None:
    why = load_backend("cuda").serves(parse_format("tcq2.g64"))
    assert why is not None
    assert "tcq2" in why
    assert load_backend("triton").serves(parse_format("tcq2.g64")) is None


def test_hashes_are_read_off_the_decode_program() -> None:
    found = hash_of(TrellisElement(2))
    assert (found.dropped, found.middle) == (2, 96)
    with pytest.raises(KernelError, match="LB0411"):
        hash_of(scalar_format("int2.g64.sym").element)


def cost(
    element: TrellisElement, codes: torch.Tensor, target: torch.Tensor, importance: torch.Tensor, register: torch.Tensor
) -> torch.Tensor:
    """What each row's path costs."""
    total, state = torch.zeros(len(codes)), register.long()
    for t in range(codes.shape[1]):
        state = state >> element.bits | codes[:, t].long() << (element.state_bits - element.bits)
        total += importance[:, t] * (value_table(element)[state] - target[:, t]).square()
    return total


@pytest.mark.parametrize("bits", range(1, 5))
def test_compiled_search_is_that_of_torch(bits: int, tmp_path: Path) -> None:
    element = TrellisElement(bits)
    artifact = tmp_path / "paths.so"
    BACKEND.compile(paths_source(PathsSpec(bits, element.state_bits), HOST), artifact)
    search, rng = load_paths(artifact), torch.Generator().manual_seed(bits)
    for columns in (1, 19):
        target, importance = torch.randn(21, columns, generator=rng) * 40, torch.rand(21, columns, generator=rng)
        register = torch.randint(0, 2**element.state_bits, (21,), generator=rng, dtype=torch.int32)
        wanted = cheapest_paths(element, target, importance, register)
        found = search(element, target, importance, register)
        assert (found == wanted).float().mean() > 0.99  # ties may go either way
        costs = [cost(element, codes, target, importance, register) for codes in (found, wanted)]
        assert torch.allclose(*costs, rtol=1e-5)
