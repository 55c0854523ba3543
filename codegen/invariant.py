"""One schedule for every number of tokens, so that a token's result does not depend on the others.

Kernels for few and for many tokens add in different orders, so the bits of a result change with the size of the batch,
and with them, now and then, a sampled token. A batch-invariant kernel keeps one order: one schedule, with its tiles,
its split of the columns and its products, for calls of any size. It is the one that loses least, over all sizes,
against the best schedule of each. After "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lowbit.codegen.backend import Backend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target

__all__ = ["TOKENS", "one_for_all"]

TOKENS = (1, 8, 64, 512)
"""Calls by which a schedule is judged."""


def one_for_all(spec: KernelSpec, target: Target, backends: Sequence[Backend]) -> list[tuple[float, Backend, Schedule]]:
    """(score, backend, schedule), best first, the reference last. The score is the mean over `TOKENS` of how many times
    longer than the best schedule of all this one takes, as the cost models say."""
    found = [
        (backend, schedule, [backend.predict(spec, schedule, target, m) for m in TOKENS])
        for backend in backends
        if backend.invariant
        for schedule in _schedules(backend, spec, target)
    ]
    judges = (t for b, _, t in found if b.name != "reference" and not b.waits(backends))
    best = [min(times) for times in zip(*judges, strict=True)]
    scored = [(_slowdown(times, best or times), backend, schedule) for backend, schedule, times in found]
    return sorted(scored, key=lambda c: (c[1].name == "reference", c[1].waits(backends), c[0], str(c[2])))


def _schedules(backend: Backend, spec: KernelSpec, target: Target) -> Iterator[Schedule]:
    yield from dict.fromkeys(s for m in TOKENS for s in backend.schedules(spec, target, m))


def _slowdown(times: Sequence[float], best: Sequence[float]) -> float:
    return math.fsum(t / b for t, b in zip(times, best, strict=True)) / len(times)
