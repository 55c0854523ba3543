"""nvcc (or NVRTC instead) and the tools that take its output apart: where they are, running them. None needs a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lowbit.codegen.cuda.nvrtc import compile_in_process, nvrtc_version
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target

__all__ = [
    "FLAGS",
    "arch_of",
    "compile_cubin",
    "compiler_version",
    "find_nvcc",
    "find_tool",
    "no_compiler",
    "nvcc_version",
    "run_tool",
]

FLAGS = ("-cubin", "-O3", "-std=c++17", "-Xptxas", "-v", "--diag-suppress", "177")
_TIMEOUT_S = 300.0


def arch_of(target: Target) -> str:
    """What a target is called when it is compiled for: Hopper's own instructions need `90a`."""
    number = target.arch.removeprefix("sm_").rstrip("a")
    return "90a" if number == "90" else number


def find_nvcc() -> str | None:
    """Path of nvcc: `$LOWBIT_NVCC`, on the search path, of `$CUDA_HOME`, or of an installed Python package."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *_packaged()]
    for candidate in (os.environ.get("LOWBIT_NVCC", ""), "nvcc", *[f"{home}/bin/nvcc" for home in homes if home]):
        if candidate and (path := shutil.which(candidate)):
            return path
    return None


def _packaged() -> list[str]:
    """Folders of CUDA's Python packages (nvidia/cu13 and its like)."""
    spec = find_spec("nvidia")
    roots = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    return [str(folder) for root in roots for folder in sorted(root.glob("cu*")) if (folder / "bin").is_dir()]


def find_tool(name: str) -> str | None:
    """Path of `cuobjdump` or `nvdisasm`: on the search path, beside nvcc, or as Triton ships it."""
    if path := shutil.which(name):
        return path
    beside = Path(find_nvcc() or "/").parent / name
    spec = find_spec("triton")
    shipped = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec and spec.origin else beside
    return next((str(p) for p in (beside, shipped) if p.is_file()), None)


def no_compiler() -> str | None:
    """None where something compiles CUDA C++, else one line that says what is missing."""
    if find_nvcc() or nvrtc_version():
        return None
    return "neither nvcc nor NVRTC was found; install the CUDA toolkit or cuda-bindings, or set LOWBIT_NVCC"


def compiler_version() -> str:
    """Release of the compiler that is used: nvcc, or NVRTC where there is none; raises KernelError (LB0463)."""
    return nvcc_version() if find_nvcc() or not (found := nvrtc_version()) else found


def nvcc_version() -> str:
    """nvcc's release and build; raises KernelError (LB0463) without nvcc."""
    if (path := find_nvcc()) is None:
        raise KernelError("LB0463", "nvcc was not found", hint="install the CUDA toolkit, or set LOWBIT_NVCC")
    return _version(path)


@cache
def _version(path: str) -> str:
    found = re.search(r"release .*", run_tool([path, "--version"]))
    if found is None:
        raise KernelError("LB0463", f"{path} does not say its version", hint="set LOWBIT_NVCC to a working nvcc")
    return f"nvcc {found[0]}"


def compile_cubin(text: Path, flags: Sequence[str], out: Path) -> str:
    """Compile `text` into `out` and return what ptxas says of registers and spills (nothing where NVRTC stands in for
    nvcc); raises KernelError (LB0463, LB0464)."""
    path = find_nvcc()
    if path is None:
        if nvrtc_version() is None:
            raise KernelError("LB0463", "nvcc was not found", hint="install the CUDA toolkit, or set LOWBIT_NVCC")
        out.write_bytes(compile_in_process(text.read_text(), flags))
        return ""
    return run_tool([path, *flags, "-o", str(out), str(text)])


def run_tool(command: Sequence[str]) -> str:
    """Output of a tool; raises KernelError (LB0464) with its last words when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise KernelError("LB0464", f"{Path(command[0]).name} cannot be run: {e}") from e
    if done.returncode:
        last = " / ".join((done.stderr or done.stdout).strip().splitlines()[:6])
        raise KernelError("LB0464", f"{Path(command[0]).name} failed with status {done.returncode}: {last[:1500]}")
    return done.stdout + done.stderr
