"""Binary coding in generated C++: terms of a sum meet the same prepared activations, whatever forms the products."""

from __future__ import annotations

import pytest
import torch
from _cpp import BACKEND, DTYPES, Job, build, error, expected, launch, spec_of, tensors_of

from lowbit.codegen.schedule import Schedule
from lowbit.compiler.ir.target import CPU_ISAS, Target, host_target, isa_runs_here
from lowbit.quantizers.weights import pack_weights

pytestmark = pytest.mark.skipif(
    BACKEND.available(host_target()) is not None, reason=str(BACKEND.available(host_target()))
)
HOST = host_target().arch
# Ragged groups, padded groups, scales of rows, several segments, every kind of products, few and many tokens.
CASES = [
    ("bcq2.g64", "int8", (33,), 200, 1),
    ("bcq3.g48.f32", "int16", (17, 20), 160, 1),
    ("bcq2.ch", "int8", (40,), 576, 17),
    ("bcq4.g32", "float", (17,), 100, 1),
    ("bcq3.g128.e8m0", "float", (33,), 576, 17),
]
TOKENS = (1, 2, 3, 8, 17)


def check(jobs: list[Job]) -> None:
    """Every kernel at every number of tokens, against what the format defines."""
    for job, run in zip(jobs, build(jobs), strict=True):
        spec, weights = job.spec, tensors_of(job.spec)
        for m in TOKENS:
            x = torch.randn(m, spec.k, generator=torch.Generator().manual_seed(m)).to(DTYPES[spec.x_dtype])
            got = launch(run, spec, x, weights)
            assert error(got, expected(spec, x, weights)) < 3e-6, (spec.format, job.arch, job.chosen(), m)


def looked_up(job: Job) -> Schedule:
    """The first schedule that looks sums up instead of computing them."""
    return next(s for s in BACKEND.space(job.spec, Target("cpu", job.arch), job.m) if s.get("lut", 0))


@pytest.mark.parametrize("arch", [HOST, *(a for a in CPU_ISAS if a != HOST and isa_runs_here(a))])
def test_kernels_of_every_kind(arch: str) -> None:
    check([Job(spec_of(fmt, compute, n, k, arch), arch, m) for fmt, compute, n, k, m in CASES])


@pytest.mark.skipif(not isa_runs_here("avx2"), reason="needs AVX2")
def test_sums_are_looked_up_in_the_same_tables() -> None:
    jobs = [Job(spec_of(*case[:4], "avx2"), "avx2", 1) for case in CASES[:3]]
    check([Job(job.spec, job.arch, 1, looked_up(job)) for job in jobs])


def test_activations_are_prepared_once_for_all_terms() -> None:
    """Two terms need the room of prepared activations that one needs."""
    one, two = (spec_of(fmt, "int8", (64,), 512) for fmt in ("int1.g64.sym", "bcq2.g64"))
    texts = [BACKEND.emit(s, Job(s, "generic", 1).chosen(), Target("cpu", "generic")).text for s in (one, two)]
    rows = [next(line for line in text.splitlines() if "kChunkRows =" in line) for text in texts]
    assert rows[0] == rows[1]
    assert one.chunks * 2 == two.chunks


def test_rounded_activations_of_tokens() -> None:
    spec = spec_of("bcq2.g64", "int8", (33,), 200, activation="int8.token")
    weights, (run,) = tensors_of(spec), build([Job(spec, HOST, 2)])
    x = torch.randn(3, spec.k, generator=torch.Generator().manual_seed(0))
    assert spec.rounding is not None
    want = spec.rounding.apply(x).double() @ weights[0].dequantize().double().T
    assert error(launch(run, spec, x, weights), want) < 3e-6


def test_one_weight_per_term_and_bit() -> None:
    """Packed words are the codes and nothing else."""
    (weight,) = tensors_of(spec_of("bcq3.g64", "int8", (32,), 256))
    packed = pack_weights([weight], spec_of("bcq3.g64", "int8", (32,), 256).layout_)
    assert packed.nbytes() * 8 == 32 * 256 * 3 + 32 * 4 * 3 * 16
