"""Writing checkpoints so that a reader sees the whole result or nothing.

Everything goes into a folder beside the destination, is forced to disk, and is renamed at the end. Tensors are
streamed: only one part (a tensor, or the tensors of one module) is in memory at a time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.safetensors_file import DTYPE_NAMES

__all__ = ["Blob", "Part", "explain_os_errors", "staged_file", "staged_folder", "write_json", "write_shards"]


@dataclass(frozen=True, slots=True)
class Blob:
    """A tensor that will be written: name, dtype and shape are known before its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that are loaded together. `load` gives a tensor for every blob, by name."""

    blobs: tuple[Blob, ...]
    load: Callable[[], Mapping[str, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return sum(blob.nbytes for blob in self.blobs)


@contextlib.contextmanager
def staged_folder(out: Path, needed: int) -> Iterator[Path]:
    """A new folder that becomes `out` when the block ends, and is removed when it raises.

    needed: bytes that will be written. Raises CheckpointError: LB0110 when `out` exists and is not an empty folder,
    LB0111 when the disk has less than `needed` bytes free or fills up, LB0115 when it cannot be written.
    """
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            "LB0110", "already exists and is not an empty folder", where=str(out), hint="choose another output folder"
        )
    with _staged(out, needed) as stage:
        stage.mkdir()
        yield stage


@contextlib.contextmanager
def staged_file(out: Path, needed: int) -> Iterator[Path]:
    """The path of a file to write that becomes `out` when the block ends, and is removed when it raises.

    needed: bytes that will be written. Raises CheckpointError: LB0110 when `out` exists, others as `staged_folder`.
    """
    out = out.expanduser().resolve()
    if out.exists():
        raise CheckpointError("LB0110", "already exists", where=str(out), hint="choose another name for the file")
    with _staged(out, needed) as stage:
        yield stage


@contextlib.contextmanager
def _staged(out: Path, needed: int) -> Iterator[Path]:
    """A path beside `out`; the file or folder that is made there takes its place when the block ends."""
    with explain_os_errors(out, needed):
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            raise _disk_full(out, needed, free)
        stage = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
        try:
            yield stage
            _sync(stage)
            os.replace(stage, out)
            _sync_one(out.parent)
        except BaseException:
            _remove(stage)
            raise


def _remove(path: Path) -> None:
    """Remove a file or folder, as far as that works: there is another error to tell."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def explain_os_errors(out: Path, needed: int | None = None, kept: str = "nothing was left behind") -> Iterator[None]:
    """Inside, what the system says about writing `out` becomes CheckpointError LB0111 or LB0115.

    needed: bytes, where they are known. kept: what is on the disk afterwards.
    """
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                raise _disk_full(out, needed, shutil.disk_usage(out.parent).free, kept) from e
        why = f"cannot be written: {e.strerror or e}"
        raise CheckpointError("LB0115", why, where=str(out), hint=f"{kept}; check the disk and its permissions") from e


def _disk_full(out: Path, needed: int | None, free: int, kept: str = "nothing was left behind") -> CheckpointError:
    why = "the disk is full" if needed is None else f"needs {needed:,} bytes on disk"
    return CheckpointError("LB0111", f"{why}, {free:,} are free", where=str(out), hint=f"free some space; {kept}")


def _sync(stage: Path) -> None:
    """Force a file, or a folder and everything below it, to disk."""
    for path in [*stage.rglob("*"), stage]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as indented JSON; keys keep their order."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_shards(folder: Path, parts: Sequence[Part], shard_bytes: int) -> None:
    """Write `parts` as model.safetensors, or as an index and shards of `shard_bytes` (more when one part is larger)."""
    shards = _split(parts, shard_bytes)
    if len(shards) == 1:
        _write_safetensors(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard)
        weight_map |= {blob.name: name for part in shard for blob in part.blobs}
    total = sum(part.nbytes for part in parts)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _split(parts: Sequence[Part], limit: int) -> list[list[Part]]:
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.nbytes
    return shards


def _write_safetensors(path: Path, parts: Sequence[Part]) -> None:
    """Header first, then every part at its offset. Wide types lie first, so that each tensor is aligned to its type."""
    blobs = sorted((b for part in parts for b in part.blobs), key=lambda b: (-b.dtype.itemsize, b.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for blob in blobs:
        offsets[blob.name] = end
        span = [end, end + blob.nbytes]
        header[blob.name] = {"dtype": DTYPE_NAMES[blob.dtype], "shape": list(blob.shape), "data_offsets": span}
        end += blob.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        start = 8 + len(raw)
        file.truncate(start + end)
        for part in parts:
            tensors = part.load()
            for blob in part.blobs:
                file.seek(start + offsets[blob.name])
                file.write(_bytes(blob, tensors[blob.name]))


def _bytes(blob: Blob, tensor: torch.Tensor) -> memoryview:
    if tensor.dtype != blob.dtype or tuple(tensor.shape) != blob.shape:
        actual = f"{tensor.dtype} {list(tensor.shape)}"
        raise CheckpointError("LB0114", f"expected {blob.dtype} {list(blob.shape)}, got {actual}", where=blob.name)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a single element may keep the stride of what it was cut from
    return flat.view(torch.uint8).numpy().data
