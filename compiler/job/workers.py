"""Quantizing matrices side by side, in processes of their own.

A method always runs on one thread, here and in workers, so that results do not depend on how many workers there are;
loops over columns are too fine for more threads anyway.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lowbit.compiler.errors import LowbitError
from lowbit.compiler.runtime.paths import prepare_search
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import WeightFormat
from lowbit.quantizers.methods import Method, Quantized, quantize_weight

__all__ = ["Result", "Workers", "default_workers"]

Result = Callable[[], tuple[Quantized, float]]
"""Waits for a matrix: what the method found, and the seconds it took."""


def default_workers() -> int:
    """One worker per core this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class Workers:
    """`count` processes that run a method; with one, the calling process does the work itself.

    Processes are spawned on first use: a script that asks for more than one needs the usual `__main__` guard.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, method: Method, weight: Tensor, fmt: WeightFormat, stats: LayerStats | None) -> Result:
        """Start quantizing one matrix; errors are raised when the result is asked for."""
        if self.count <= 1:
            return lambda: _work(method, weight, fmt, stats)
        plain = replace(stats, derived={}) if stats is not None else None
        future = self._start().submit(_remote, _pickled((method, weight, fmt, plain)))
        return lambda: _received(future.result())

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), _initialize)
        return self._pool

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)
            self._pool = None


def _initialize() -> None:
    torch.set_num_threads(1)


def _work(method: Method, weight: Tensor, fmt: WeightFormat, stats: LayerStats | None) -> tuple[Quantized, float]:
    started = perf_counter()
    prepare_search(fmt)
    with _one_thread():
        return quantize_weight(method, weight, fmt, stats), perf_counter() - started


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _remote(task: bytes) -> bytes:
    try:
        with torch.no_grad():
            return _pickled(_work(*_unpickled(task)))
    except LowbitError as e:  # sent as its parts: exceptions with keyword arguments do not survive pickling
        return _pickled((type(e), (e.code, e.message), {"where": e.where, "hint": e.hint}))


def _received(data: bytes) -> tuple[Quantized, float]:
    value = _unpickled(data)
    if len(value) == 3:
        kind, args, more = value
        raise kind(*args, **more)
    result: tuple[Quantized, float] = value
    return result


def _pickled(value: Any) -> bytes:
    """Bytes between our own processes; tensors go by value, not through shared memory that may outlive a worker."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpickled(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
