"""Compiled kernels inside a checkpoint: the folder `kernels/`, files named by the kernel cache's keys, and a manifest.

The manifest says of every file what it computes (the kernel's spec and schedule), for which target and token counts,
what it was made from (a hash of the generated source, the toolchain) and its sha256. What is read here is hostile until
shown otherwise: names are hashes, and nothing is opened outside the folder. That the files are code, which a user must
choose to trust, is decided in `runtime.prebuilt`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit.codegen.schedule import Schedule
from lowbit.compiler.errors import CheckpointError, KernelError
from lowbit.compiler.io.source_folder import contained, load_json
from lowbit.compiler.ir.target import Target

__all__ = ["FOLDER", "MANIFEST", "KernelFolder", "StoredKernel", "file_digest", "read_kernels"]

FOLDER = "kernels"
MANIFEST = f"{FOLDER}/manifest.json"
SCHEMA = 1
_FILE = re.compile(r"[0-9a-f]{40}\.(so|cubin)")
_SHA = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredKernel:
    """One compiled kernel of a checkpoint.

    spec: canonical text of what it computes. tokens: the token classes it serves, empty for kernels that have none.
    file: its name in the folder. source: `Source.digest` of what was compiled. error: relative to the reference, None
    when it was compiled where it cannot run.
    """

    spec: str
    backend: str
    target: Target
    schedule: Schedule
    tokens: tuple[int, ...]
    file: str
    sha256: str
    source: str
    toolchain: str
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        return {**asdict(self), "target": str(self.target), "schedule": self.schedule.to_dict()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> StoredKernel:
        """Inverse of `to_dict`; raises KeyError, TypeError, ValueError or KernelError for anything else."""
        texts = {name: values[name] for name in ("spec", "backend", "file", "sha256", "source", "toolchain")}
        if not all(isinstance(text, str) for text in texts.values()):
            raise TypeError("not a text")
        if not _FILE.fullmatch(texts["file"]) or not _SHA.fullmatch(texts["sha256"]):
            raise ValueError(f"{texts['file'][:80]!r} is not a kernel's file and digest")
        return StoredKernel(
            **texts,
            target=Target.parse(values["target"]),
            schedule=Schedule.from_dict(values["schedule"]),
            tokens=tuple(int(m) for m in values["tokens"]),
            error=None if values["error"] is None else float(values["error"]),
        )


@dataclass(frozen=True)
class KernelFolder:
    """The kernels of a checkpoint. folder: the checkpoint's. frozen: whoever loads it must never compile.

    max_tokens, dtype: what was asked for when they were made, for messages.
    """

    folder: Path
    frozen: bool
    max_tokens: int
    dtype: str
    kernels: tuple[StoredKernel, ...]

    @property
    def targets(self) -> list[str]:
        """The targets it has kernels for, sorted."""
        return sorted({str(kernel.target) for kernel in self.kernels})

    def manifest(self) -> dict[str, Any]:
        """Values of the manifest."""
        head = {"schema": SCHEMA, "frozen": self.frozen, "max_tokens": self.max_tokens, "dtype": self.dtype}
        return {**head, "kernels": [kernel.to_dict() for kernel in self.kernels]}

    def path(self, kernel: StoredKernel) -> Path:
        """Its file, with the digest checked; raises KernelError (LB0480) for one that is missing or altered."""
        try:
            path = contained(self.folder, f"{FOLDER}/{kernel.file}")
            if file_digest(path) == kernel.sha256:
                return path
            why = "its bytes are not those the manifest names"
        except (OSError, CheckpointError) as e:
            why = f"cannot be read: {e.strerror if isinstance(e, OSError) else e.message}"
        raise KernelError("LB0480", why, where=f"{self.folder}/{FOLDER}/{kernel.file}", hint="fetch the file again")


def file_digest(path: Path) -> str:
    """sha256 of a file, as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_kernels(folder: Path) -> KernelFolder | None:
    """The kernels of a checkpoint, from their manifest; None where there is none.

    Raises CheckpointError: LB0103 for a link that leaves the folder, LB0120 for a manifest that cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        return None
    path = contained(folder, MANIFEST)
    values = load_json(path, "LB0120")
    if values.get("schema") != SCHEMA:
        raise _bad(path, f"schema {str(values.get('schema'))[:20]} is not one this lowbit reads ({SCHEMA})")
    try:
        entries: Sequence[dict[str, Any]] = values["kernels"]
        kernels = tuple(StoredKernel.from_dict(entry) for entry in entries)
        return KernelFolder(folder, values["frozen"] is True, int(values["max_tokens"]), str(values["dtype"]), kernels)
    except KernelError as e:
        raise _bad(path, e.message) from e
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise _bad(path, f"an entry cannot be read: {str(e)[:200]}") from e


def _bad(path: Path, why: str) -> CheckpointError:
    return CheckpointError("LB0120", why, where=str(path), hint="make the kernels again with `quantize export`")
