"""Loading a compiled kernel and calling it."""

from __future__ import annotations

import ctypes
import ctypes.util
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lowbit.codegen.backend import Launcher
from lowbit.codegen.cpp.plan import KernelPlan
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["load_kernel", "load_openmp"]

_scratch = threading.local()
_ARGTYPES: list[Any] = [
    ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_int,
]  # fmt: skip


@cache
def load_openmp() -> None:
    """Make OpenMP's entry points visible: torch's own library when it has one, else the compiler's."""
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    try:
        loaded = {row.split()[-1] for row in Path("/proc/self/maps").read_text().splitlines() if "omp" in row}
    except OSError:
        loaded = set()
    names = sorted(path for path in loaded if "libgomp" in path or "libomp" in path or "libiomp" in path)
    for name in (*names, ctypes.util.find_library("gomp") or "libgomp.so.1"):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
            return
    raise KernelError("LB0414", "no OpenMP library was found", hint="install libgomp")


def _room(size: int) -> int:
    """Address of at least `size` bytes that belong to the calling thread; kept, and grown when a call needs more."""
    try:
        if _scratch.size >= size:
            return _scratch.address  # type: ignore[no-any-return]
    except AttributeError:
        pass
    _scratch.room = torch.empty(size, dtype=torch.uint8)
    _scratch.size, _scratch.address = size, _scratch.room.data_ptr()
    return _scratch.address  # type: ignore[no-any-return]


def load_kernel(artifact: Path, plan: KernelPlan) -> Launcher:
    """A launcher for the shared object `artifact`; raises KernelError (LB0414) when it cannot be loaded.

    Calls use as many threads as torch (`torch.set_num_threads`), allocate nothing once the scratch memory has grown,
    and may come from several Python threads at once.
    """
    load_openmp()
    try:
        run = ctypes.CDLL(str(artifact)).lb_run
    except (OSError, AttributeError) as e:
        raise KernelError("LB0414", f"cannot load the kernel {artifact.name}: {e}") from e
    run.argtypes, run.restype = _ARGTYPES, ctypes.c_int
    # Looked up once: a call must cost a few microseconds.
    k, segments, n_out, operands = plan.spec.k, plan.spec.segments, plan.spec.n_out, plan.spec.operands
    needs_bias, needs_residual = "bias" in plan.spec.epilogue, "residual" in plan.spec.epilogue
    shared_bytes, token_bytes, thread_bytes = plan.shared_bytes, plan.token_bytes, plan.thread_bytes
    pointers = ctypes.c_void_p * len(operands)
    threads_of = torch.get_num_threads

    def launch(
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        m, n = out.shape
        if weight.k != k or weight.segments != segments or n != n_out or x.numel() != m * k:
            raise KernelError("LB0415", f"a kernel for {segments} x {k} got {weight.segments} x {weight.k}")
        if (needs_bias and bias is None) or (needs_residual and residual is None):
            raise KernelError("LB0415", f"a kernel with {' and '.join(plan.spec.epilogue)} was called without")
        threads = threads_of()
        size = shared_bytes + token_bytes * m + thread_bytes * threads + 256  # as checked in run.h
        tensors = weight.tensors
        status = run(
            x.data_ptr(),
            m,
            pointers(*[tensors[name].data_ptr() for name in operands]),
            None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            _room(size),
            size,
            threads,
        )
        if status:
            raise KernelError("LB0415", f"the kernel refused the call (status {status})")

    return launch
