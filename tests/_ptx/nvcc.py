"""PTX of CUDA C++, as nvcc makes it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lowbit.codegen.cuda.toolchain import find_nvcc, run_tool

__all__ = ["compile_ptx"]

_FLAGS = ("-ptx", "-O3", "-std=c++17", "--diag-suppress", "177,1046")


def compile_ptx(text: str, arch: str) -> str:
    """arch: such as `sm_90a`. Raises KernelError where nvcc fails or is missing."""
    with tempfile.TemporaryDirectory(prefix="lowbit-ptx-") as folder:
        source, out = Path(folder) / "kernel.cu", Path(folder) / "kernel.ptx"
        source.write_text(text)
        run_tool([find_nvcc() or "nvcc", *_FLAGS, f"-arch={arch}", "-o", str(out), str(source)])
        return out.read_text()
