"""The kernel cache: misses, hits, damage, races, permissions."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from lowbit.codegen.backend import Source
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime.cache import KernelCache, generator_digest

SPEC = KernelSpec((16,), 32, "int4.g32.sym", str(LAYOUTS["panel16"]), "float")
TARGET = Target("cpu", "generic")


def key(cache: KernelCache, **changes: object) -> str:
    values = {
        "spec": SPEC,
        "schedule": Schedule(),
        "target": TARGET,
        "source": Source("x", ".so"),
        "toolchain": "g++ 1",
    }
    return cache.key(**{**values, **changes})  # type: ignore[arg-type]


def write(path: Path) -> None:
    path.write_bytes(b"kernel" * 100)


def test_everything_that_decides_the_bytes_is_in_the_key(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    variants = [
        key(cache),
        key(cache, schedule=Schedule(tile_m=2)),
        key(cache, target=Target("cpu", "avx2")),
        key(cache, source=Source("y", ".so")),
        key(cache, source=Source("x", ".so", ("-O3",))),
        key(cache, toolchain="g++ 2"),
        key(cache, spec=KernelSpec((16,), 64, "int4.g32.sym", SPEC.layout, "float")),
    ]
    assert len(set(variants)) == len(variants)
    assert key(cache) == variants[0]
    assert len(generator_digest()) == 16


def test_miss_then_hit(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    assert cache.lookup("abc") is None
    artifact = cache.store("abc", ".so", {"error": 0.5}, write)
    found = cache.lookup("abc")
    assert found is not None
    assert found[0] == artifact
    assert found[1]["error"] == 0.5


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise KernelError("LB0410", "no")

    with pytest.raises(KernelError):
        cache.store("abc", ".so", {}, fail)
    assert list(cache.root.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no-meta", "bad-json", "list-json", "escape"])
def test_a_damaged_entry_is_a_miss_and_is_removed(tmp_path: Path, damage: str) -> None:
    cache = KernelCache(tmp_path)
    artifact = cache.store("abc", ".so", {}, write)
    meta = artifact.parent / "meta.json"
    if damage == "flip":
        artifact.write_bytes(b"K" + artifact.read_bytes()[1:])
    elif damage == "truncate":
        artifact.write_bytes(artifact.read_bytes()[:-1])
    elif damage == "remove":
        artifact.unlink()
    elif damage == "no-meta":
        meta.unlink()
    elif damage == "escape":
        outside = tmp_path / "planted.so"
        write(outside)
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "file": str(outside)}))
    else:
        meta.write_text("{" if damage == "bad-json" else "[]")
    assert cache.lookup("abc") is None
    assert not (cache.root / "abc").exists()
    assert cache.store("abc", ".so", {}, write).read_bytes() == b"kernel" * 100


def test_the_folder_is_private(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    cache.store("abc", ".so", {}, write)
    assert cache.root.stat().st_mode & 0o777 == 0o700
    os.chmod(cache.root, 0o755)
    cache.store("def", ".so", {}, write)
    assert cache.root.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelError, match="LB0420"):
        KernelCache(tmp_path / "file").store("abc", ".so", {}, write)


def _race(root: str, rounds: int) -> None:
    cache = KernelCache(Path(root))
    for i in range(rounds):
        if cache.lookup(f"k{i}") is None:
            cache.store(f"k{i}", ".so", {}, write)
        found = cache.lookup(f"k{i}")
        assert found is not None
        assert found[0].read_bytes() == b"kernel" * 100


def test_many_processes_can_build_the_same_kernels(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_race, args=(str(tmp_path), 30)) for _ in range(6)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert [w.exitcode for w in workers] == [0] * 6
    assert sorted(p.name for p in (tmp_path / "kernels").iterdir()) == sorted(f"k{i}" for i in range(30))
