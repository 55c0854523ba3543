"""Choosing a backend and schedule for a kernel: by prediction, the reference last."""

from __future__ import annotations

import logging
import os
from functools import cache

from lowbit.codegen import BACKENDS, load_backend
from lowbit.codegen.backend import Backend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target

__all__ = ["candidates", "say_once"]

_log = logging.getLogger("lowbit")


def candidates(spec: KernelSpec, target: Target, m: int) -> list[tuple[float, Backend, Schedule]]:
    """Every (predicted seconds, backend, schedule) that can run `spec` for `m` tokens, best first.

    A backend that cannot is left out and named once in the log. The reference is always last. The environment variable
    LOWBIT_BACKENDS, a list of names, leaves the others out.
    """
    found: list[tuple[float, Backend, Schedule]] = []
    for name in os.environ.get("LOWBIT_BACKENDS", ",".join(BACKENDS)).split(","):
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
