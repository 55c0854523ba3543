"""Which kernel runs a call: a table over token counts per kernel spec, filled ahead of time or on first use.

`freeze()` ends building: from then on a call that would need a new kernel is an error, never a compile inside a
request.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from lowbit.codegen.schedule import LARGE_CLASSES, M_CLASSES, token_class
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.runtime import native_op, prebuilt
from lowbit.compiler.runtime.build import BuiltKernel, build_kernel
from lowbit.compiler.runtime.cache import KernelCache

__all__ = [
    "DTYPE_NAMES",
    "classes_up_to",
    "device_target",
    "forget",
    "freeze",
    "kernel_for",
    "loaded_kernels",
    "parse_spec",
    "reset",
    "warm",
]

DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Activation dtypes as kernel specs call them."""

_table: dict[tuple[str, torch.dtype, str, int], BuiltKernel] = {}
_by_artifact: dict[tuple[str, str, str], BuiltKernel] = {}
_locks: dict[tuple[str, torch.dtype, str, int], threading.Lock] = {}
_writing = threading.Lock()  # the operator's own table (`native_op`) holds what this one does


@cache
def parse_spec(key: str) -> KernelSpec:
    """The spec written as canonical JSON by `KernelSpec.key`."""
    values: dict[str, Any] = json.loads(key)
    values["segments"], values["epilogue"] = tuple(values["segments"]), tuple(values["epilogue"])
    return KernelSpec(**values)


@cache
def _cuda_target(index: int) -> Target:
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", f"sm_{major}{minor}")


def device_target(device: torch.device) -> Target:
    """The target of a torch device: this machine's CPU, or the GPU's architecture."""
    return _cuda_target(device.index or 0) if device.type == "cuda" else host_target()


def kernel_for(key: str, dtype: torch.dtype, device: torch.device, m: int) -> BuiltKernel:
    """The kernel of spec `key` for activations of `dtype` and `m` tokens on `device`.

    Kernels compiled into a trusted checkpoint come first, then the user's cache, then a compiler. Raises KernelError
    LB0409 when frozen and the kernel is neither here nor there.
    """
    spec = parse_spec(key)
    if spec.reads_rows:  # the type of what is rounded already, and no more, whoever asks
        dtype = torch.uint8
    slot = (key, dtype, device.type, 1 if spec.invariant else token_class(m))
    if (kernel := _table.get(slot)) is not None:
        return kernel
    if m > M_CLASSES[-1] and prebuilt.frozen() and (kernel := _table.get((*slot[:3], M_CLASSES[-1]))) is not None:
        return kernel  # it runs any number of tokens; only the choice may have been another
    with _locks.setdefault(slot, threading.Lock()):
        return _table.get(slot) or _build(slot, device)


def _build(slot: tuple[str, torch.dtype, str, int], device: torch.device) -> BuiltKernel:
    key, dtype, _, m = slot
    target, spec = device_target(device), parse_spec(key)
    spec = spec if spec.reads_rows else spec.typed(_dtype_name(dtype))
    kernel = prebuilt.prebuilt_kernel(spec, target, m)
    if kernel is None:
        kernel = (prebuilt.stored_kernel if prebuilt.frozen() else build_kernel)(spec, target, m, KernelCache())
    # Neighbouring token classes often share one schedule: keep one loaded artifact.
    same = (spec.key(), kernel.backend, json.dumps(kernel.schedule.to_dict(), sort_keys=True))
    kernel = _by_artifact.setdefault(same, kernel)
    native = native_op.prepare(kernel)
    with _writing:
        _table[slot] = kernel
        if native:
            _enter(slot, kernel)
    return kernel


def _enter(slot: tuple[str, torch.dtype, str, int], kernel: BuiltKernel) -> None:
    tokens = native_op.tokens_of(slot[3], kernel.spec.invariant)
    native_op.enter(slot[0], DTYPE_NAMES[slot[1]], tokens, kernel)


def _dtype_name(dtype: torch.dtype) -> str:
    """`dtype` as kernel specs call it; raises KernelError (LB0401) for those that no kernel takes."""
    if (name := DTYPE_NAMES.get(dtype)) is None:
        hint = "use float32, bfloat16 or float16, such as model.float()"
        raise KernelError("LB0401", f"quantized layers do not take {dtype} activations", hint=hint)
    return name


def classes_up_to(max_tokens: int) -> tuple[int, ...]:
    """Token classes a model that sees up to `max_tokens` at once can ask for."""
    top = token_class(max_tokens)
    return tuple(m for m in (*M_CLASSES, *LARGE_CLASSES) if m <= top)


def warm(keys: Iterable[str], dtype: torch.dtype, device: torch.device, max_tokens: int) -> None:
    """Build every kernel the specs can need for up to `max_tokens` tokens, as many at once as there are cores."""
    jobs = [(key, m) for key in dict.fromkeys(keys) for m in classes_up_to(max_tokens)]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for job in [pool.submit(kernel_for, key, dtype, device, m) for key, m in jobs]:
            job.result()


def freeze(frozen: bool = True) -> None:
    """From now on (until `freeze(False)`) a missing kernel is an error instead of a compile."""
    prebuilt.freeze("lowbit.compile was called with frozen=True" if frozen else "")


def forget(specs: Iterable[str]) -> None:
    """Choose the kernels of these specs anew when they are next called: after tuning. Does nothing when frozen."""
    if prebuilt.frozen():
        return
    gone = set(specs)
    with _writing:
        for slot in [slot for slot, kernel in _table.items() if kernel.spec.key() in gone]:
            _table.pop(slot, None)
        native_op.forget()
        for slot, kernel in _table.items():
            if native_op.prepare(kernel):
                _enter(slot, kernel)


def reset() -> None:
    """Forget every loaded kernel (the cache on disk stays), checkpoints' kernels, and thaw: for tests and for changed
    settings."""
    with _writing:
        _table.clear()
        native_op.forget(failure=True)
    _by_artifact.clear()
    prebuilt.forget_kernels()


def loaded_kernels() -> list[tuple[int, BuiltKernel]]:
    """(token class, kernel) of everything loaded in this process."""
    return [(slot[3], kernel) for slot, kernel in _table.items()]
