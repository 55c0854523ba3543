"""A backend whose schedules say how they behave, for tests of tuning; computes with the reference."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from lowbit.codegen import BACKENDS, load_backend
from lowbit.codegen.backend import Backend, Launcher, Source
from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune import tuner
from lowbit.codegen.tune.nursery import Nursery, OutOfTime
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.qtensor import PackedWeight

GOOD, SLOW, WRONG, CRASH, HANG, BROKEN, THROWS, ILLEGAL, RAGGED = range(9)
"""What `Schedule.get("does", 0)` says a kernel does. RAGGED is right for 16 tokens only."""

ORDER = (SLOW, GOOD, WRONG, CRASH, HANG, BROKEN, THROWS, ILLEGAL, RAGGED)
"""The space, best predicted first, unless $LOWBIT_FAKE_SPACE lists others."""


def _order() -> tuple[int, ...]:
    asked = os.environ.get("LOWBIT_FAKE_SPACE", "")
    return tuple(int(does) for does in asked.split(",")) if asked else ORDER


def schedule(does: int) -> Schedule:
    """The fake schedule that behaves so."""
    return Schedule(tile_m=1 + does).with_extra(does=does)


class SharedNursery(Nursery):
    """One process for all tests: importing torch takes longer than they do."""

    base = Nursery(float("inf"))

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._pids: list[int] = []

    def spawn(self, files: tuple[int, int, int]) -> int:
        if time.monotonic() >= self.deadline:
            raise OutOfTime
        self._pids.append(self.base.spawn(files))
        return self._pids[-1]

    def status(self, pid: int) -> int:
        self._pids.remove(pid)
        return self.base.status(pid)

    def close(self) -> None:
        self.deadline = 0.0
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def use_fake(patch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Kernels of this backend only, with cache and database in `folder`; returns the log of compilations."""
    patch.setitem(BACKENDS, "fake", "_tune_backend:FakeBackend")
    patch.setenv("LOWBIT_BACKENDS", "fake,reference")
    patch.setenv("LOWBIT_CACHE", str(folder))
    patch.delenv("LOWBIT_TUNING", raising=False)
    patch.setattr(tuner, "Nursery", SharedNursery)
    load_backend.cache_clear()
    (folder / "log").touch()
    return folder / "log"


class FakeBackend(Backend):
    """Serves CPUs with the layout of the C++ kernels. Every compilation is counted in the cache folder's file `log`."""

    name = "fake"
    kinds = ("cpu",)
    layout = "panel16"
    vector_layout = "vectors8"
    traits = (("does",),)

    def available(self, target: Target) -> str | None:
        return None

    def supports(self, spec: KernelSpec, target: Target) -> str | None:
        return None

    def space(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        return [schedule(does) for does in _order()]

    def illegal(self, spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
        return "needs 99 bytes of shared memory" if schedule.get("does", 0) == ILLEGAL else None

    def predict(self, spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
        return 1e-6 * (1 + _order().index(schedule.get("does", 0)))

    def emit(self, spec: KernelSpec, schedule: Schedule, target: Target) -> Source:
        version = os.environ.get("LOWBIT_FAKE_VERSION", "1")
        return Source(f"{version} {spec.key()} {schedule.get('does', 0)}", ".fake")

    def compile(self, source: Source, out: Path) -> None:
        does = int(source.text.rsplit(" ", 1)[1])
        with open(out.parents[2] / "log", "a") as file:  # of the folder that `use_fake` was given
            file.write(f"{does}\n")
        if does == BROKEN:
            raise KernelError("LB0410", "the compiler does not like it")
        out.write_text(source.text)

    def toolchain(self) -> str:
        return "fake 1"

    def load(self, artifact: Path, spec: KernelSpec, schedule: Schedule) -> Launcher:
        does = int(artifact.read_text().rsplit(" ", 1)[1])

        def launch(
            x: torch.Tensor,
            weight: PackedWeight,
            bias: torch.Tensor | None,
            residual: torch.Tensor | None,
            out: torch.Tensor,
        ) -> None:
            if does == CRASH:
                print("about to die", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            if does == HANG:
                time.sleep(3600)
            if does == THROWS:
                raise RuntimeError("refuses the call")
            if does == SLOW:
                time.sleep(0.02)
            out.copy_(run_reference(spec, x, weight, bias, residual))
            if does == WRONG or (does == RAGGED and x.shape[0] != 16):
                out[0, 0] += 1000

        return launch
