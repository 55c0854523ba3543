"""A tuning run: which kernels, in which order, within which budget; everything found is kept as it is found.

For every kernel the shortlist is built (by several processes), tried one by one in the measuring process, and joined by
neighbours of the best; the fastest then race in turns, and the winner is checked again on other data. Kernels come in
the order of what they cost the model, so a run that is cut short has tuned what matters most.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from lowbit.codegen.backend import Backend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.select import able, stale
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune.database import Database, Entry, database_folder, known, update_database
from lowbit.codegen.tune.device import device_name, file_name
from lowbit.codegen.tune.nursery import Nursery, OutOfTime
from lowbit.codegen.tune.process import Trouble, Worker
from lowbit.codegen.tune.trials import Tuning
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target

__all__ = ["Job", "Options", "Outcome", "Progress", "tune_kernels"]

_FORGOTTEN_S = 7 * 86400.0  # after which compiled candidates of a run that never went on are removed


@dataclass(frozen=True)
class Job:
    """A kernel to tune for `tokens` tokens, on every backend that can run it."""

    spec: KernelSpec
    tokens: int


@dataclass(frozen=True)
class Options:
    """budget: seconds of the whole run. candidates: schedules of the shortlist; neighbours: the most that are tried
    around the best of them; finalists: how many race, for `race_s` seconds each. build_s, prepare_s, run_s: the longest
    a compilation, making data and a call may take. builders: processes that compile, 0 for as many as there are cores.
    restart: measure again what is known."""

    budget: float = 60.0
    candidates: int = 8
    neighbours: int = 4
    finalists: int = 4
    race_s: float = 0.25
    build_s: float = 120.0
    prepare_s: float = 120.0
    run_s: float = 10.0
    builders: int = 0
    restart: bool = False


@dataclass
class Outcome:
    """What became of a job: an entry, or why there is none. known: the entry was there before. failures: candidates
    that were quarantined on the way, one line each."""

    job: Job
    backend: str = ""
    entry: Entry | None = None
    known: bool = False
    why: str = ""
    tried: int = 0
    failures: list[str] = field(default_factory=list)


Progress = Callable[[int, int, Outcome], None]
"""Called when job i (from 1) of n is settled."""


Adopt = Callable[[Backend, KernelSpec, Schedule, Path, float], None]
"""Called with every winner's artifact and error, so that it need not be compiled again."""


def tune_kernels(
    jobs: Sequence[Job],
    target: Target,
    options: Options | None = None,
    progress: Progress = lambda i, n, o: None,
    adopt: Adopt = lambda *winner: None,
) -> list[Outcome]:
    """Tune `jobs` in order until all are done or the budget is used up, which is never exceeded by more than what a
    step of the tuner itself takes. Results go to the user's database as they come; a later run with the same jobs goes
    on where this one stopped, whatever stopped it.

    Raises KernelError: LB0471 to LB0473 when the database cannot be written, LB0474 when no process can be started,
    LB0475 when `target` is not this machine, or the database is turned off.
    """
    options = options or Options()
    device, folder = device_name(target), database_folder()
    if device is None or folder is None:
        why = "LOWBIT_TUNING=off turns the database off" if device else f"{target} is not this machine"
        raise KernelError("LB0475", f"kernels cannot be tuned: {why}", hint="tune on the machine that serves")
    run = Run(target, device, folder / file_name(device), options, adopt)
    try:
        if options.restart:
            run.change(lambda database: database.forget({job.spec.key() for job in jobs}))
        return list(_settled(run, jobs, progress))
    finally:
        run.close()


def _settled(run: Run, jobs: Sequence[Job], progress: Progress) -> Iterator[Outcome]:
    """Outcomes in order; on GPUs the next kernel is compiled while one is measured."""
    ahead = 1 if run.target.kind == "cuda" else 0
    started: dict[int, list[Tuning]] = {}
    for i, job in enumerate(jobs):
        if run.left() > 0:
            for j in range(i, min(i + ahead + 1, len(jobs))):
                if j not in started:
                    started[j] = run.start(jobs[j])
            outcome = run.settle(job, started.pop(i))
        else:
            outcome = run.recall(job)
        progress(i + 1, len(jobs), outcome)
        yield outcome


class Run:
    """What a run holds: processes, the database, the clock."""

    def __init__(self, target: Target, device: str, path: Path, options: Options, adopt: Adopt) -> None:
        self.target, self.device, self.path, self.options, self.adopt = target, device, path, options, adopt
        self.nursery = Nursery(time.monotonic() + options.budget)
        self.measuring = Worker(self.nursery, torch.get_num_threads())
        count = options.builders or _cores(target)
        # Compilers and clocks do not share a CPU: one process can do both in turns.
        alone = count == 1 and target.kind != "cuda"
        self.builders = [self.measuring] if alone else [Worker(self.nursery, 1) for _ in range(count)]
        self.free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.builders:
            self.free.put(worker)
        self.pool = ThreadPoolExecutor(len(self.builders))
        self.folder = _swept(path.parent / "candidates")
        self.done: set[tuple[str, str, int]] = set()

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.nursery.deadline - time.monotonic()

    def close(self) -> None:
        """End all processes; threads that wait for one come back at once."""
        self.nursery.close()
        self.pool.shutdown(wait=True, cancel_futures=True)
        for worker in {self.measuring, *self.builders}:
            worker.close()

    def database(self) -> Database:
        """What is known now."""
        return known(self.device)

    def change(self, change: Callable[[Database], None]) -> None:
        """Write to the user's database."""
        update_database(self.path, self.device, change)

    def build(self, request: Mapping[str, Any], limits: Mapping[str, float]) -> Future[dict[str, Any]]:
        """Ask the next free builder."""

        def work() -> dict[str, Any]:
            worker = self.free.get()
            try:
                return worker.ask(request, limits)
            finally:
                self.free.put(worker)

        return self.pool.submit(work)

    def start(self, job: Job) -> list[Tuning]:
        """Begin to compile what will be measured for a job, on every backend that can run it and stands in for none of
        the others."""
        found, backends = [], list(able(job.spec, self.target))
        for backend in backends:
            if backend.name == "reference" or backend.waits(backends):
                continue
            tuning = Tuning(self, job.spec, job.tokens, backend)
            if self.settled(tuning):
                found.append(tuning)
            elif tuning.ranked:
                found.append(tuning)
                tuning.build_shortlist()
        return found

    def settled(self, tuning: Tuning) -> bool:
        """Whether the database has a complete entry that still holds; after a restart, one of this run."""
        if self.options.restart and tuning.key not in self.done:
            return False
        entry = self.database().entries.get(tuning.key)
        return entry is not None and entry.complete and stale(entry, tuning.backend, tuning.spec, self.target) is None

    def settle(self, job: Job, tunings: Sequence[Tuning]) -> Outcome:
        """Measure a job on every backend; the fastest entry is its outcome."""
        outcomes = [self._settle(job, tuning) for tuning in tunings]
        if not outcomes:
            return Outcome(job, why="no backend but the reference has a legal schedule for it here")
        best = min(outcomes, key=lambda o: o.entry.seconds if o.entry else float("inf"))
        return replace(
            best,
            known=all(o.known for o in outcomes),
            why=next((o.why for o in outcomes if o.why), ""),
            tried=sum(o.tried for o in outcomes),
            failures=[line for o in outcomes for line in o.failures],
        )

    def recall(self, job: Job) -> Outcome:
        """What is known about a job that there is no time for."""
        found = [Tuning(self, job.spec, job.tokens, backend) for backend in able(job.spec, self.target)]
        entries = [self.database().entries[t.key] for t in found if self.settled(t)]
        if not entries:
            return Outcome(job, why="not reached within the budget")
        best = min(entries, key=lambda e: e.seconds)
        return Outcome(job, best.backend, best, known=True)

    def _settle(self, job: Job, tuning: Tuning) -> Outcome:
        outcome = Outcome(job, tuning.backend.name)
        if self.settled(tuning):
            return replace(outcome, entry=self.database().entries[tuning.key], known=True)
        try:
            tuning.run()
        except OutOfTime:
            outcome.why = "the budget was used up: the best so far" if tuning.trials else "the budget was used up"
        except Trouble as e:
            outcome.why = str(e)
        outcome.tried, outcome.failures = len(tuning.trials), tuning.failures
        outcome.entry = self.database().entries.get(tuning.key)
        if outcome.entry is None and not outcome.why:
            outcome.why = "no candidate works"
        return outcome


def _swept(folder: Path) -> Path:
    """The folder of compiled candidates, without those that a run left which never went on."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in folder.iterdir():
        with suppress(OSError):  # another run was faster
            if path.stat().st_mtime < time.time() - _FORGOTTEN_S:
                path.unlink()
    return folder


def _cores(target: Target) -> int:
    """Processes that compile: all cores of a CPU, which waits meanwhile; beside a GPU two are left to it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(12, cores - 2 if target.kind == "cuda" else cores))
