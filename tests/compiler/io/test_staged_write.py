"""Checkpoints appear complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import write
from lowbit.compiler.io.source_folder import open_shards
from lowbit.compiler.io.write import Blob, Part, staged_folder, write_shards

TENSORS = {
    "x": torch.arange(12, dtype=torch.int32).reshape(3, 4),
    "scale": torch.ones(3, dtype=torch.float16),
    "n": torch.tensor([3, 4]),
    "flag": torch.tensor(True),
    "none": torch.empty(0, 2),
}


def part(*names: str) -> Part:
    blobs = tuple(Blob(n, TENSORS[n].dtype, tuple(TENSORS[n].shape)) for n in names)
    return Part(blobs, lambda: {n: TENSORS[n] for n in names})


def test_single_file_is_what_the_library_reads(tmp_path: Path) -> None:
    write_shards(tmp_path, [part("x", "scale"), part("n"), part("flag"), part("none")], 10**9)
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype


def test_shards_keep_parts_together_and_are_indexed(tmp_path: Path) -> None:
    write_shards(tmp_path, [part("x", "scale"), part("n"), part("flag")], 20)
    assert len(list(tmp_path.glob("model-*-of-00002.safetensors"))) == 2
    files = open_shards(tmp_path)
    assert files["x"] is files["scale"]
    assert files["x"] is not files["n"]
    assert all(torch.equal(files[n].tensor(n), TENSORS[n]) for n in files)


def test_result_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out, 10) as stage:
        (stage / "a").write_text("1")
        assert not out.exists()
        assert stage.parent == out.parent
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert (out / "a").read_text() == "1"


def test_empty_folder_is_taken_over_but_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with staged_folder(out, 0) as stage:
        (stage / "a").write_text("1")
    with pytest.raises(CheckpointError, match="LB0110"), staged_folder(out, 0):
        pass
    assert (out / "a").read_text() == "1"
    with pytest.raises(CheckpointError, match="LB0110"), staged_folder(out / "a", 0):
        pass


def _fill_and_raise(out: Path, error: BaseException) -> None:
    with staged_folder(out, 0) as stage:
        (stage / "a").write_text("1")
        raise error


def test_failure_inside_leaves_nothing(tmp_path: Path) -> None:
    for error in (RuntimeError("boom"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            _fill_and_raise(tmp_path / "out", error)
        assert list(tmp_path.iterdir()) == []


def test_disk_too_small_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(CheckpointError, match=r"LB0111.*needs 1,000 bytes on disk, 10 are free"):
        with staged_folder(tmp_path / "out", 1000):
            pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def fail_at(call: Callable[..., object], nth: int, code: int) -> Callable[..., object]:
    count = iter(range(10**6))

    def wrapper(*args: object, **kwargs: object) -> object:
        if next(count) == nth:
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("code", "expected"), [(errno.ENOSPC, "LB0111"), (errno.EIO, "LB0115"), (errno.EROFS, "LB0115")]
)
@pytest.mark.parametrize("name", ["fsync", "replace", "open"])
def test_every_failing_call_is_reported_and_leaves_nothing(
    name: str, code: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0
    for nth in range(10):
        root = tmp_path / str(nth)
        root.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(write.os, name, fail_at(getattr(os, name), nth, code))
            try:
                with staged_folder(root / "out", 0) as stage:
                    write_shards(stage, [part("x"), part("n")], 10)
            except CheckpointError as e:
                assert e.code == expected  # noqa: PT017
                failures += 1
                # The last fsync is of the parent folder: by then the whole result has been renamed into place.
                assert list(root.iterdir()) in ([], [root / "out"])
                if (root / "out").exists():
                    assert open_shards(root / "out").keys() == {"x", "n"}
            else:
                assert open_shards(root / "out").keys() == {"x", "n"}
    assert failures >= 1


def test_tensor_that_is_not_as_announced(tmp_path: Path) -> None:
    lie = Part((Blob("x", torch.int32, (3, 4)),), lambda: {"x": torch.zeros(3, 5, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match="LB0114"):
        write_shards(tmp_path, [lie], 10**9)
