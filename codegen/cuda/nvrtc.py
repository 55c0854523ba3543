"""NVRTC, CUDA's compiler as a library: for machines that have torch but no CUDA toolkit.

torch's CUDA builds bring the library and `cuda-bindings`, which calls it. The kernels' text includes no header, so
nothing else is needed. A kernel compiles in a fraction of nvcc's time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from lowbit.compiler.errors import KernelError

__all__ = ["compile_in_process", "nvrtc_version"]


@cache
def _library() -> ModuleType | None:
    """`cuda.bindings.nvrtc`, if it and the library it calls are there."""
    try:
        nvrtc = import_module("cuda.bindings.nvrtc")
        status, *_ = nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError):  # bindings without the library say so with the last
        return None
    return nvrtc if int(status) == 0 else None


def nvrtc_version() -> str | None:
    """NVRTC's release, or None without it."""
    if (nvrtc := _library()) is None:
        return None
    _, major, minor = nvrtc.nvrtcVersion()
    return f"nvrtc {major}.{minor}"


def compile_in_process(text: str, flags: Sequence[str]) -> bytes:
    """The cubin of `text` for the architecture that nvcc's `flags` name; raises KernelError (LB0463 without NVRTC,
    LB0464 with the compiler's first words when it refuses)."""
    if (nvrtc := _library()) is None:
        raise KernelError("LB0463", "NVRTC was not found", hint="install cuda-bindings and nvidia-cuda-nvrtc")
    found = re.search(r"code=(sm_\w+)", " ".join(flags))
    if found is None:
        raise KernelError("LB0464", f"no architecture in {' '.join(flags)}")
    options = [f"--gpu-architecture={found[1]}".encode(), b"--std=c++17", b"--diag-suppress=177"]
    program = _call(nvrtc, nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status):
            log = b" " * int(_call(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            _call(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
            last = " / ".join(log.decode(errors="replace").strip("\0 \n").splitlines()[:6])
            raise KernelError("LB0464", f"NVRTC failed: {last[:1500]}")
        cubin = b" " * int(_call(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _call(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _call(nvrtc: ModuleType, answer: tuple[Any, ...]) -> Any:
    """What a call gives beside its status."""
    status, *values = answer
    if int(status):
        raise KernelError("LB0464", f"NVRTC failed: {status}")
    return values[0] if values else None
