"""The journal of a run: what is finished, on disk, so that a run killed at any moment continues where it was.

Order is everything: data is written under its final name only after it was forced to disk, its digest goes into the
journal after that, and only then is anything deleted that it replaces. A journal line that was cut short is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowbit.compiler.errors import RunError
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.weights import QWeight, from_stored, stored, stored_shapes

__all__ = ["Journal", "load_qtensor", "save_qtensors"]

_NAME = "journal.jsonl"
_OURS = (_NAME, "lock", "group_", "acts_", ".staged", "tuned_", "finetuned_", "decided")


class Journal:
    """A working folder held by one process. Use as a context manager; leaving it gives up the lock, not the files.

    records: the finished steps, oldest first. Raises RunError: LB0531 when the folder belongs to a run with other
    settings, LB0532 when it is no working folder, LB0533 when another process is at work in it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.records: list[dict[str, Any]] = []
        self._restart = restart
        self._lock = -1

    @property
    def digest(self) -> str:
        """SHA-256 of the settings: the run's identity."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def __enter__(self) -> Journal:
        self._check_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.folder)
        try:
            self._open()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _check_folder(self) -> None:
        if not self.folder.exists():
            return
        foreign = (
            [p.name for p in self.folder.iterdir() if not p.name.startswith(_OURS)] if self.folder.is_dir() else [""]
        )
        if foreign:
            raise RunError(
                "LB0532", "is not the working folder of a run", where=str(self.folder), hint="choose another folder"
            )

    def _open(self) -> None:
        path = self.folder / _NAME
        if self._restart:
            for old in self.folder.iterdir():
                if old.name != "lock":
                    old.unlink()
        lines = _complete_lines(path)
        if lines:
            self._compare(lines[0].get("settings", {}))
            self.records = lines[1:]
        else:
            self.append({"event": "settings", "settings": self.settings})
            self.records.clear()

    def _compare(self, before: Mapping[str, Any]) -> None:
        old, new = dict(_flat(before)), dict(_flat(self.settings))
        for name in [*new, *(n for n in old if n not in new)]:
            if old.get(name) != new.get(name):
                raise RunError(
                    "LB0531",
                    f"the interrupted run here had {name} = {_short(old.get(name))}, now it is {_short(new.get(name))}",
                    where=str(self.folder),
                    hint="give the same settings to continue it, or --restart to begin again",
                )

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one finished step, durably."""
        line = json.dumps(record, sort_keys=True) + "\n"
        handle = os.open(self.folder / _NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            view = memoryview(line.encode())
            while view:
                view = view[os.write(handle, view) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        sync_folder(self.folder)
        self.records.append(dict(record))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The finished steps of one kind."""
        return [r for r in self.records if r.get("event") == kind]

    def store(self, name: str, write: Callable[[Path], None]) -> str:
        """Write a file through a staged name; returns its SHA-256."""
        staged = self.folder / f".staged-{name}"
        write(staged)
        digest = sync_file(staged)
        os.replace(staged, self.folder / name)
        sync_folder(self.folder)
        return digest

    def verified(self, record: Mapping[str, Any]) -> Path:
        """The file of a finished step, once its digest was found to be right; else RunError (LB0534)."""
        path = self.folder / str(record["file"])
        try:
            good = file_sha256(path) == record["sha256"]
        except OSError:
            good = False
        if not good:
            raise RunError(
                "LB0534", "is missing or damaged", where=str(path), hint="begin the run again with --restart"
            )
        return path

    def remove(self) -> None:
        """Delete the working folder; the run is over."""
        shutil.rmtree(self.folder)


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The journal's lines; a last one that was cut short by a crash is removed from the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        os.truncate(path, len(whole))
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError as e:
        raise RunError("LB0534", f"is damaged: {e}", where=str(path), hint="begin the run again with --restart") from e
    return [line for line in lines if isinstance(line, dict)]


def _take_lock(folder: Path) -> int:
    """Handle of the folder's lock, held until it is closed or this process ends, however it ends."""
    path = folder / "lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.exists(path) and os.stat(path).st_ino == os.fstat(handle).st_ino
    except OSError:
        same = False
    if not same:
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        raise RunError(
            "LB0533",
            f"another run is at work here{f' ({owner})' if owner else ''}",
            where=str(folder),
            hint="wait for it, or choose another output folder",
        )
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in tree.items():
        out += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(prefix + key, value)]
    return out


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> str:
    """Force a file to disk; returns its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (new names, renames) to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_qtensors(path: Path, tensors: Mapping[str, QWeight], plain: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write quantized matrices, codes packed densely, and other tensors by their names, to one safetensors file."""
    flat = {f"{name}.{part}": t for name, q in tensors.items() for part, t in stored(q).items()}
    flat.update({f"plain.{name}": t.contiguous() for name, t in (plain or {}).items()})
    save_file(flat, path, metadata={name: str(q.fmt) for name, q in tensors.items()})


def load_plain(path: Path, name: str) -> torch.Tensor:
    """One of the other tensors in a file of `save_qtensors`."""
    with safe_open(path, framework="pt") as file:
        value: torch.Tensor = file.get_tensor(f"plain.{name}")
        return value


def load_qtensor(path: Path, name: str) -> QWeight:
    """One matrix from a file of `save_qtensors`."""
    with safe_open(path, framework="pt") as file:
        fmt = parse_format(file.metadata()[name])
        n, k = file.get_tensor(f"{name}.weight_shape").tolist()
        return from_stored(fmt, n, k, {part: file.get_tensor(f"{name}.{part}") for part in stored_shapes(fmt, n, k)})
