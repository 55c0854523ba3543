"""Building kernels with TVM for tests."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from lowbit.codegen.backend import Launcher
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tvm.backend import TvmBackend
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target, host_target

__all__ = ["BACKEND", "BUFFERED", "FEW", "HOST", "ONE", "build", "needs_tvm", "spec_of"]

BACKEND = TvmBackend()
HOST = host_target()
needs_tvm = pytest.mark.skipif(BACKEND.available(HOST) is not None, reason=str(BACKEND.available(HOST)))

ONE, FEW = Schedule(1, 32), Schedule(3, 16)
BUFFERED = Schedule(4, 16, 64).with_extra(buffered=1)
"""Schedules of every kind; chunks of 64 columns, so that small matrices have several."""


def spec_of(fmt: str, segments: tuple[int, ...], k: int, layout: str = "panel16", **rest: object) -> KernelSpec:
    """A spec with float products in one of the layouts that are read."""
    plain = KernelSpec(segments, k, fmt, str(LAYOUTS[layout]), "float")
    return replace(plain, **rest)  # type: ignore[arg-type]


def build(spec: KernelSpec, schedule: Schedule, target: Target = HOST) -> Launcher:
    """A compiled and loaded kernel."""
    source = BACKEND.emit(spec, schedule, target)
    with tempfile.TemporaryDirectory(prefix="lowbit-test-") as folder:
        artifact = Path(folder) / f"kernel{source.suffix}"
        BACKEND.compile(source, artifact)
        return BACKEND.load(artifact, spec, schedule)
