"""Tuning one kernel on one backend: build, try, look around the best, race, check the winner again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.codegen import BACKENDS
from lowbit.codegen.backend import Backend, Source
from lowbit.codegen.schedule import Schedule, token_class
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune.database import Database, Entry, Failure, Trial
from lowbit.codegen.tune.process import Refused
from lowbit.codegen.tune.space import candidates_of, legal_schedules, neighbours, schedule_text, shortlist
from lowbit.compiler.errors import KernelError

if TYPE_CHECKING:
    from lowbit.codegen.tune.tuner import Run

__all__ = ["Tuning"]

_TIE = 0.02  # medians closer than this are equal: then what would be used anyway stays


class Tuning:
    """One kernel, token class and backend. trials: what was measured. failures: what was not, one line each."""

    def __init__(self, run: Run, spec: KernelSpec, tokens: int, backend: Backend) -> None:
        self.run_, self.spec, self.tokens, self.backend = run, spec, token_class(tokens), backend
        self.key = (backend.name, spec.key(), self.tokens)
        self.trials: dict[Schedule, Trial] = {}
        self.failures: list[str] = []
        self._sources: dict[Schedule, Source] = {}
        self._errors: dict[Schedule, float] = {}
        self._builds: dict[Schedule, Future[dict[str, Any]]] = {}
        self._out: set[Schedule] = set()

    @cached_property
    def ranked(self) -> list[Schedule]:
        """Legal schedules, the one that would be used anyway first."""
        return legal_schedules(candidates_of(self.backend, self.spec, self.run_.target, self.tokens))

    @cached_property
    def short(self) -> list[Schedule]:
        """What is measured in any case, but for what failed before."""
        kept, tried = [], self._before()
        for s in shortlist(self.backend, self.ranked, self.run_.options.candidates):
            if (source := self._source(s)) is None:
                continue
            if why := self._quarantined(source):
                self._note(s, f"quarantined before: {why}")
                continue
            if (trial := tried.get(s)) is not None and trial.code == source.digest:
                self.trials[s] = trial
            kept.append(s)
        return kept

    def _before(self) -> dict[Schedule, Trial]:
        """What an earlier run measured before it was stopped."""
        entry = self.run_.database().entries.get(self.key)
        held = entry is not None and not entry.complete and entry.toolchain == self.backend.toolchain()
        return {t.schedule: t for t in entry.trials} if entry is not None and held else {}

    def build_shortlist(self) -> None:
        """Begin to compile."""
        self._build(self.short)

    def run(self) -> None:
        """Everything; raises OutOfTime or Trouble, after which what was measured is in the database."""
        self._try(self.short)
        if best := self._fastest(1):
            options = self.run_.options
            near = [s for s in neighbours(self.ranked, best[0]) if self._fresh(s)][: options.neighbours]
            self._build(near)
            self._try(near)
        self._finish()
        self._clean()

    def _fresh(self, schedule: Schedule) -> bool:
        if schedule in self.trials or schedule in self._out or schedule in self._builds:
            return False
        source = self._source(schedule)
        return source is not None and self._quarantined(source) is None

    def _source(self, schedule: Schedule) -> Source | None:
        if schedule not in self._sources and schedule not in self._out:
            try:
                self._sources[schedule] = self.backend.emit(self.spec, schedule, self.run_.target)
            except KernelError as e:
                self._note(schedule, f"cannot be generated: {e.message}")
        return self._sources.get(schedule)

    def _quarantined(self, source: Source) -> str | None:
        found = self.run_.database().failures.get((source.digest, self.backend.toolchain()))
        return found.reason if found else None

    def _path(self, source: Source) -> Path:
        tools = hashlib.sha256(self.backend.toolchain().encode()).hexdigest()[:8]
        return self.run_.folder / f"{source.digest}-{tools}{source.suffix}"

    def _request(self, op: str, **more: Any) -> dict[str, Any]:
        spec, target = json.loads(self.spec.key()), str(self.run_.target)
        return {"op": op, "spec": spec, "target": target, "backend": BACKENDS[self.backend.name], **more}

    def _one(self, op: str, schedule: Schedule, **more: Any) -> dict[str, Any]:
        source = self._source(schedule)
        assert source is not None
        return self._request(op, schedule=schedule.to_dict(), path=str(self._path(source)), **more)

    @cached_property
    def _limits(self) -> dict[str, float]:
        """Seconds of every stage."""
        options = self.run_.options
        predicted = self.backend.predict(self.spec, self.ranked[0], self.run_.target, self.tokens)
        return {"build": options.build_s, "prepare": options.prepare_s, "run": max(options.run_s, 100 * predicted)}

    def _build(self, schedules: Iterable[Schedule]) -> None:
        for s in schedules:
            if s not in self._builds and s not in self._out and self._source(s) is not None:
                self._builds[s] = self.run_.build(self._one("build", s), self._limits)

    def _try(self, schedules: Sequence[Schedule]) -> None:
        """Check and time every schedule once. On CPUs nothing is timed while something is compiled."""
        if self.run_.target.kind == "cpu":
            for s in schedules:
                if s in self._builds:
                    self._builds[s].exception()
        for s in schedules:
            if s not in self._builds:
                continue
            try:
                self._builds[s].result()
                if s not in self.trials:
                    got = self.run_.measuring.ask(
                        self._one("try", s, tokens=self.tokens, seed=0, time=True), self._limits
                    )
                    self._keep(s, got["seconds"], got["error"])
            except Refused as e:
                self._refuse(s, e)

    def _keep(self, schedule: Schedule, seconds: float, error: float) -> None:
        source = self._source(schedule)
        assert source is not None
        self.trials[schedule] = Trial(schedule, source.digest, seconds)
        self._errors[schedule] = error
        self._store({s: t.seconds for s, t in self.trials.items()}, complete=False)

    def _refuse(self, schedule: Schedule, e: Refused) -> None:
        """Quarantine: it is neither measured nor used again while its source and the compiler stay what they are."""
        source, toolchain = self._source(schedule), self.backend.toolchain()
        assert source is not None
        found = Failure(
            self.backend.name, self.spec.key(), schedule, source.digest, toolchain, e.kind, f"{e.kind}: {e.reason}"
        )
        self._note(schedule, found.reason)
        self.trials.pop(schedule, None)

        def change(database: Database) -> None:
            database.fail(found)
            held = database.entries.get(self.key)
            if held is not None and held.code == found.code:
                del database.entries[self.key]

        self.run_.change(change)

    def _note(self, schedule: Schedule, why: str) -> None:
        self._out.add(schedule)
        self.failures.append(f"{schedule_text(schedule)}: {why}")

    def _fastest(self, count: int) -> list[Schedule]:
        return sorted(self.trials, key=lambda s: self.trials[s].seconds)[:count]

    def _finish(self) -> None:
        """Race the fastest against what would be used anyway until one is right on other data too."""
        while finalists := self._finalists():
            times = self._race(finalists)
            while times:
                winner = _winner(times, self.ranked[0])
                try:
                    ragged = self.tokens // 2 + 1  # the fewest tokens that kernels of this class are used for
                    got = self.run_.measuring.ask(
                        self._one("try", winner, tokens=ragged, seed=1, time=False), self._limits
                    )
                except Refused as e:
                    self._refuse(winner, e)
                    del times[winner]
                    continue
                self._errors[winner] = max(self._errors.get(winner, 0.0), got["error"])
                self._store(times, complete=True, winner=winner)
                return

    def _finalists(self) -> list[Schedule]:
        found = self._fastest(self.run_.options.finalists)
        default = self.ranked[0]
        return [*found, *([default] if default in self.trials and default not in found else [])]

    def _race(self, finalists: Sequence[Schedule]) -> dict[Schedule, float]:
        """Medians of those that get through; empty when all fail."""
        racing = list(finalists)
        while racing:
            parts = [self._one("race", s) for s in racing]
            request = self._request(
                "race",
                tokens=self.tokens,
                schedules=[p["schedule"] for p in parts],
                paths=[p["path"] for p in parts],
                seconds=self.run_.options.race_s * len(racing),
            )
            try:
                seconds = self.run_.measuring.ask(request, self._limits)["seconds"]
                return dict(zip(racing, seconds, strict=True))
            except Refused as e:
                self._refuse(racing.pop(int(e.at.split()[1])), e)
        return {}

    def _store(self, times: dict[Schedule, float], *, complete: bool, winner: Schedule | None = None) -> None:
        best, default = winner or _winner(times, self.ranked[0]), self.ranked[0]
        entry = Entry(
            self.backend.name,
            self.spec.key(),
            self.tokens,
            best,
            self.trials[best].code,
            times[best],
            self._errors.get(best, 0.0),
            default,
            times.get(default),
            len(self.ranked),
            self.backend.toolchain(),
            tuple(sorted(self.trials.values(), key=lambda t: t.seconds)),
            complete,
        )
        self.run_.change(lambda database: database.put(entry))
        if complete:
            self.run_.done.add(self.key)
            source = self._source(best)
            assert source is not None
            self.run_.adopt(self.backend, self.spec, best, self._path(source), entry.error)

    def _clean(self) -> None:
        """Remove what was compiled for this kernel."""
        for s in self._builds:
            if (source := self._source(s)) is not None:
                self._path(source).unlink(missing_ok=True)


def _winner(times: dict[Schedule, float], default: Schedule) -> Schedule:
    best = min(times, key=lambda s: times[s])
    return default if default in times and times[default] <= times[best] * (1 + _TIE) else best
