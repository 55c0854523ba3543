"""Tuning on a real GPU: the same mechanism as on CPUs, for the backends that run there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowbit.codegen import load_backend
from lowbit.codegen.check import Oracle, Sample
from lowbit.codegen.select import candidates
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune.tuner import Job, Options, tune_kernels
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime.build import adopt_kernel, build_kernel
from lowbit.compiler.runtime.cache import KernelCache
from lowbit.quantizers.formats import parse_format

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_kernel_is_tuned_and_then_used(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    major, minor = torch.cuda.get_device_capability()
    target, backend = Target("cuda", f"sm_{major}{minor}"), load_backend(name)
    if why := backend.available(target):
        pytest.skip(why)
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setenv("LOWBIT_BACKENDS", f"{name},reference")
    monkeypatch.delenv("LOWBIT_TUNING", raising=False)
    layout = LAYOUTS[backend.layout_of(parse_format("int4.g128.sym"))]
    spec = KernelSpec((512,), 1024, "int4.g128.sym", str(layout), "float", "bf16", "bf16")
    jobs = [Job(spec, m) for m in (1, 16)]
    options = Options(budget=300, candidates=3, neighbours=1, builders=2)
    outcomes = tune_kernels(
        jobs, target, options, adopt=lambda b, s, c, path, e: adopt_kernel(b, s, c, target, path, e)
    )
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert outcome.entry is not None, outcome
        assert outcome.entry.complete
        assert candidates(spec, target, job.tokens)[0][2] == outcome.entry.schedule
        kernel = build_kernel(spec, target, job.tokens, KernelCache())
        assert kernel.schedule == outcome.entry.schedule
        assert Oracle(Sample(spec, target, 5), job.tokens).check(kernel.launch) < 2e-2
