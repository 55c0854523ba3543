"""Generated C++ of other kinds than linear layers (attention, tables): found in the cache, or compiled and checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lowbit.codegen.backend import Source
from lowbit.codegen.cpp.backend import CppBackend
from lowbit.codegen.schedule import Schedule
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime import prebuilt
from lowbit.compiler.runtime.cache import KernelCache, Keyed

__all__ = ["build_native"]

K = TypeVar("K")


def build_native(
    spec: Keyed,
    source: Source,
    target: Target,
    cache_: KernelCache,
    load: Callable[[Path], K],
    check: Callable[[K], object],
    what: str,
) -> K:
    """The kernel of `source`, which `load` makes callable. check: raises KernelError where it is wrong; called when it
    was just compiled. what: names it. Raises KernelError (LB04xx), in frozen mode wherever none is stored."""
    backend = CppBackend()
    key = cache_.key(spec, Schedule(), target, source, backend.toolchain())
    if found := cache_.lookup(key):
        return load(found[0])
    if prebuilt.frozen():
        raise prebuilt.missing_kernel(what, target)
    evidence = {
        "spec": spec.key(),
        "target": str(target),
        "backend": backend.name,
        "toolchain": backend.toolchain(),
        "error": 0.0,
    }

    def build(artifact: Path) -> None:
        backend.compile(source, artifact)
        check(load(artifact))

    return load(cache_.store(key, source.suffix, evidence, build))
