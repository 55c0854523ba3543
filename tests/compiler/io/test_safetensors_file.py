"""The header reader against the safetensors library, and against files nobody should believe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.safetensors_file import SafetensorsFile, read_header

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1, 2, 3], dtype=torch.int64),
    "c.weight": torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "empty": torch.empty(0, 7),
    "scalar": torch.tensor(3.5, dtype=torch.float16),
    "flags": torch.tensor([True, False]),
    "small": torch.ones(3).to(torch.float8_e4m3fn),
}
U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "m.safetensors", metadata={"format": "pt"})
    return tmp_path / "m.safetensors"


def raw_file(path: Path, header: bytes, data: bytes = b"\0" * 4) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as e:
        read_header(path)
    assert e.value.code == "LB0102"
    assert str(path) in str(e.value)
    return str(e.value)


def test_reads_what_the_library_writes(path: Path) -> None:
    file = SafetensorsFile(path)
    assert set(file.header.tensors) == set(TENSORS)
    assert file.header.metadata == {"format": "pt"}
    for name, expected in TENSORS.items():
        got = file.tensor(name)
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert got.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8))


def test_tensors_are_independent_copies(path: Path) -> None:
    file = SafetensorsFile(path)
    file.tensor("a").fill_(0)
    assert torch.equal(file.tensor("a"), TENSORS["a"])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="LB0101"):
        read_header(tmp_path / "absent.safetensors")


def test_truncated_at_every_byte(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert str(size) in refused(path)


def test_bytes_after_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    assert "after the last tensor" in refused(path)


def test_file_that_shrinks_after_it_was_opened(path: Path) -> None:
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="LB0102"):
        [file.tensor(name) for name in TENSORS]


def entry(**changes: Any) -> bytes:
    return json.dumps({"t": {**U8, **changes}}).encode()


def pair(first: dict[str, Any], second: dict[str, Any]) -> bytes:
    return json.dumps({"x": {**U8, **first}, "y": {**U8, **second}}).encode()


BAD: dict[str, bytes] = {
    "empty object but data": b"{}",
    "not an object": b"[1]",
    "number": b"12",
    "not json": b"{nope}",
    "no closing brace": b'{"t": ',
    "leading space": b" " + entry(),
    "trailing garbage": entry() + b"x",
    "not utf-8": b'{"\xff\xfe": 1}',
    "nul bytes": b"\0" * 16,
    "duplicate key": b'{"t":' + json.dumps(U8).encode() + b',"t":' + json.dumps(U8).encode() + b"}",
    "duplicate inner key": b'{"t":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "entry is a list": b'{"t": []}',
    "entry is null": b'{"t": null}',
    "entry is empty": b'{"t": {}}',
    "no dtype": b'{"t": {"shape": [4], "data_offsets": [0, 4]}}',
    "no shape": b'{"t": {"dtype": "U8", "data_offsets": [0, 4]}}',
    "no offsets": b'{"t": {"dtype": "U8", "shape": [4]}}',
    "extra key": entry(extra=1),
    "unknown dtype": entry(dtype="U7"),
    "lower case dtype": entry(dtype="u8"),
    "dtype is a number": entry(dtype=8),
    "dtype is a list": entry(dtype=["U8"]),
    "dtype is null": entry(dtype=None),
    "shape is a number": entry(shape=4),
    "shape is a string": entry(shape="4"),
    "shape is null": entry(shape=None),
    "negative size": entry(shape=[-4]),
    "two negative sizes": entry(shape=[-2, -2]),
    "float size": entry(shape=[4.0]),
    "string size": entry(shape=["4"]),
    "boolean size": entry(shape=[True, 4]),
    "nested size": entry(shape=[[4]]),
    "huge size": entry(shape=[2**64]),
    "product overflows 64 bits": entry(shape=[2**32, 2**32, 4]),
    "product wraps to the right value": entry(shape=[2**62, 4, 4]),
    "size of hundreds of digits": b'{"t":{"dtype":"U8","shape":[1' + b"0" * 400 + b'],"data_offsets":[0,4]}}',
    "size of ten thousand digits": b'{"t":{"dtype":"U8","shape":[1' + b"0" * 10000 + b'],"data_offsets":[0,4]}}',
    "thousands of dimensions": entry(shape=[1] * 5000 + [4]),
    "shape too large for span": entry(shape=[5]),
    "shape too small for span": entry(shape=[3]),
    "wrong width": entry(dtype="F32"),
    "one offset": entry(data_offsets=[4]),
    "three offsets": entry(data_offsets=[0, 4, 4]),
    "offsets descend": entry(data_offsets=[4, 0]),
    "negative offset": entry(data_offsets=[-4, 0]),
    "float offsets": entry(data_offsets=[0.0, 4.0]),
    "offsets are a string": entry(data_offsets="04"),
    "offset beyond the file": entry(data_offsets=[4, 8]),
    "terabyte": entry(shape=[2**40], data_offsets=[0, 2**40]),
    "NaN": entry(shape=[float("nan")]),
    "Infinity": entry(data_offsets=[0, float("inf")]),
    "overlap": pair({}, {}),
    "partial overlap": pair({"shape": [3], "data_offsets": [0, 3]}, {"shape": [3], "data_offsets": [1, 4]}),
    "hole": pair({"shape": [1], "data_offsets": [0, 1]}, {"shape": [2], "data_offsets": [2, 4]}),
    "hole at the start": entry(shape=[3], data_offsets=[1, 4]),
    "data left over": entry(shape=[3], data_offsets=[0, 3]),
    "metadata is a list": b'{"__metadata__": [], "t":' + json.dumps(U8).encode() + b"}",
    "metadata value is a number": b'{"__metadata__": {"a": 1}, "t":' + json.dumps(U8).encode() + b"}",
    "deep nesting": b'{"t":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_header(name: str, tmp_path: Path) -> None:
    refused(raw_file(tmp_path / "bad.safetensors", BAD[name]))


def test_the_good_entry_is_good(tmp_path: Path) -> None:
    assert list(read_header(raw_file(tmp_path / "good.safetensors", entry())).tensors) == ["t"]


@pytest.mark.parametrize("length", [0, 1, 5, 100_000_001, 2**40, 2**63, 2**64 - 1])
def test_bad_header_length(length: int, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    refused(path)


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    refused(tmp_path)


@given(data=st.data())
def test_any_mutation_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Flip, drop or insert bytes: the file is refused with LB0102, or every tensor still has its declared size."""
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    save_file({k: TENSORS[k] for k in ("a", "b")}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "drop", "insert"]))
        value = data.draw(st.integers(0, 255))
        content[at : at + (kind != "insert")] = [] if kind == "drop" else [value]
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except CheckpointError as e:
        assert e.code == "LB0102"  # noqa: PT017
        return
    for name, info in file.header.tensors.items():
        assert tuple(file.tensor(name).shape) == info.shape
