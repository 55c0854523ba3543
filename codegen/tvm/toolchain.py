"""TVM as a compiler: script in, LLVM's own text out, which is what is cached; loading it makes machine code in memory.

No linker is needed for that, so that a machine without a C++ compiler does: a shared object, TVM's usual product, takes
one. Importing TVM takes seconds and changes the process (it wants to hear of crashes, and prints uncaught errors in its
own way); `load_tvm` imports it when it is first needed and puts back what it changed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowbit.codegen.tvm.emit import ENTRY
from lowbit.compiler.errors import KernelError

__all__ = ["SUFFIX", "Function", "compile_text", "flags_for", "installed", "load_function", "load_tvm", "tvm_version"]

SUFFIX = ".ll"
Function = Callable[..., Any]
"""(pointers, m, first, last) of `emit.ENTRY`: addresses as `ctypes.c_void_p`, then three integers."""

_PACKAGE = "apache-tvm"
_CPUS = {
    "avx512bf16": ("x86-64-v4", "+avx512vnni", "+avx512vbmi", "+avx512bf16"),
    "avx512vbmi": ("x86-64-v4", "+avx512vnni", "+avx512vbmi"),
    "avx512vnni": ("x86-64-v4", "+avx512vnni"),
    "avx512": ("x86-64-v4",),
    "avx2vnni": ("x86-64-v3", "+avxvnni"),
    "avx2": ("x86-64-v3",),
}
"""Instruction set -> LLVM's name of the processor and further features. Others: what every machine of the kind has."""

_lock = threading.Lock()  # nothing says that TVM's parser and LLVM may be entered twice
_SIGACTION_ROOM = 512  # bytes; more than any system's `struct sigaction`
_NO_EXTENSION = "TVM_FFI_DISABLE_TORCH_C_DLPACK"


def installed() -> bool:
    """Whether TVM could be imported; nothing is."""
    return find_spec("tvm") is not None


def tvm_version() -> str:
    """The package and its version, which decide LLVM's; raises KernelError (LB0453) where it is not installed."""
    try:
        return f"{_PACKAGE} {version(_PACKAGE)}"
    except PackageNotFoundError as e:
        raise KernelError("LB0453", f"{_PACKAGE} is not installed", hint=f"pip install {_PACKAGE}") from e


@cache
def load_tvm() -> Any:
    """The module `tvm`, imported without traces; raises KernelError (LB0453) where it cannot be."""
    tvm_version()
    with _crash_handler_kept(), _environment(_NO_EXTENSION, "1"):
        hook = sys.excepthook
        try:
            import tvm
            import tvm.script
        except (ImportError, OSError, RuntimeError) as e:
            raise KernelError("LB0453", f"{_PACKAGE} cannot be imported: {e}", hint=f"reinstall {_PACKAGE}") from e
        finally:
            sys.excepthook = hook
    return tvm


@contextmanager
def _crash_handler_kept() -> Iterator[None]:
    """What the process does when it crashes (Python's faulthandler, the default) stays."""
    try:
        sigaction = ctypes.CDLL(None).sigaction
    except (AttributeError, OSError, TypeError):  # a system without: nothing is installed there either
        yield
        return
    before = ctypes.create_string_buffer(_SIGACTION_ROOM)
    sigaction(int(signal.SIGSEGV), None, before)
    try:
        yield
    finally:
        sigaction(int(signal.SIGSEGV), before, None)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for a while. This one: TVM's bindings build no extension, which takes minutes, with
    whatever compiler they find; tensors are given as addresses."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def flags_for(arch: str) -> tuple[str, ...]:
    """LLVM's processor and features for an instruction set."""
    return _CPUS.get(arch, ())


def compile_text(text: str, flags: tuple[str, ...], out: Path) -> None:
    """Compile the function in `text` for the processor and features in `flags` into the file `out`, whose name ends in
    `SUFFIX`; raises KernelError (LB0451) with TVM's last words."""
    tvm = load_tvm()
    target: dict[str, Any] = {"kind": "llvm"}
    if flags:
        target |= {"mcpu": flags[0], "mattr": list(flags[1:])}
    with _lock:
        try:
            built = tvm.compile(tvm.script.from_source(text), target=tvm.target.Target(target))
            getattr(built, "mod", built).write_to_file(str(out), SUFFIX[1:])
        except Exception as e:  # TVM raises exceptions of many kinds
            last = " / ".join(str(e).strip().splitlines()[-2:])
            raise KernelError("LB0451", f"TVM does not compile the kernel: {type(e).__name__}: {last}") from e


def load_function(artifact: Path) -> Function:
    """The function in a file made by `compile_text`; raises KernelError (LB0452) when LLVM does not take it."""
    tvm = load_tvm()
    with _lock:
        try:
            function: Function = tvm.runtime.load_module(str(artifact))[ENTRY]
        except Exception as e:
            last = (str(e).strip().splitlines() or [""])[-1]
            raise KernelError("LB0452", f"cannot load the kernel {artifact.name}: {last}") from e
    return function
