"""Loading the kernels of a packed key-value cache and calling them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.codegen.attend import AttendSpec
from lowbit.codegen.cpp.attend import STATE_ORDER, partial_floats, unit_tokens
from lowbit.codegen.cpp.launch import load_openmp
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.formats.kv import KV_BLOCK

__all__ = ["AttendKernel", "load_attend"]

_TASKS = 16  # enough to even out what other processes take from a few threads; fixed, so that results are too


@dataclass(frozen=True)
class AttendKernel:
    """append(keys, values, state, length): float32 [batch, heads, tokens, head_dim] behind `length` tokens.

    attend(q, state, length, mask, scale): float32 [batch, query heads, queries, head_dim], as
    `codegen.reference.kvstate.attend`; mask bool [batch, 1, queries, tokens]. state: in the order of the operands.
    """

    append: Callable[[Tensor, Tensor, list[Tensor], int], None]
    attend: Callable[[Tensor, list[Tensor], int, Tensor | None, float], Tensor]


@dataclass(frozen=True)
class _Places:
    """Where in a list of operands the tensors are that a kernel takes."""

    order: tuple[int, ...]
    planes: tuple[int, int]
    windows: tuple[int, int]

    @staticmethod
    def of(spec: AttendSpec) -> _Places:
        at = {name: i for i, name in enumerate(spec.operands)}
        order = tuple(at.get(name, -1) for name in STATE_ORDER)
        return _Places(order, (order[0], order[4]), (order[3], order[7]))

    def pointers(self, state: list[Tensor]) -> Any:
        return (ctypes.c_void_p * len(self.order))(*(state[i].data_ptr() if i >= 0 else None for i in self.order))

    def sizes(self, state: list[Tensor]) -> tuple[int, int, int]:
        """Capacity, rows of the key window, rows of the value window."""
        rows = [state[i].shape[2] if i >= 0 else 0 for i in self.windows]
        for plane, per in zip(self.planes, (16, KV_BLOCK), strict=True):
            if plane >= 0:
                return state[plane].shape[2] * per, rows[0], rows[1]
        return rows[0], rows[0], rows[1]


def load_attend(artifact: Path, spec: AttendSpec) -> AttendKernel:
    """The kernels in the shared object `artifact`; raises KernelError (LB0414) when it cannot be loaded."""
    load_openmp()
    try:
        library = ctypes.CDLL(str(artifact))
        run_attend, run_append = library.lb_attend, library.lb_append
    except (OSError, AttributeError) as e:
        raise KernelError("LB0414", f"cannot load the kernel {artifact.name}: {e}") from e
    pointer = ctypes.c_void_p
    run_attend.argtypes = [pointer, pointer, pointer, ctypes.c_float, pointer, pointer, pointer]
    run_append.argtypes = [pointer] * 4
    places, unit, room = _Places.of(spec), unit_tokens(spec), partial_floats(spec)
    threads_of = torch.get_num_threads

    def append(keys: Tensor, values: Tensor, state: list[Tensor], length: int) -> None:
        keys, values = keys.contiguous(), values.contiguous()
        batch, heads, tokens, _ = keys.shape
        numbers = (batch * heads, tokens, length, *places.sizes(state), threads_of())
        _call(run_append(keys.data_ptr(), values.data_ptr(), places.pointers(state), _int64(numbers)))

    def attend(q: Tensor, state: list[Tensor], length: int, mask: Tensor | None, scale: float) -> Tensor:
        q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
        batch, query_heads, queries, dims = q.shape
        heads = state[0].shape[1]
        rows, threads = query_heads // heads * queries, threads_of()
        shared = batch * heads * rows * length * dims >= 1 << 17  # else waking others costs as much
        threads = threads if shared else 1
        splits = min(-(-length // unit), -(-_TASKS // (batch * heads))) if shared else 1
        if mask is not None and not (mask.shape[:3] == (batch, 1, queries) and mask.is_contiguous()):
            mask = mask.expand(batch, 1, queries, mask.shape[-1]).contiguous()
        partial = torch.empty(batch * heads * splits * rows * room, dtype=torch.float32)
        stored = (spec.fmt.stored(spec.fmt.key, length), spec.fmt.stored(spec.fmt.value, length))
        columns = 0 if mask is None else mask.shape[-1]
        numbers = (batch, heads, rows, queries, length, *stored, *places.sizes(state),
                   queries * columns, columns, splits, threads)  # fmt: skip
        where = None if mask is None else mask.data_ptr()
        status = run_attend(q.data_ptr(), places.pointers(state), where, scale, partial.data_ptr(), out.data_ptr(),
                            _int64(numbers))  # fmt: skip
        _call(status)
        return out

    return AttendKernel(append, attend)


def _int64(values: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _call(status: int) -> None:
    if status:
        raise KernelError("LB0415", f"the kernel refused the call (status {status})")
