"""Kernel generation: specs, schedules, decode programs, and one folder per backend."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from lowbit.codegen.backend import Backend
from lowbit.compiler.errors import KernelError

__all__ = ["BACKENDS", "load_backend"]

BACKENDS = {
    "cpp": "lowbit.codegen.cpp.backend:CppBackend",
    "cuda": "lowbit.codegen.cuda.backend:CudaBackend",
    "cutlass": "lowbit.codegen.cutlass.backend:CutlassBackend",
    "triton": "lowbit.codegen.triton.backend:TritonBackend",
    "tvm": "lowbit.codegen.tvm.backend:TvmBackend",
    "library": "lowbit.codegen.library.backend:LibraryBackend",
    "reference": "lowbit.codegen.reference.backend:ReferenceBackend",
}
"""Backend name -> class, in the order they are asked when predictions tie; reference is the last resort."""


@cache
def load_backend(name: str) -> Backend:
    """The backend called `name`; raises KernelError (LB0406) when there is none."""
    if name not in BACKENDS:
        raise KernelError("LB0406", f"no backend is called {name!r}", hint="use " + ", ".join(BACKENDS))
    module, cls = BACKENDS[name].split(":")
    backend: Backend = getattr(import_module(module), cls)()
    return backend
