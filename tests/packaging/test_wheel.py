"""The wheel, built from the tree and from the sdist, holds `lowbit/` and every module, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("src", "compiler", "passes", "codegen", "quantizers", "tests", "bench", "docs")
FILES = ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "Makefile")


def expected() -> set[str]:
    """Package paths of every source file in the tree."""
    found = set()
    for folder in ("compiler", "passes", "codegen", "quantizers"):
        found |= {f"lowbit/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*") if is_source(p)}
    own = ROOT / "src" / "lowbit"
    for path in own.rglob("*"):
        if is_source(path) and not (own / path.relative_to(own).parts[0]).is_symlink():
            found.add(f"lowbit/{path.relative_to(own)}")
    return found


def is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that building writes nothing into the checkout."""
    copy = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in KEPT:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(source: Path, out: Path, kind: str) -> Path:
    # With an empty environment no registry is asked, and hatchling runs in this interpreter.
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if not n.endswith("/")}


def check(wheel: Path) -> None:
    names = contents(wheel)
    package = {n for n in names if ".dist-info/" not in n}
    assert {n.split("/")[0] for n in package} == {"lowbit"}
    assert package == expected()
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_wheel_holds_the_package_and_nothing_else(tree: Path, tmp_path: Path) -> None:
    check(build(tree, tmp_path, "wheel"))


def test_wheel_from_sdist_is_the_same(tree: Path, tmp_path: Path) -> None:
    sdist = build(tree, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    check(build(next((tmp_path / "unpacked").iterdir()), tmp_path / "wheel", "wheel"))


def test_links_point_at_the_real_folders() -> None:
    for name in ("compiler", "passes", "codegen", "quantizers"):
        link = ROOT / "src" / "lowbit" / name
        assert link.is_symlink(), f"{link} is not a link"
        assert link.resolve() == ROOT / name
