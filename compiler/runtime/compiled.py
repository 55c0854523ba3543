"""Compiled code that is no kernel of a layer: built once per machine, and kept where kernels are."""

from __future__ import annotations

import logging
from pathlib import Path

from lowbit.codegen.backend import Source
from lowbit.codegen.cpp.backend import CppBackend
from lowbit.codegen.schedule import Schedule
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.runtime import prebuilt
from lowbit.compiler.runtime.cache import KernelCache, Keyed

__all__ = ["compiled"]

_log = logging.getLogger("lowbit")


def compiled(spec: Keyed, source: Source, what: str) -> Path:
    """The shared object of `source`, from the cache or the C++ compiler; `what` names it in messages.

    Raises KernelError: LB0409 in a frozen process whose cache lacks it, LB0410 or LB0413 from the compiler.
    """
    backend, cache, toolchain = CppBackend(), KernelCache(), CppBackend().toolchain()
    key = cache.key(spec, Schedule(), host_target(), source, toolchain)
    if found := cache.lookup(key):
        return found[0]
    if prebuilt.frozen():
        raise KernelError("LB0409", f"{what} is not in the cache, and {prebuilt.frozen()}")
    _log.info("compiling %s, once", what)
    evidence = {"spec": spec.key(), "backend": backend.name, "toolchain": toolchain, "error": 0.0}
    return cache.store(key, source.suffix, evidence, lambda artifact: backend.compile(source, artifact))
