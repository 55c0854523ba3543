"""The kernel cache: compiled artifacts on disk, addressed by everything that decides their bytes.

The key hashes spec, schedule, target, generated source, toolchain versions and the generator's own sources, so editing
an emitter misses. An entry is a folder with the artifact and `meta.json`; it is staged, then renamed, and its digest
is checked before every load, so that a torn or altered file is a miss, not a crash. JSON and binaries only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from lowbit.codegen.backend import Source
from lowbit.codegen.cachedir import default_cache_dir
from lowbit.codegen.schedule import Schedule
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target

__all__ = ["KernelCache", "Keyed", "default_cache_dir", "generator_digest"]

_log = logging.getLogger("lowbit")


@cache
def generator_digest() -> str:
    """Hash of the sources that generate kernels: codegen, the IR and the formats. Tuning only chooses among them."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for folder in ("codegen", "compiler/ir", "quantizers/formats"):
        for path in sorted((root / folder).rglob("*.*")):
            tuning = path.is_relative_to(root / "codegen" / "tune")
            if path.suffix not in (".pyc",) and path.is_file() and not tuning:
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Keyed(Protocol):
    """A kernel's spec: `KernelSpec`, or that of another kind of kernel."""

    def key(self) -> str:
        """Canonical text: equal specs, equal text."""
        ...


class KernelCache:
    """A folder of compiled kernels, safe with many processes."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_cache_dir()) / "kernels"

    def key(self, spec: Keyed, schedule: Schedule, target: Target, source: Source, toolchain: str) -> str:
        """40 hex digits over everything that decides the artifact's bytes."""
        parts = (
            spec.key(),
            json.dumps(schedule.to_dict(), sort_keys=True),
            str(target),
            source.text,
            " ".join(source.flags),
            toolchain,
            generator_digest(),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]

    def lookup(self, key: str) -> tuple[Path, dict[str, Any]] | None:
        """The artifact and its meta data, or None. A damaged entry is removed and counts as a miss."""
        entry = self.root / key
        try:
            meta = json.loads((entry / "meta.json").read_text())
            artifact = entry / meta["file"]
            if artifact.parent == entry and _digest(artifact) == meta["sha256"]:
                return artifact, meta
        except FileNotFoundError:
            if not entry.exists():
                return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        _log.warning("kernel cache entry %s is damaged; it is built again", key)
        shutil.rmtree(entry, ignore_errors=True)
        return None

    def store(self, key: str, suffix: str, meta: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """Build an artifact into the cache and return its path; a process that lost the race uses the winner's.

        Raises KernelError (LB0420) when the folder cannot be used.
        """
        self._prepare()
        stage = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=self.root))
        try:
            artifact = stage / f"kernel{suffix}"
            build(artifact)
            full = {**meta, "file": artifact.name, "sha256": _digest(artifact)}
            (stage / "meta.json").write_text(json.dumps(full, sort_keys=True, indent=1))
            try:
                os.rename(stage, self.root / key)
            except OSError:
                if (found := self.lookup(key)) is None:
                    raise
                return found[0]
            return self.root / key / artifact.name
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _prepare(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            info = self.root.stat()
        except OSError as e:
            raise KernelError(
                "LB0420", f"cannot use the kernel cache: {e.strerror}", where=str(self.root), hint="set LOWBIT_CACHE"
            ) from e
        if hasattr(os, "getuid") and info.st_uid != os.getuid():
            raise KernelError(
                "LB0421", "the kernel cache belongs to another user", where=str(self.root), hint="set LOWBIT_CACHE"
            )
        if info.st_mode & 0o077:
            os.chmod(self.root, 0o700)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
