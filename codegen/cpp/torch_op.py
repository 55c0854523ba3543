"""The C++ implementation of the operator `lowbit::linear` for torch's dispatcher: its source, and its entry points.

A call from Python costs far less when nothing of it is Python: torch hands the arguments over, a table says which
kernel it is, and that is called with an output from torch's allocator. Layers go past the dispatcher, too, through a
function for Python that declines calls which somebody may want to see. The text is compiled against the headers of the
torch and the Python that are installed, so its key has their versions.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from lowbit.codegen.backend import Source
from lowbit.codegen.cpp.plan import KernelPlan
from lowbit.compiler.errors import KernelError

__all__ = ["LinearOperator", "OperatorSpec", "load_operator", "operator_problem", "operator_source"]

_TORCH = Path(torch.__file__).parent
_HEADER = _TORCH / "include" / "torch" / "library.h"
_PYTHON = Path(sysconfig.get_paths()["include"])
_BOUND = (_PYTHON / "Python.h", _TORCH / "lib" / "libtorch_python.so")  # what the function for Python is built with


@dataclass(frozen=True)
class OperatorSpec:
    """What decides the operator besides its text: the torch that it is for, and the Python; empty for none, where the
    headers or torch's library for it are missing: then every call goes through torch's dispatcher."""

    torch: str = f"{torch.__version__} {torch.version.git_version}"
    python: str = field(default_factory=lambda: sys.version if all(p.is_file() for p in _BOUND) else "")

    def key(self) -> str:
        """Canonical text: equal specs, equal text."""
        return f"lowbit::linear for torch {self.torch}, Python {' '.join(self.python.split()) or 'left out'}"


class _Kernel(ctypes.Structure):
    """`Kernel` of linear_op.cpp."""

    _fields_ = [
        ("run", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first", "last", "k", "n", "operands", "bias", "residual")),
        *((name, ctypes.c_int64) for name in ("shared_bytes", "token_bytes", "thread_bytes")),
    ]


class LinearOperator:
    """The entry points of the compiled text, and of the kernels it may call. Loaded code stays for good."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        self._install, self._enter, self._forget = library.lb_install, library.lb_enter, library.lb_forget
        self._install.restype = ctypes.c_char_p
        self._enter.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Kernel)]
        self.direct: Callable[..., Any] | None = None
        """`lowbit::linear` without torch's dispatcher; returns NotImplemented for calls that are the operator's."""
        if hasattr(library, "lb_python"):
            library.lb_python.restype, sample = ctypes.py_object, torch.empty(1)
            library.lb_python.argtypes = [ctypes.py_object] * 3 + [ctypes.c_void_p]
            self.direct = library.lb_python(torch.Tensor, torch.nn.Parameter, sample, sample._cdata)

    def install(self) -> None:
        """Become the operator's implementation on CPUs; raises KernelError (LB0414) where torch refuses."""
        if (problem := self._install()) is not None:
            raise KernelError("LB0414", f"torch refuses the operator: {problem.decode(errors='replace')}")

    def enter(self, key: str, dtype: str, tokens: tuple[int, int], artifact: Path, plan: KernelPlan) -> None:
        """Calls of spec `key` with activations of `dtype` and from `tokens[0]` to `tokens[1]` tokens run the kernel in
        `artifact` from now on. Callers take turns."""
        run = ctypes.cast(ctypes.CDLL(str(artifact)).lb_run, ctypes.c_void_p).value
        spec, sizes = plan.spec, (plan.shared_bytes, plan.token_bytes, plan.thread_bytes)
        added = ("bias" in spec.epilogue, "residual" in spec.epilogue)
        kernel = _Kernel(run, *tokens, spec.k, spec.n_out, len(spec.operands), *added, *sizes)
        self._enter(key.encode(), dtype.encode(), ctypes.byref(kernel))

    def forget(self) -> None:
        """From now on every call is Python's, until kernels are entered again."""
        self._forget()


def operator_problem() -> str | None:
    """Why the operator cannot be compiled for this torch, whatever the compiler; None where it can."""
    return None if _HEADER.is_file() else f"torch came without its C++ headers ({_HEADER})"


def operator_source(spec: OperatorSpec) -> Source:
    """The text and how it is compiled. torch's libraries are those that are loaded already, by their names."""
    names = ["linear_op.cpp", *(["linear_call.cpp"] if spec.python else [])]
    texts = [files("lowbit.codegen.cpp").joinpath("text", name).read_text() for name in names]
    abi = int(torch.compiled_with_cxx11_abi())
    flags = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", f"-D_GLIBCXX_USE_CXX11_ABI={abi}")
    folders = [f"-I{_TORCH / 'include'}", *([f"-I{_PYTHON}"] if spec.python else [])]
    needed = ["-ltorch_cpu", "-lc10", *(["-ltorch_python"] if spec.python else []), "-lstdc++", "-lgcc_s"]
    libraries = ("-Wl,--no-as-needed", f"-L{_TORCH / 'lib'}", *needed)
    return Source("\n".join([f"// {spec.key()}", *texts]), ".so", (*flags, *folders, *libraries))


def load_operator(artifact: Path) -> LinearOperator:
    """The operator in a shared object, not installed yet; raises KernelError (LB0414) when it cannot be loaded.

    Its functions hold Python's lock: while torch's table of implementations changes, no call is begun from Python.
    """
    try:
        return LinearOperator(ctypes.PyDLL(str(artifact)))
    except (OSError, AttributeError) as e:
        raise KernelError("LB0414", f"cannot load the operator {artifact.name}: {e}") from e
