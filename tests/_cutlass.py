"""Shared by tests of the CUTLASS backend: kernels compiled once, their PTX run on the CPU beside the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from _cuda import DTYPES, Layer, spec_of
from _ptx import Loaded

from lowbit.codegen.cutlass.backend import CutlassBackend
from lowbit.codegen.cutlass.launch import PARAMETERS, packed_columns
from lowbit.codegen.cutlass.offline import CutlassReport, inspect
from lowbit.codegen.cutlass.plan import Plan
from lowbit.codegen.cutlass.toolchain import installed
from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.sums import one_matrix, over_repeated
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["AMPERE", "BACKEND", "HOPPER", "Compiled", "compiled", "mma", "needs_dsl", "spec_of", "wgmma"]

BACKEND = CutlassBackend()
AMPERE, HOPPER = Target("cuda", "sm_80"), Target("cuda", "sm_90")
needs_dsl = pytest.mark.skipif(not installed(), reason="nvidia-cutlass-dsl is not installed")


def mma(tokens: int = 32, rows: int = 64, warps: int = 4, stages: int = 2) -> Schedule:
    """A schedule for mma.sync."""
    return Schedule(tokens, rows, 64, warps, stages).with_extra(resident=1)


def wgmma(tokens: int = 32, rows: int = 64, warps: int = 4, stages: int = 3) -> Schedule:
    """A schedule for wgmma."""
    return mma(tokens, rows, warps, stages).with_extra(wgmma=1)


@dataclass(frozen=True)
class Compiled:
    """A kernel with what the compiler made of it."""

    spec: KernelSpec
    plan: Plan
    report: CutlassReport

    def launch(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
        apart: Sequence[int] | None = None,
    ) -> None:
        """What `make_launcher`'s launcher does, by the interpreter. apart: warps, which run as far as each gets."""
        plan, made = self.plan, self.report.artifact
        given = {**weight.tensors, "x": packed_columns(plan)(x, weight), "bias": bias, "residual": residual, "out": out}
        args = [*[given.get(name) for name in PARAMETERS], x.shape[0]]
        grid = (plan.tile_sets * plan.token_blocks(x.shape[0]),)
        Loaded(self.report.ptx, made.kernel).launch(grid, (made.threads,), made.shared, args, apart=apart)

    def error(self, m: int, apart: Sequence[int] | None = None) -> float:
        """||kernel - reference|| / ||reference|| for m tokens; NaN when an element was not written."""
        layer = Layer.make(self.spec)
        x, residual = layer.inputs(m)
        out = torch.full((m, self.spec.n_out), float("nan"), dtype=DTYPES[self.spec.out_dtype])
        over_repeated(self.spec, partial(self.launch, apart=apart))(x, layer.weight, layer.bias, residual, out)
        want = run_reference(self.spec, x, layer.weight, layer.bias, residual).float()
        return float((out.float() - want).norm() / want.norm())


@cache
def compiled(spec: KernelSpec, schedule: Schedule, target: Target = HOPPER) -> Compiled:
    """The kernel, compiled once in a process."""
    return Compiled(spec, Plan(one_matrix(spec), schedule), inspect(BACKEND.emit(spec, schedule, target)))
