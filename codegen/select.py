"""Choosing a backend and schedule for a kernel: by measurement where there is one, else by prediction."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache

from lowbit.codegen import BACKENDS, load_backend
from lowbit.codegen.backend import Backend, Source
from lowbit.codegen.invariant import one_for_all
from lowbit.codegen.rounded import ROUNDED
from lowbit.codegen.schedule import Schedule, m_class, token_class
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune.database import Entry, known
from lowbit.codegen.tune.device import device_name
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS, Layout
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import WeightFormat

__all__ = [
    "able",
    "candidates",
    "count_prebuilt",
    "forget_prebuilt",
    "kernel_layout",
    "layout_name",
    "measured",
    "quarantined",
    "rounded_between",
    "say_once",
    "serving",
    "stale",
    "supporting",
]

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
    them on this machine, or else of the first which has some. Backends that serve beside another one do not decide."""
    found = list(serving(fmt, target.kind, activation))
    usable = (b for b in found if (b.name, str(target)) in _PREBUILT or b.available(target) is None)
    backend = next((b for b in usable if b.name != "reference" and not b.beside), found[0])
    return backend.layout_of(fmt, target)


def kernel_layout(fmt: WeightFormat, target: Target, activation: str = "") -> Layout:
    """The layout called `layout_name`."""
    return LAYOUTS[layout_name(fmt, target, activation)]


_PREBUILT: set[tuple[str, str]] = set()


def count_prebuilt(backend: str, target: Target) -> None:
    """From now on `layout_name` counts a backend as able to run on `target`: compiled kernels of it are there."""
    _PREBUILT.add((backend, str(target)))


def forget_prebuilt() -> None:
    """No compiled kernels are there any more."""
    _PREBUILT.clear()


def able(spec: KernelSpec, target: Target, ahead: bool = False) -> Iterator[Backend]:
    """Backends that can run `spec`, in order. One that cannot is left out and named once in the log. The environment
    variable LOWBIT_BACKENDS, a list of names, leaves the others out. ahead: those that can compile it into files here,
    for a target that may be another machine's."""
    found: list[Backend] = []
    for name in _names():
        backend = load_backend(name)
        if target.kind not in backend.kinds or not backend.reads(spec):
            continue
        if why := (backend.builds if ahead else backend.available)(target) or backend.supports(spec, target):
            # Some serve beside a backend with kernels, where they can, and some in its place.
            if not ahead and backend.missed(found):
                say_once(f"backend {name} cannot run {spec.format} on {target}: {why}")
        else:
            found.append(backend)
            yield backend


def supporting(spec: KernelSpec, target: Target) -> Iterator[Backend]:
    """Backends with kernels for `spec` in its layout, whether or not they can be compiled here. Those that read any
    layout stand beside them and do not count."""
    for name in _names():
        backend = load_backend(name)
        fits = not backend.any_layout and backend.reads(spec)
        if target.kind in backend.kinds and fits and backend.supports(spec, target) is None:
            yield backend


def rounded_between(writer: KernelSpec, reader: KernelSpec, target: Target) -> tuple[KernelSpec, KernelSpec]:
    """The two kernels in whose place `writer`, whose output only `reader` multiplies, rounds it for `reader`. Raises
    KernelError: LB0422 or LB0423 where that is no kernel, LB0424 where no backend has it on the target."""
    pair = replace(writer, out_activation=reader.activation), replace(reader, x_dtype=ROUNDED)
    for spec in pair:
        if next(supporting(spec, target), None) is None:
            side = "reads" if spec.reads_rows and spec is pair[1] else "writes"
            raise KernelError("LB0424", f"no kernel of {spec.format} weights {side} {reader.activation} on {target}")
    return pair


def candidates(
    spec: KernelSpec, target: Target, m: int, *, ahead: bool = False
) -> list[tuple[float, Backend, Schedule]]:
    """Every (seconds, backend, schedule) that can run `spec` for `m` tokens, best first; the reference is always last.

    What was measured on this device comes first, by its time; then what the cost models predict, backends that only
    stand in for another one behind it. Nothing is measured here. ahead: as in `able`.
    """
    backends = list(able(spec, target, ahead))
    if spec.invariant:
        return one_for_all(spec, target, backends)
    found = [(b.predict(spec, s, target, m), b, s) for b in backends for s in b.schedules(spec, target, m)]
    found.sort(key=lambda c: (c[1].name == "reference", c[1].waits(backends), c[0]))
    first = sorted(((e.seconds, b, e.schedule) for b, e in measured(spec, target, m, backends)), key=lambda c: c[0])
    taken = {(backend.name, schedule) for _, backend, schedule in first}
    return [*first, *(c for c in found if (c[1].name, c[2]) not in taken)]


def measured(spec: KernelSpec, target: Target, m: int, backends: Sequence[Backend]) -> Iterator[tuple[Backend, Entry]]:
    """What the tuning database knows about a kernel on this device, as far as it still holds."""
    device = device_name(target)
    entries = known(device).entries if device else {}
    if not entries:
        return
    for backend in backends:
        # Schedules for many tokens are those of the largest class, unless one was measured for just so many.
        places = ((backend.name, spec.key(), tokens) for tokens in (token_class(m), m_class(m)))
        entry = next((entries[place] for place in places if place in entries), None)
        if entry is None:
            continue
        if why := stale(entry, backend, spec, target):
            _log.info("the measurement of %s for %d tokens is not used: %s", spec.format, entry.tokens, why)
        else:
            yield backend, entry


def quarantined(source: Source, toolchain: str, target: Target) -> str | None:
    """Why tuning found that a kernel must not be used on this device, or None."""
    device = device_name(target)
    found = known(device).failures.get((source.digest, toolchain)) if device else None
    return found.reason if found else None


@lru_cache(maxsize=4096)
def stale(entry: Entry, backend: Backend, spec: KernelSpec, target: Target) -> str | None:
    """Why an entry does not hold any more, or None."""
    if why := backend.illegal(spec, entry.schedule, target):
        return f"its schedule cannot run any more: {why}"
    try:
        code = backend.emit(spec, entry.schedule, target).digest
    except KernelError as e:
        return f"its schedule cannot be generated any more: {e.message}"
    return None if code == entry.code else "the generator writes other code for its schedule now"


@cache
def say_once(message: str) -> None:
    """Log a warning the first time it is said in this process."""
    _log.warning("%s", message)
