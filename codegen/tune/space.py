"""What can be tried for a kernel: every candidate is legal, with a predicted time, or rejected with a sentence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.codegen.backend import Backend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target

__all__ = ["Candidate", "candidates_of", "legal_schedules", "neighbours", "rejections", "schedule_text", "shortlist"]


@dataclass(frozen=True)
class Candidate:
    """One schedule of a backend's space. predicted: seconds of a call, when it is legal; problem: why it is not."""

    schedule: Schedule
    predicted: float | None = None
    problem: str = ""


def candidates_of(backend: Backend, spec: KernelSpec, target: Target, m: int) -> list[Candidate]:
    """The whole space of a backend for `m` tokens: what is used where nothing was measured first, then by predicted
    time, then what is rejected."""
    trusted = list(dict.fromkeys(backend.schedules(spec, target, m)))
    found = [_judged(backend, spec, s, target, m) for s in dict.fromkeys((*trusted, *backend.space(spec, target, m)))]
    default = trusted[0] if trusted else None
    return sorted(
        found,
        key=lambda c: (c.predicted is None, c.schedule != default, c.predicted or 0.0, str(c.schedule)),
    )


def _judged(backend: Backend, spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> Candidate:
    try:
        if why := backend.illegal(spec, schedule, target):
            return Candidate(schedule, problem=why)
        return Candidate(schedule, backend.predict(spec, schedule, target, m))
    except KernelError as e:  # sizes that do not go together may show only when they are worked out
        return Candidate(schedule, problem=e.message)


def legal_schedules(found: Sequence[Candidate]) -> list[Schedule]:
    """Those that can run, in order."""
    return [c.schedule for c in found if c.predicted is not None]


def rejections(found: Sequence[Candidate]) -> list[tuple[str, int, str]]:
    """(reason without its numbers, how many, one reason in full) of rejected candidates, the most frequent first."""
    kinds: Counter[str] = Counter()
    first: dict[str, str] = {}
    for c in found:
        if c.problem:
            kind = re.sub(r"\d[\d.]*", "N", c.problem)
            kinds[kind] += 1
            first.setdefault(kind, c.problem)
    return [(kind, count, first[kind]) for kind, count in kinds.most_common()]


def shortlist(backend: Backend, ranked: Sequence[Schedule], count: int) -> list[Schedule]:
    """The `count` schedules to measure: the first, then the best of every kind (`Backend.traits`, coarse to fine), then
    the best that are left.

    Predictions cannot tell neighbours apart, so measuring only their favourites would measure one kernel many times.
    """
    kept = list(ranked[:1])
    for traits in backend.traits:
        seen = {_kind(s, traits) for s in kept}
        for s in ranked:
            if (kind := _kind(s, traits)) not in seen and len(kept) < count:
                seen.add(kind)
                kept.append(s)
    return [*kept, *(s for s in ranked if s not in kept)][:count]


def _kind(schedule: Schedule, traits: Sequence[str]) -> tuple[int, ...]:
    values = schedule.to_dict()
    return tuple(values.get(name, 0) for name in traits)


def neighbours(ranked: Sequence[Schedule], best: Schedule) -> list[Schedule]:
    """Schedules that differ from `best` in one choice, in their order."""
    return [s for s in ranked if _distance(s, best) == 1]


def _distance(a: Schedule, b: Schedule) -> int:
    x, y = a.to_dict(), b.to_dict()
    return sum(x.get(name, 0) != y.get(name, 0) for name in {*x, *y})


def schedule_text(schedule: Schedule) -> str:
    """What distinguishes a schedule from one with no choices made.

    >>> schedule_text(Schedule(tile_m=4, tile_n=64).with_extra(buffered=1))
    'tile_m=4 tile_n=64 buffered=1'
    """
    plain = Schedule().to_dict()
    chosen = {name: value for name, value in schedule.to_dict().items() if value != plain.get(name)}
    return " ".join(f"{name}={value}" for name, value in chosen.items()) or "default"
