"""`quantize tune` and `lowbit.tune`: measure the kernels a model needs on this machine, and remember the best."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.select import able
from lowbit.codegen.tune.database import Database, Entry, database_folder, known, update_database
from lowbit.codegen.tune.device import device_name, file_name
from lowbit.codegen.tune.space import Candidate, candidates_of, schedule_text
from lowbit.codegen.tune.tuner import Job, Options, Outcome, tune_kernels
from lowbit.compiler.errors import KernelError, RunError
from lowbit.compiler.ir.target import Target
from lowbit.compiler.job.kernels import Outlook, needed_kernels, open_skeleton, outlook
from lowbit.compiler.runtime.build import adopt_kernel
from lowbit.compiler.runtime.compile import MODES
from lowbit.compiler.runtime.dispatch import device_target, forget
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear

__all__ = ["DEFAULT_TOKENS", "TuneReport", "TunedKernel", "explain", "export", "parse_budget", "tune_model"]

DEFAULT_TOKENS = (1, 16, 512)
"""Token counts that stand for decoding, small batches and prompts."""

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class TunedKernel:
    """One kernel and token class of a report. predicted, seconds, default_seconds: of a call. status: `tuned`, `known`
    (from before), `partial` (the best so far, the budget was used up), `predicted` (nothing measured), and `why`."""

    outlook: Outlook
    status: str
    entry: Entry | None = None
    why: str = ""
    failures: tuple[str, ...] = ()

    @property
    def gain(self) -> float | None:
        """Times faster than without measurements, in one race."""
        if self.entry is None or self.entry.default_seconds is None:
            return None
        return self.entry.default_seconds / self.entry.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        spec, entry, row = self.outlook.need.spec, self.entry, self.outlook
        schedule = entry.schedule if entry else row.default
        return {
            "format": spec.format,
            "segments": list(spec.segments),
            "k": spec.k,
            "epilogue": list(spec.epilogue),
            "tokens": row.tokens,
            "count": row.need.count,
            "fused": row.need.fused,
            "backend": entry.backend if entry else row.backend,
            "status": self.status,
            "why": self.why,
            "predicted_seconds": row.predicted if row.predicted < float("inf") else None,
            "seconds": entry.seconds if entry else None,
            "default_seconds": entry.default_seconds if entry else None,
            "schedule": schedule.to_dict() if schedule else None,
            "error": entry.error if entry else None,
            "failures": list(self.failures),
        }


@dataclass
class TuneReport:
    """What a run found. database: the file it is in, empty when that is turned off."""

    target: Target
    device: str
    database: str
    budget: float
    kernels: list[TunedKernel] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """True when every kernel is tuned."""
        return all(k.status in ("tuned", "known") for k in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [k.to_dict() for k in self.kernels]
        return {
            "device": self.device,
            "database": self.database,
            "budget_seconds": self.budget,
            "complete": self.complete,
            "kernels": rows,
        }


def parse_budget(text: str | float) -> float:
    """Seconds of `60`, `60s`, `5m` or `1h`; raises KernelError (LB0477).

    >>> parse_budget("5m")
    300.0
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(s|min|m|h|)\s*", str(text))
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds < 1e7:
        raise KernelError("LB0477", f"{str(text)[:40]!r} is no time to tune for", hint="write 60s, 5m or 1h")
    return seconds


def tune_model(
    model: nn.Module | str | Path,
    *,
    budget: str | float = 60.0,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    mode: str = "modules",
    device: str | None = None,
    candidates: int = 8,
    restart: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int, TunedKernel], None] = lambda i, n, kernel: None,
    options: Options | None = None,
) -> TuneReport:
    """Measure schedules of every kernel a quantized model or checkpoint needs; see `lowbit.api.tune`.

    progress: called when kernel i (from 1) of n is settled. options: of `codegen.tune.tuner`, in place of `budget`,
    `candidates` and `restart`.
    """
    begin, near = time.monotonic(), min(Options.neighbours, candidates // 2)
    wanted = options or Options(parse_budget(budget), candidates, near, restart=restart)
    if mode not in MODES:
        raise RunError("LB0568", f"lowbit.compile has no mode {mode[:40]!r}", hint=f"use {' or '.join(MODES)}")
    if not tokens or min(tokens) < 1:
        raise KernelError("LB0477", f"{list(tokens)} are no token counts", hint="name some from 1 on, such as 1,16,512")
    folder_or_model = open_skeleton(model) if isinstance(model, (str, Path)) else model
    target = device_target(_device(folder_or_model, device))
    rows = outlook(needed_kernels(folder_or_model, target, mode), target, tokens)
    report = TuneReport(target, device_name(target) or str(target), _database(target), wanted.budget)
    if dry_run:
        report.kernels = [_foreseen(row) for row in rows]
        return report

    def settled(i: int, n: int, outcome: Outcome) -> None:
        report.kernels.append(_kernel(rows[i - 1], outcome))
        progress(i, n, report.kernels[-1])

    jobs = [Job(row.need.spec, row.tokens) for row in rows]
    left = max(0.0, wanted.budget - (time.monotonic() - begin))  # finding the kernels counts too
    tune_kernels(jobs, target, replace(wanted, budget=left), settled, _adopter(target))
    forget(row.need.spec.key() for row in rows)
    return report


def _device(model: nn.Module, device: str | None) -> torch.device:
    """The device asked for, else where the model is, else a GPU if there is one."""
    if device is not None:
        if device not in ("cpu", "cuda"):
            hint = "use cpu or cuda; CUDA_VISIBLE_DEVICES chooses a GPU"
            raise KernelError("LB0477", f"kernels are not tuned for {device[:40]!r}", hint=hint)
        if device == "cuda" and not torch.cuda.is_available():
            raise KernelError("LB0475", "kernels cannot be tuned: torch finds no CUDA device", hint="use --device cpu")
        return torch.device(device)
    held = next((m.device for m in model.modules() if isinstance(m, PackedLinear)), None)
    if held is None:
        shapes = (m._buffers.get("weight_shape") for m in model.modules() if isinstance(m, QuantLinear))
        held = next((t.device for t in shapes if t is not None and t.device.type != "meta"), None)
    return held or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _database(target: Target) -> str:
    folder, device = database_folder(), device_name(target)
    return str(folder / file_name(device)) if folder and device else ""


def _adopter(target: Target) -> Callable[..., None]:
    def adopt(backend: Any, spec: Any, schedule: Schedule, compiled: Path, error: float) -> None:
        adopt_kernel(backend, spec, schedule, target, compiled, error)

    return adopt


def _foreseen(row: Outlook) -> TunedKernel:
    status = "predicted" if row.entry is None else "known" if row.entry.complete else "partial"
    return TunedKernel(row, status, row.entry)


def _kernel(row: Outlook, outcome: Outcome) -> TunedKernel:
    entry = outcome.entry
    if entry is None:
        status = "predicted"
    else:
        status = "known" if outcome.known else "tuned" if entry.complete else "partial"
    return TunedKernel(row, status, entry, outcome.why, tuple(outcome.failures))


@dataclass(frozen=True)
class Explained:
    """One candidate, with the seconds that were measured, and why it is quarantined."""

    backend: str
    candidate: Candidate
    seconds: float | None
    quarantined: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "backend": self.backend,
            "schedule": self.candidate.schedule.to_dict(),
            "predicted_seconds": self.candidate.predicted,
            "rejected": self.candidate.problem,
            "seconds": self.seconds,
            "quarantined": self.quarantined,
        }


def explain(row: Outlook, target: Target) -> list[Explained]:
    """Every candidate of a kernel, backend by backend: legal ones first, by predicted time."""
    device, spec = device_name(target), row.need.spec
    database, found = known(device) if device else Database(""), []
    for backend in able(spec, target):
        if backend.name == "reference":
            continue
        entry = database.entries.get((backend.name, spec.key(), row.tokens))
        times = {t.schedule: t.seconds for t in entry.trials} if entry else {}
        failures = [f for f in database.failures.values() if (f.backend, f.spec) == (backend.name, spec.key())]
        bad = {f.schedule: f.reason for f in failures}
        for c in candidates_of(backend, spec, target, row.tokens):
            found.append(Explained(backend.name, c, times.get(c.schedule), bad.get(c.schedule, "")))
    return found


def export(target: Target, path: Path) -> int:
    """Write all complete measurements of this device to `path`, without what was tried on the way: the form in which
    lowbit ships them. Returns how many. Raises KernelError (LB0473, LB0475)."""
    device = device_name(target)
    if device is None:
        raise KernelError("LB0475", f"there are no measurements: {target} is not this machine")
    complete = [replace(e, trials=()) for e in known(device).entries.values() if e.complete]

    def change(database: Database) -> None:
        for entry in complete:
            database.put(entry)

    update_database(path, device, change)
    return len(complete)


def kernel_text(row: Outlook) -> str:
    """A kernel in one line: format, sizes, epilogue."""
    spec = row.need.spec
    rows = "+".join(map(str, spec.segments))
    extra = f" {spec.activation}" if spec.activation else ""
    return " ".join([spec.format + extra, f"{rows}x{spec.k}", *spec.epilogue])


def kernel_schedule(kernel: TunedKernel) -> str:
    """The schedule a report's row stands for, as text."""
    chosen = kernel.entry.schedule if kernel.entry else kernel.outlook.default
    return schedule_text(chosen) if chosen else ""
