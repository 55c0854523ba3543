"""What was measured: one JSON file per device, a shipped read-only one and the user's own.

An entry belongs to (device, backend, kernel spec, token class) and carries the digest of the source it was measured on:
when the generator writes something else today, the entry is stale and is not used. What crashed, hung, did not compile
or was wrong is quarantined under the digest of its source and the compiler's version, and is not tried again.

Files are written whole, under a lock, and renamed into place. One that cannot be read is moved aside, never
overwritten.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowbit.codegen.cachedir import default_cache_dir
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.tune.device import file_name
from lowbit.compiler.errors import KernelError

__all__ = [
    "SCHEMA",
    "Database",
    "Entry",
    "Failure",
    "FailureKind",
    "Trial",
    "database_folder",
    "known",
    "read_database",
    "update_database",
]

SCHEMA = 1
"""Version of the file's layout; a file of a later one is left alone."""

SHIPPED = Path(__file__).resolve().parent / "data"
"""Measurements that come with lowbit, a file per device."""

FailureKind = Literal["build", "launch", "crash", "timeout", "wrong"]
_KINDS = ("build", "launch", "crash", "timeout", "wrong")
_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class Trial:
    """One schedule that was measured. seconds: of a call. code: digest of its source."""

    schedule: Schedule
    code: str
    seconds: float


@dataclass(frozen=True)
class Entry:
    """The best schedule of one kernel (spec as text) and token class.

    seconds: of a call, median, cold weights. error: relative to the reference. default, default_seconds: what would be
    used without measurements, and its time in the same race, None when it does not work. legal: schedules there were to
    choose from. trials: what was measured on the way, one burst each. complete: False when tuning was stopped; then it
    is the best so far.
    """

    backend: str
    spec: str
    tokens: int
    schedule: Schedule
    code: str
    seconds: float
    error: float
    default: Schedule
    default_seconds: float | None
    legal: int
    toolchain: str
    trials: tuple[Trial, ...] = ()
    complete: bool = True

    @property
    def key(self) -> tuple[str, str, int]:
        """What it is looked up by, on a device."""
        return (self.backend, self.spec, self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _plain_fields(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Entry:
        """Inverse of `to_dict`; raises ValueError, KeyError or TypeError for anything else."""
        trials = tuple(
            Trial(Schedule.from_dict(t["schedule"]), str(t["code"]), _seconds(t["seconds"])) for t in values["trials"]
        )
        return Entry(
            str(values["backend"]),
            _spec_text(values["spec"]),
            int(values["tokens"]),
            Schedule.from_dict(values["schedule"]),
            str(values["code"]),
            _seconds(values["seconds"]),
            float(values["error"]),
            Schedule.from_dict(values["default"]),
            None if values["default_seconds"] is None else _seconds(values["default_seconds"]),
            int(values["legal"]),
            str(values["toolchain"]),
            trials,
            bool(values["complete"]),
        )


@dataclass(frozen=True)
class Failure:
    """A schedule that is not tried again for as long as its source and the compiler stay the same."""

    backend: str
    spec: str
    schedule: Schedule
    code: str
    toolchain: str
    kind: FailureKind
    reason: str

    @property
    def key(self) -> tuple[str, str]:
        """What it is looked up by, on a device."""
        return (self.code, self.toolchain)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _plain_fields(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Failure:
        """Inverse of `to_dict`; raises ValueError, KeyError or TypeError for anything else."""
        if values["kind"] not in _KINDS:
            raise ValueError(f"no failure is a {values['kind']!r}")
        text = {name: str(values[name]) for name in ("backend", "code", "toolchain", "reason")}
        return Failure(
            spec=_spec_text(values["spec"]),
            schedule=Schedule.from_dict(values["schedule"]),
            kind=values["kind"],
            **text,
        )


def _plain_fields(row: Entry | Failure) -> dict[str, Any]:
    values = {name: _plain(getattr(row, name)) for name in row.__dataclass_fields__}
    return {**values, "spec": json.loads(row.spec)}


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.to_dict()
    if isinstance(value, Trial):
        return {"schedule": value.schedule.to_dict(), "code": value.code, "seconds": value.seconds}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _spec_text(value: Any) -> str:
    """A spec as `KernelSpec.key` writes it."""
    if not isinstance(value, dict):
        raise TypeError("a spec is an object")
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0.0 < seconds < float("inf"):
        raise ValueError(f"{value!r} is no time")
    return seconds


@dataclass
class Database:
    """The measurements of one device. ignored: (list, row, why) of what a file held beside them and does not count; it
    is kept when the file is written again."""

    device: str
    entries: dict[tuple[str, str, int], Entry] = field(default_factory=dict)
    failures: dict[tuple[str, str], Failure] = field(default_factory=dict)
    ignored: list[tuple[str, Any, str]] = field(default_factory=list)

    def put(self, entry: Entry) -> None:
        """Add an entry in the place of the one with its key."""
        self.entries[entry.key] = entry

    def fail(self, failure: Failure) -> None:
        """Quarantine a schedule."""
        self.failures[failure.key] = failure

    def forget(self, specs: set[str]) -> None:
        """Drop what is known about these kernels."""
        self.entries = {k: e for k, e in self.entries.items() if e.spec not in specs}
        self.failures = {k: f for k, f in self.failures.items() if f.spec not in specs}

    def over(self, base: Database) -> Database:
        """Both; where both know a kernel this one counts, unless only the other was tuned to the end."""
        entries = dict(base.entries)
        for key, entry in self.entries.items():
            if entry.complete or key not in entries or not entries[key].complete:
                entries[key] = entry
        return Database(self.device, entries, {**base.failures, **self.failures}, [*base.ignored, *self.ignored])

    def to_dict(self) -> dict[str, Any]:
        """The file's document, in a stable order."""
        return {
            "schema": SCHEMA,
            "device": self.device,
            "entries": [*(self.entries[k].to_dict() for k in sorted(self.entries)), *self._kept("entries")],
            "failures": [*(self.failures[k].to_dict() for k in sorted(self.failures)), *self._kept("failures")],
        }

    def _kept(self, name: str) -> list[Any]:
        return [row for where, row, _ in self.ignored if where == name]

    @staticmethod
    def from_dict(document: Any, where: str) -> Database:
        """Raises KernelError: LB0470 when it is no database, LB0471 when a later version of lowbit wrote it."""
        if not isinstance(document, dict) or not isinstance(document.get("device"), str):
            raise _damaged(where, "it does not name a device")
        if document.get("schema") != SCHEMA:
            if isinstance(document.get("schema"), int) and document["schema"] > SCHEMA:
                text = f"the tuning database was written by a later version of lowbit (schema {document['schema']})"
                raise KernelError(
                    "LB0471", text, where=where, hint="update lowbit, or set LOWBIT_TUNING to another folder"
                )
            raise _damaged(where, f"its schema is {document.get('schema')!r}")
        found = Database(document["device"])
        found._read("entries", document, where, lambda row: found.put(Entry.from_dict(row)))
        found._read("failures", document, where, lambda row: found.fail(Failure.from_dict(row)))
        return found

    def _read(self, name: str, document: dict[str, Any], where: str, add: Callable[[Any], None]) -> None:
        rows = document.get(name, [])
        if not isinstance(rows, list):
            raise _damaged(where, f"its {name} are no list")
        for row in rows:
            try:
                add(row)
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                self.ignored.append((name, row, f"{type(e).__name__}: {e}"))


def _damaged(where: str, why: str) -> KernelError:
    return KernelError("LB0470", f"is no tuning database: {why}", where=where, hint="delete it, or tune again")


def read_database(path: Path, device: str) -> Database:
    """The measurements in a file, an empty database when there is no file.

    Raises KernelError: LB0470 damaged, LB0471 of a later version, LB0472 of another device.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Database(device)
    except (OSError, ValueError) as e:
        raise _damaged(str(path), str(e)[:200]) from e
    found = Database.from_dict(document, str(path))
    if found.device != device:
        text = f"has measurements of another device, {found.device!r}, not of {device!r}"
        raise KernelError("LB0472", text, where=str(path), hint="tune on this device")
    return found


def database_folder() -> Path | None:
    """The user's own databases: `$LOWBIT_TUNING`, else a folder beside the kernel cache; None for `off`, which turns
    off the shipped ones too."""
    given = os.environ.get("LOWBIT_TUNING", "")
    if given == "off":
        return None
    return Path(given) if given else default_cache_dir() / "tuning"


_read: dict[tuple[str, str], tuple[tuple[int, int] | None, Database]] = {}


def known(device: str) -> Database:
    """Everything known about a device: the user's measurements over the shipped ones.

    Files are read once, and again when they change. One that cannot be used counts as empty and is named in a warning.
    """
    if (own := database_folder()) is None:
        return Database(device)
    shipped = _known_file(SHIPPED / file_name(device), device)
    return _known_file(own / file_name(device), device).over(shipped)


def _known_file(path: Path, device: str) -> Database:
    try:
        info = path.stat()
        stamp = (info.st_mtime_ns, info.st_size)
    except OSError:
        stamp = None
    held = _read.get((str(path), device))
    if held is None or held[0] != stamp:
        try:
            held = (stamp, read_database(path, device) if stamp else Database(device))
        except KernelError as e:
            _log.warning("%s: its measurements are not used", e)
            held = (stamp, Database(device))
        _read[str(path), device] = held
    return held[1]


def update_database(path: Path, device: str, change: Callable[[Database], None]) -> Database:
    """Read, change and write a file as one step, whoever else does the same; returns what was written.

    A damaged file is moved aside to `NAME.damaged` first. Raises KernelError: LB0471, LB0472 (the file is then left as
    it is), LB0473 when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(path):
            try:
                found = read_database(path, device)
            except KernelError as e:
                if e.code != "LB0470":
                    raise
                aside = _aside(path)
                os.replace(path, aside)
                _log.warning("%s; it was moved to %s", e, aside.name)
                found = Database(device)
            change(found)
            _write(path, found)
            return found
    except OSError as e:
        raise KernelError(
            "LB0473", f"cannot write the tuning database: {e.strerror}", where=str(path), hint="set LOWBIT_TUNING"
        ) from e


def _aside(path: Path) -> Path:
    """A name for a damaged file that no earlier one has."""
    names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in range(10**6))
    return next(p for p in names if not p.exists())


def _write(path: Path, database: Database) -> None:
    text = json.dumps(database.to_dict(), indent=1) + "\n"
    handle, staged = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time; where the system has no file locks the last writer wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
