"""The linear kernels of a program: the same artifacts the modules use, reached by address."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lowbit.codegen.cpp.bytes_plan import vector_plan
from lowbit.codegen.cpp.launch import load_openmp
from lowbit.codegen.cpp.plan import KernelPlan, Plan
from lowbit.codegen.schedule import M_CLASSES
from lowbit.compiler.errors import RunError
from lowbit.compiler.runtime.build import BuiltKernel
from lowbit.compiler.runtime.dispatch import kernel_for
from lowbit.compiler.runtime.program.structures import CKernel

__all__ = ["KernelTable", "step_sizes"]

_CPU = torch.device("cpu")
_STEPS = (1, 4, 16, 64, 512)


def step_sizes(max_tokens: int) -> tuple[int, ...]:
    """Token counts a program has kernels for: fewer than the modules, since prompts are cut as the program likes.

    >>> step_sizes(64), step_sizes(3)
    ((1, 4, 16, 64), (1, 4))
    """
    top = next((m for m in M_CLASSES if m >= max_tokens), M_CLASSES[-1])
    return tuple(sorted({*(m for m in _STEPS if m < top), top}))


@dataclass(frozen=True)
class KernelTable:
    """The kernels of one spec (as text), by the number of tokens they serve."""

    key: str
    sizes: tuple[int, ...]

    @cached_property
    def built(self) -> list[tuple[BuiltKernel, KernelPlan]]:
        """Builds what is missing; raises RunError (LB0561) where no C++ kernel can be had."""
        return [(b, _plan(b)) for b in (kernel_for(self.key, torch.float32, _CPU, m) for m in self.sizes)]

    @cached_property
    def structure(self) -> Any:
        """The C table."""
        load_openmp()
        table = CKernel(classes=len(self.sizes))
        for i, (built, _) in enumerate(self.built):
            run = ctypes.CDLL(str(built.artifact)).lb_run
            table.tokens[i], table.run[i] = self.sizes[i], ctypes.cast(run, ctypes.c_void_p).value
        return table

    def scratch(self, tokens: int, threads: int) -> int:
        """Bytes a call with up to `tokens` tokens needs, as checked in run.h."""
        return max(p.shared_bytes + p.token_bytes * tokens + p.thread_bytes * threads + 256 for _, p in self.built)


def _plan(built: BuiltKernel) -> KernelPlan:
    if built.backend != "cpp" or built.artifact is None:
        raise RunError(
            "LB0561",
            f"no C++ kernel runs {built.spec.format} here",
            hint="install g++ (see `quantize doctor`), or use mode='modules'",
        )
    spec = replace(built.spec, x_dtype="f32", out_dtype="f32")
    return vector_plan(spec, built.schedule) if spec.vector else Plan(spec, built.schedule)
