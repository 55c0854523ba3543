"""Odd shapes of every family of formats under AddressSanitizer and UndefinedBehaviorSanitizer, on 1 to 3 threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import _sanitized
import pytest

from lowbit.codegen.cpp.toolchain import find_compiler

FAMILIES = [*_sanitized.FAMILIES, "attention"]


def sanitizers() -> list[str]:
    """The shared libraries that kernels built with sanitizers need to be there before anything else; skips without."""
    compiler = find_compiler()
    if compiler is None or "clang" in Path(compiler).name:
        pytest.skip("the sanitizers' libraries are looked for with g++")
    found = []
    for name in ("libasan.so", "libubsan.so"):
        ask = [compiler, f"-print-file-name={name}"]
        path = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"{compiler} comes without {name}")
        found.append(str(path.resolve()))
    return found


def test_there_are_hundreds_of_shapes() -> None:
    assert sum(map(_sanitized.shapes, FAMILIES)) >= 300 or _sanitized.HOST != "avx512vnni"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_sanitizer_finds_anything(family: str) -> None:
    # Nothing but kernels is instrumented: what Python and torch leave behind at the end is not looked at.
    settings = {
        "LD_PRELOAD": ":".join(sanitizers()),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    worker = [sys.executable, _sanitized.__file__, family]
    done = subprocess.run(worker, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) == _sanitized.shapes(family) > 0
