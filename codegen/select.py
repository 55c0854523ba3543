"""Choosing a backend and schedule for a kernel: by prediction, the reference last."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cache

from lowbit.codegen import BACKENDS, load_backend
from lowbit.codegen.backend import Backend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS, Layout
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import WeightFormat

__all__ = ["candidates", "kernel_layout", "layout_name", "say_once", "serving"]

_log = logging.getLogger("lowbit")


def _names() -> list[str]:
    return os.environ.get("LOWBIT_BACKENDS", ",".join(BACKENDS)).split(",")


def serving(fmt: WeightFormat, kind: str, activation: str = "") -> Iterator[Backend]:
    """Backends for a kind of device that have kernels for `fmt` and activations in `activation` (text of an
    ActivationFormat, or empty), in order; the reference is always among them."""
    for name in dict.fromkeys((*_names(), "reference")):
        backend = load_backend(name)
        if kind in backend.kinds and backend.serves(fmt, activation) is None:
            yield backend


def layout_name(fmt: WeightFormat, target: Target, activation: str = "") -> str:
    """The packed layout that kernels of `fmt` read on a target: that of the first backend which has some and can build
    them on this machine, or else of the first which has some."""
    found = list(serving(fmt, target.kind, activation))
    backend = next((b for b in found if b.name != "reference" and b.available(target) is None), found[0])
    return backend.layout_of(fmt)


def kernel_layout(fmt: WeightFormat, target: Target, activation: str = "") -> Layout:
    """The layout called `layout_name`."""
    return LAYOUTS[layout_name(fmt, target, activation)]


def candidates(spec: KernelSpec, target: Target, m: int) -> list[tuple[float, Backend, Schedule]]:
    """Every (predicted seconds, backend, schedule) that can run `spec` for `m` tokens, best first.

    A backend that cannot is left out and named once in the log. The reference is always last. The environment variable
    LOWBIT_BACKENDS, a list of names, leaves the others out.
    """
    found: list[tuple[float, Backend, Schedule]] = []
    for name in _names():
        backend = load_backend(name)
        if target.kind not in backend.kinds or (
            name != "reference" and spec.layout_ != LAYOUTS[backend.layout_of(spec.weight_format)]
        ):
            continue
        if why := backend.available(target) or backend.supports(spec, target):
            say_once(f"backend {name} cannot run {spec.format} on {target}: {why}")
            continue
        found += [(backend.predict(spec, s, target, m), backend, s) for s in backend.schedules(spec, target, m)]
    return sorted(found, key=lambda c: (c[1].name == "reference", c[0]))


@cache
def say_once(message: str) -> None:
    """Log a warning the first time it is said in this process."""
    _log.warning("%s", message)
