"""Schedules of any kernel: those of scalar formats (`space.py`) and of vector formats (`vector_space.py`) as one."""

from __future__ import annotations

from collections.abc import Iterator

from lowbit.codegen.cuda import model
from lowbit.codegen.cuda import space as scalar
from lowbit.codegen.cuda import vector_space as vector
from lowbit.codegen.cuda.any_plan import AnyPlan
from lowbit.codegen.cuda.vector_plan import VectorPlan
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target

__all__ = ["candidates", "illegal", "predict", "space"]


def space(spec: KernelSpec, target: Target, m: int) -> Iterator[Schedule]:
    """Schedules worth considering for `m` tokens, legal or not."""
    return (vector.vector_space if spec.vector else scalar.space)(spec, target, m)


def candidates(spec: KernelSpec, target: Target, m: int) -> tuple[Schedule, ...]:
    """Legal schedules for `m` tokens, the predicted best first."""
    return (vector.vector_candidates if spec.vector else scalar.candidates)(spec, target, m)


def illegal(plan: AnyPlan, target: Target) -> str | None:
    """Why a plan cannot run on `target`, or None."""
    return vector.illegal_vectors(plan, target) if isinstance(plan, VectorPlan) else scalar.illegal(plan, target)


def predict(plan: AnyPlan, target: Target, m: int) -> float:
    """Seconds of one call with `m` tokens whose weights are not in any cache."""
    return vector.predict_vectors(plan, target, m) if isinstance(plan, VectorPlan) else model.predict(plan, target, m)
