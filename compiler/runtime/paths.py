"""Has trellises' codes searched by compiled code, where there is a compiler."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from torch import Tensor

from lowbit.codegen.cpp.backend import CppBackend
from lowbit.codegen.cpp.paths import PathsSpec, load_paths, paths_source
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.select import say_once
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.runtime.cache import KernelCache
from lowbit.quantizers.formats import Element, Format, WeightFormat
from lowbit.quantizers.methods.trellis import Paths, cheapest_paths, use_search

__all__ = ["prepare_search"]

_log = logging.getLogger("lowbit")


def prepare_search(fmt: WeightFormat) -> None:
    """Before a matrix is quantized to `fmt`: where that is a trellis, have its paths searched by compiled code."""
    if isinstance(fmt, Format) and fmt.element.window > 1:
        use_search(_search)


def _search(element: Element, target: Tensor, importance: Tensor, register: Tensor) -> Tensor:
    on_cpu = target.device.type == "cpu"
    search = _compiled(element.bits, element.state_bits) if on_cpu else cheapest_paths
    return search(element, target, importance, register)


@cache
def _compiled(bits: int, state_bits: int) -> Paths:
    try:
        return load_paths(_artifact(PathsSpec(bits, state_bits)))
    except KernelError as e:
        say_once(f"codes of trellises are searched by torch, which takes about twenty times as long: {e.message}")
        return cheapest_paths


def _artifact(spec: PathsSpec) -> Path:
    """The compiled search, from the cache or a compiler. Raises KernelError (LB04xx)."""
    backend, cache_, target = CppBackend(), KernelCache(), host_target()
    source, toolchain = paths_source(spec, target.arch), backend.toolchain()
    key = cache_.key(spec, Schedule(), target, source, toolchain)
    if found := cache_.lookup(key):
        return found[0]
    _log.info("compiling the search for codes of trellises, once")
    evidence = {"spec": spec.key(), "backend": backend.name, "toolchain": toolchain, "error": 0.0}
    return cache_.store(key, source.suffix, evidence, lambda artifact: backend.compile(source, artifact))
