"""The C++ compiler: which one, its version, and running it."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from lowbit.compiler.errors import KernelError

__all__ = ["TIMEOUT", "compile_shared", "compiler_version", "find_compiler"]

TIMEOUT = 120.0
"""Seconds one compilation may take."""

_BASE = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fopenmp")
# -ffp-contract=off: products and sums are fused only where the text says so, so that every instruction set rounds
# alike. -fwrapv: sums of digits may wrap on the way to a total that fits. -fno-trapping-math: nobody asks which
# exceptions floats raised; where they count, comparisons are branches, and loops over them are not vectorized.
_SEMANTICS = (
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-psabi",
)
FLAGS = (*_BASE, *_SEMANTICS)


def find_compiler() -> str | None:
    """Path of the compiler: `$CXX`, else g++, clang++ or c++ on the search path; None when there is none."""
    for candidate in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if candidate and (path := shutil.which(candidate)):
            return path
    return None


def compiler_version() -> str:
    """The compiler's own first line; raises KernelError (LB0413) without a compiler."""
    return _version(_require())


@cache
def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise KernelError("LB0413", f"{compiler} --version failed: {e}", hint="set CXX to a working compiler") from e
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise KernelError("LB0413", f"{compiler} --version failed", hint="set CXX to a working compiler")
    return lines[0].strip()


def compile_shared(text: Path, flags: tuple[str, ...], out: Path) -> None:
    """Compile `text` into the shared object `out`; raises KernelError (LB0410) with the compiler's last words."""
    compiler = _require()
    command = [compiler, *flags, "-o", str(out), str(text), *_link(compiler)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as e:
        raise KernelError("LB0410", f"the C++ compiler did not finish in {TIMEOUT:.0f} s") from e
    except OSError as e:
        raise KernelError("LB0410", f"{compiler} cannot be run: {e}", hint="set CXX to a working compiler") from e
    if done.returncode:
        last = " / ".join(done.stderr.strip().splitlines()[-4:])
        raise KernelError("LB0410", f"the C++ compiler failed with status {done.returncode}: {last}")


def _link(compiler: str) -> tuple[str, ...]:
    """GCC's OpenMP entry points are left undefined, so that they bind to the library torch has already loaded.

    A second copy would bring its own threads, which fight with torch's. clang calls another library and keeps it.
    """
    return () if "clang" in _version(compiler) else ("-nodefaultlibs", "-lm", "-lc", "-lgcc")


def _require() -> str:
    if (path := find_compiler()) is None:
        raise KernelError("LB0413", "no C++ compiler was found", hint="install g++ or set CXX")
    return path
