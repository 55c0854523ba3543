"""Reading safetensors files that may be broken or hostile: the header is validated before anything is allocated.

A file is an 8-byte little-endian header length, that many bytes of JSON, and the data. Every tensor's type, shape and
span must agree, and the spans must tile the data exactly; so a truncated or edited file is refused with byte counts
instead of giving wrong numbers. Tensors are then read one at a time, on request.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from lowbit.compiler.errors import CheckpointError

__all__ = ["DTYPE_NAMES", "MAX_HEADER", "Header", "SafetensorsFile", "TensorInfo", "read_header"]

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself."""

_MAX_DIMS = 32
_MAX_SIZE = 2**63 - 1

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""safetensors name of every torch dtype that can be stored."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's entry: torch dtype, shape, and the bytes [start, end) of the file's data section."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header. data_start and size are byte offsets in the file; digest is the SHA-256 of the header."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    size: int
    digest: str


def read_header(path: Path) -> Header:
    """Validate the header of the safetensors file at `path`.

    Raises CheckpointError: LB0101 when there is no such file, LB0102 when anything in it is inconsistent.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), size)
            raw = file.read(length)
    except FileNotFoundError as e:
        raise CheckpointError("LB0101", "no such file", where=str(path)) from e
    except OSError as e:
        raise CheckpointError("LB0102", f"cannot be read: {e.strerror}", where=str(path)) from e
    if len(raw) != length:
        _refuse(path, f"the header is {length} bytes but only {len(raw)} could be read")
    entries = _parse(path, raw)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    tensors = {name: _entry(path, name, value) for name, value in entries.items()}
    _check_spans(path, tensors, size - 8 - length, size)
    return Header(path, tensors, metadata, 8 + length, size, hashlib.sha256(raw).hexdigest())


def _refuse(path: Path, why: str) -> NoReturn:
    raise CheckpointError(
        "LB0102", f"not a valid safetensors file: {why}", where=str(path), hint="fetch or save the file again"
    )


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        _refuse(path, f"truncated: expected at least 8 bytes, found {size}")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        _refuse(path, f"the header claims {length} bytes, more than the {MAX_HEADER} that the format allows")
    if length < 2:
        _refuse(path, f"the header claims {length} bytes, too few for JSON")
    if 8 + length > size:
        _refuse(path, f"truncated: the header ends at byte {8 + length}, the file has {size} bytes")
    return length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        _refuse(path, "the header does not start with '{'")
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        _refuse(path, f"the header is not JSON: {str(e)[:200]}")
    assert isinstance(entries, dict)  # it starts with '{'
    return entries


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        _refuse(path, "__metadata__ must map strings to strings")
    return value


def _entry(path: Path, name: str, value: Any) -> TensorInfo:
    shown = name[:200]
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"tensor {shown!r} needs exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        _refuse(path, f"tensor {shown!r} has unknown dtype {str(value['dtype'])[:40]!r}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        _refuse(path, f"tensor {shown!r} has a shape that is not a list of non-negative integers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"tensor {shown!r} has data_offsets that are not an ascending pair")
    expected, actual = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if expected != actual:
        _refuse(path, f"tensor {shown!r} needs {expected} bytes by its shape, but its offsets span {actual}")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(values: Any) -> bool:
    # bool is an int in Python, and `true` is not a size.
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= _MAX_SIZE for v in values)


def _check_spans(path: Path, tensors: dict[str, TensorInfo], available: int, size: int) -> None:
    """Sorted by offset, the spans must tile the data: no hole, no overlap, nothing before, between or after."""
    end, last = 0, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            kind = "overlaps" if info.start < end else "leaves a hole after"
            _refuse(path, f"tensor {name[:200]!r} starts at {info.start} and {kind} {last!r}, which ends at {end}")
        end, last = info.end, name[:200]
    if end > available:
        _refuse(path, f"truncated: the tensors need {size - available + end} bytes, the file has {size}")
    if end < available:
        _refuse(path, f"{available - end} bytes after the last tensor: expected {size - available + end}, found {size}")


class SafetensorsFile:
    """A validated file whose tensors are read on request, each into memory of its own.

    Plain reads instead of a memory map: peak memory is one tensor, and a file that shrinks later is an error, not a
    bus fault.
    """

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)

    def info(self, name: str) -> TensorInfo:
        """Its entry in the header; KeyError when there is none."""
        return self.header.tensors[name]

    def tensor(self, name: str, part: int | None = None) -> torch.Tensor:
        """The tensor called `name`, or its entry `part` along the first dimension, of which no more is read.

        KeyError when there is none, LB0102 when the file changed since it was opened.
        """
        info = self.header.tensors[name]
        shape = info.shape if part is None else info.shape[1:]
        size = (info.end - info.start) // (1 if part is None else info.shape[0])
        buffer = bytearray(size)
        if not buffer:
            return torch.empty(shape, dtype=info.dtype)
        try:
            with self.header.path.open("rb") as file:
                file.seek(self.header.data_start + info.start + size * (part or 0))
                got = file.readinto(buffer)
        except OSError as e:
            raise CheckpointError("LB0102", f"cannot be read: {e.strerror}", where=str(self.header.path)) from e
        if got != len(buffer):
            _refuse(self.header.path, f"truncated: tensor {name!r} has {got} of its {len(buffer)} bytes")
        return torch.frombuffer(buffer, dtype=info.dtype).reshape(shape)
