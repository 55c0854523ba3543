"""The plan of a kernel, whatever its format."""

from __future__ import annotations

from typing import TypeAlias

from lowbit.codegen.cuda.plan import Plan
from lowbit.codegen.cuda.vector_plan import VectorPlan
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec

__all__ = ["AnyPlan", "make_plan"]

AnyPlan: TypeAlias = Plan | VectorPlan


def make_plan(spec: KernelSpec, schedule: Schedule) -> AnyPlan:
    """The plan of (spec, schedule): spec as `launch.core_spec` gives it."""
    return VectorPlan(spec, schedule) if spec.vector else Plan(spec, schedule)
