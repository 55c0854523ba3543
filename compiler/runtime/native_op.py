"""The operator `lowbit::linear` without Python on CPUs: when it is built, and which kernels it may call.

Python remains the implementation that everything falls back to: it chooses, builds and loads kernels, and refuses
calls. Each kernel that it chooses is entered in the operator's table, so that the next call like it stays in C++. Both
run the same kernels with the same threads, so results do not depend on which it is.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lowbit.codegen.cpp.bytes_plan import vector_plan
from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.cpp.torch_op import (
    LinearOperator,
    OperatorSpec,
    load_operator,
    operator_problem,
    operator_source,
)
from lowbit.codegen.schedule import LARGE_CLASSES, M_CLASSES
from lowbit.codegen.select import say_once
from lowbit.compiler.errors import KernelError
from lowbit.compiler.runtime.build import BuiltKernel
from lowbit.compiler.runtime.compiled import compiled

__all__ = ["enter", "forget", "installed", "missing", "prepare", "switched_off", "tokens_of"]

_log = logging.getLogger("lowbit")
_lock = threading.Lock()
_operator: LinearOperator | None = None
_problem: KernelError | None = None

installed = False
"""Whether calls of the operator on CPUs arrive in C++ in this process. Once they do, it stays so."""

direct: Callable[..., Any] | None = None
"""The operator for layers, without torch's dispatcher (see `LinearOperator.direct`); None before it is installed."""


def switched_off() -> bool:
    """Whether `$LOWBIT_NATIVE_OPERATOR` is 0: calls of kernels go through Python."""
    return os.environ.get("LOWBIT_NATIVE_OPERATOR", "1") in ("", "0")


def missing() -> str | None:
    """Why calls of CPU kernels go through Python here, as far as it is known without compiling; None where not."""
    if switched_off():
        return "LOWBIT_NATIVE_OPERATOR is 0"
    if _problem is not None:
        return _problem.message
    if why := operator_problem():
        return why
    return None if find_compiler() else "no C++ compiler was found"


def prepare(kernel: BuiltKernel) -> bool:
    """Whether calls of `kernel` can do without Python. Builds and installs the operator the first time it is needed;
    in a frozen process one from the cache, or none."""
    if kernel.backend != "cpp" or kernel.artifact is None or switched_off():
        return False
    with _lock:
        if _operator is None and _problem is None:
            _install()
    return _operator is not None


def _install() -> None:
    global _operator, _problem, installed, direct
    try:
        found = load_operator(_artifact())
        found.install()
        _operator, installed, direct = found, True, found.direct
    except KernelError as e:
        _problem = e
        say_once(f"calls of CPU kernels go through Python, which takes some microseconds more: {e.message}")


def _artifact() -> Path:
    """The compiled operator, from the cache or a compiler. Raises KernelError (LB04xx)."""
    if why := operator_problem():
        raise KernelError("LB0413", why, hint="install torch from its own packages")
    spec = OperatorSpec()
    return compiled(spec, operator_source(spec), f"the operator lowbit::linear for torch {torch.__version__}")


def tokens_of(token_class: int, invariant: bool) -> tuple[int, int]:
    """The fewest and the most tokens of the calls that a kernel of `token_class` serves.

    >>> tokens_of(4, False), tokens_of(4096, False)[0], tokens_of(1, True)[0]
    ((3, 4), 2049, 1)
    """
    most = 2**62
    if invariant:
        return 1, most
    classes = (0, *M_CLASSES, *LARGE_CLASSES)
    first = next(low + 1 for low, high in pairwise(classes) if high == token_class)
    return first, most if token_class == classes[-1] else token_class


def enter(key: str, dtype: str, tokens: tuple[int, int], kernel: BuiltKernel) -> None:
    """Calls of spec `key`, activations of `dtype` and `tokens_of` its class run `kernel`, for which `prepare` was true,
    without Python from now on. Callers take turns."""
    assert _operator is not None
    assert kernel.artifact is not None
    plan = vector_plan(kernel.spec, kernel.schedule) if kernel.spec.vector else Plan(kernel.spec, kernel.schedule)
    _operator.enter(key, dtype, tokens, kernel.artifact, plan)


def forget(failure: bool = False) -> None:
    """Call Python for every kernel until it is entered again. failure: try to build the operator again, too."""
    global _problem
    if _operator is not None:
        _operator.forget()
    if failure:
        _problem = None
