"""Data that is not in the repository: tests that need it skip with a reason where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["data_path", "real_model"]

_ROOT = Path(__file__).resolve().parent.parent


def data_path(name: str) -> Path:
    """A file or folder of the test data: in $LOWBIT_DATA, else in `shared/data` beside the repository."""
    folders = [Path(p) for p in [os.environ.get("LOWBIT_DATA")] if p] or [_ROOT.parent / "shared" / "data"]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"{name} is not in {folders[0]}; set LOWBIT_DATA to the folder that has it")


def real_model() -> Path:
    """SmolLM2-135M-Instruct as GGUF: $LOWBIT_MODEL, else the file `make demo` keeps in `.models/`."""
    given = os.environ.get("LOWBIT_MODEL")
    found = [Path(given)] if given else sorted((_ROOT / ".models").rglob("*.gguf"))
    if found and found[0].is_file():
        return found[0]
    pytest.skip("no real model; set LOWBIT_MODEL to a SmolLM2-135M GGUF file, or run `make demo` once")
