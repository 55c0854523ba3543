"""Building one kernel: choose backend and schedule, emit, compile, check against the reference, store, load."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.codegen.backend import Backend, Launcher, Source
from lowbit.codegen.check import TOLERANCE, check_kernel, sample_weight
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.select import candidates, quarantined, say_once
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune.space import schedule_text
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime.cache import KernelCache

__all__ = ["ATTEMPTS", "TOLERANCE", "BuiltKernel", "adopt_kernel", "build_kernel", "check_kernel", "sample_weight"]

ATTEMPTS = 3
"""Schedules of one backend that are tried before the next backend's turn comes."""

# No compiler, no cache: another schedule changes nothing.
_HOPELESS = ("LB0413", "LB0443", "LB0453", "LB0463", "LB0420", "LB0421")

_locks: dict[str, threading.Lock] = {}


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel ready to launch, with where it came from. artifact: its file, where the backend compiles one."""

    spec: KernelSpec
    backend: str
    schedule: Schedule
    launch: Launcher
    error: float
    artifact: Path | None = None


def build_kernel(spec: KernelSpec, target: Target, m: int, cache_: KernelCache) -> BuiltKernel:
    """The best kernel for `m` tokens that compiles and agrees with the reference.

    Of every backend, the one with the best candidate first, up to `ATTEMPTS` schedules are tried; each that fails is
    one line of the log, and when only the reference is left that is said once. A kernel is checked when it is built,
    and its error is stored beside it. Nothing is measured: what tuning found is looked up.
    """
    found: dict[str, list[tuple[Backend, Schedule]]] = {}
    for _, backend, schedule in candidates(spec, target, m):
        found.setdefault(backend.name, []).append((backend, schedule))
    for name, ranked in found.items():
        for backend, schedule in ranked[:ATTEMPTS]:
            try:
                return _build_with(backend, spec, schedule, target, cache_)
            except KernelError as e:
                say_once(f"{name} kernel of {spec.format} on {target} ({schedule_text(schedule)}): {e.message}")
                if e.code in _HOPELESS:
                    break
        say_once(f"backend {name} is left out for {spec.format} on {target}")
    raise KernelError("LB0407", f"no backend runs {spec.format} with layout {spec.layout} on {target}")


def adopt_kernel(
    backend: Backend, spec: KernelSpec, schedule: Schedule, target: Target, compiled: Path, error: float
) -> Path:
    """Put a kernel that tuning compiled and checked into the kernel cache; returns its place there."""
    cache_, source = KernelCache(), backend.emit(spec, schedule, target)
    key = cache_.key(spec, schedule, target, source, backend.toolchain())
    if found := cache_.lookup(key):
        return found[0]
    evidence = {**_evidence(backend, spec, schedule, target), "error": error}

    def take(artifact: Path) -> None:
        shutil.copyfile(compiled, artifact)

    return cache_.store(key, source.suffix, evidence, take)


def _build_with(
    backend: Backend, spec: KernelSpec, schedule: Schedule, target: Target, cache_: KernelCache
) -> BuiltKernel:
    if backend.name == "reference":
        say_once(f"{spec.format} runs on the reference backend on {target}: correct, but slow")
        return BuiltKernel(spec, backend.name, schedule, backend.load(cache_.root, spec, schedule), 0.0)
    source = backend.emit(spec, schedule, target)
    if why := quarantined(source, backend.toolchain(), target):
        raise KernelError("LB0476", f"is quarantined, tuning found: {why}", hint="tune again with --restart")
    key = cache_.key(spec, schedule, target, source, backend.toolchain())
    with _locks.setdefault(key, threading.Lock()):  # token classes that share a schedule share one build
        return _find_or_compile(backend, spec, schedule, target, cache_, source, key)


def _find_or_compile(
    backend: Backend,
    spec: KernelSpec,
    schedule: Schedule,
    target: Target,
    cache_: KernelCache,
    source: Source,
    key: str,
) -> BuiltKernel:
    if found := cache_.lookup(key):
        artifact, meta = found
        launch = backend.load(artifact, spec, schedule)
        return BuiltKernel(spec, backend.name, schedule, launch, float(meta["error"]), artifact)
    evidence = _evidence(backend, spec, schedule, target)

    def build(artifact: Any) -> None:
        backend.compile(source, artifact)
        evidence["error"] = check_kernel(spec, backend.load(artifact, spec, schedule), target)

    artifact = cache_.store(key, source.suffix, evidence, build)
    launch = backend.load(artifact, spec, schedule)
    return BuiltKernel(spec, backend.name, schedule, launch, float(evidence.get("error", 0.0)), artifact)


def _evidence(backend: Backend, spec: KernelSpec, schedule: Schedule, target: Target) -> dict[str, Any]:
    return {
        "spec": spec.key(),
        "schedule": schedule.to_dict(),
        "target": str(target),
        "backend": backend.name,
        "toolchain": backend.toolchain(),
    }
