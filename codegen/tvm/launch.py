"""Calling a kernel: what happens to activations before it, and sharing its units out to threads.

TVM has threads of its own, which spin, bind themselves to cores and take the caller's core choice with them. The
generated function therefore runs a range of units on the thread that calls it, and lets go of Python's lock meanwhile;
other threads are Python's. What a unit computes does not depend on who does.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from lowbit.codegen.backend import Launcher
from lowbit.codegen.reference.backend import prepare_activations
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tvm.plan import MOST_TOKENS, STORED, Plan
from lowbit.codegen.tvm.toolchain import Function
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.qtensor import PackedWeight, column_map, padded_group

__all__ = ["make_launcher"]

_FEW = 1 << 19
"""Products below which waking another thread takes longer than what it could do."""

_BITS = {"float32": torch.float32, "float16": torch.float16, "uint16": torch.bfloat16}


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of one process; those of a parent are not there after a fork."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="lowbit-tvm")


def make_launcher(plan: Plan, spec: KernelSpec, function: Function) -> Launcher:
    """A launcher for `spec` from the compiled function of `plan`, whose weights are those of `spec` as one matrix."""
    tables = [torch.tensor(table, dtype=torch.float32) for table in plan.tables]
    prepare, step = _preparation(spec, plan), MOST_TOKENS // plan.schedule.tile_m * plan.schedule.tile_m
    given = [n for n in plan.params if n.startswith("plane") or n in ("scale", "zero", "offset", "tensor_scale")]

    def launch(
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        _check(spec, x, weight, bias, residual, out)
        held = {name: weight.tensors[name] for name in given} | {f"table{i}": t for i, t in enumerate(tables)}
        if bias is not None:
            held["bias"] = bias.float()
        for start in range(0, out.shape[0], step):
            part = {"x": prepare(x[start : start + step], weight), "out": out[start : start + step]}
            if residual is not None:
                part["residual"] = residual[start : start + step]
            _run(plan, function, held | part, part["out"].shape[0])

    return launch


def _check(
    spec: KernelSpec,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Raises KernelError (LB0415) for operands that are not the spec's: the kernel only sees addresses."""
    m, kind = out.shape[0], _BITS[STORED[spec.out_dtype]]
    if weight.k != spec.k or weight.segments != spec.segments or out.shape[1] != spec.n_out or x.shape != (m, spec.k):
        given = f"{weight.segments} x {weight.k}, inputs {tuple(x.shape)} and outputs {tuple(out.shape)}"
        raise KernelError("LB0415", f"a kernel for {spec.segments} x {spec.k} got {given}")
    if ("bias" in spec.epilogue and bias is None) or ("residual" in spec.epilogue and residual is None):
        raise KernelError("LB0415", f"a kernel with {' and '.join(spec.epilogue)} was called without")
    if out.dtype != kind or not out.is_contiguous() or (residual is not None and not residual.is_contiguous()):
        raise KernelError("LB0415", f"a kernel that writes {kind} rows was given {out.dtype}")


def _run(plan: Plan, function: Function, tensors: dict[str, torch.Tensor], m: int) -> None:
    """Units of `m` tokens, on as many threads as torch has."""
    products = plan.units * plan.panels * 16 * plan.columns * m
    threads = max(1, min(torch.get_num_threads(), plan.units, products // _FEW))
    sizes = plan.scratch(m) if plan.buffered else (0, 0)
    scratch = torch.empty(threads, sum(sizes) + 16)

    def work(thread: int) -> None:
        first, last = (plan.units * i // threads for i in (thread, thread + 1))
        own = {"decoded": scratch[thread], "sums": scratch[thread, sizes[0] :]} if plan.buffered else {}
        pointers = [ctypes.c_void_p((tensors | own)[name].data_ptr()) for name in plan.params]
        function(*pointers, m, first, last)

    others = [_pool(os.getpid()).submit(work, i) for i in range(1, threads)]
    try:
        work(0)
    finally:
        for other in others:
            other.result()


def _preparation(spec: KernelSpec, plan: Plan) -> Callable[[torch.Tensor, PackedWeight], torch.Tensor]:
    """x [M, K] -> float32 [tokens in whole tiles, packed columns]: normalised, rotated, ordered and rounded as the spec
    says, then spread to where the packed columns are, with zeros between and behind."""
    plain = not (spec.norm_eps or spec.rotate or spec.activation or spec.fmt.ordered)
    where, terms, group = column_map(spec.fmt, spec.k), spec.terms, padded_group(spec.fmt, spec.k)
    dense = terms == 1 and plan.columns == spec.k

    def ready(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        if plain:
            return x.float()
        if not spec.invariant:
            return prepare_activations(spec, x, weight)
        return torch.cat([prepare_activations(spec, token, weight) for token in x.split(1)])  # torch's sums differ

    def prepare(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        m, done = x.shape[0], ready(x, weight)
        if dense and plan.padded_tokens(m) == m:
            return done.contiguous()
        wide = torch.zeros(plan.padded_tokens(m), plan.columns)
        if dense:
            wide[:m] = done
        for term in range(0 if dense else terms):
            wide[:m, where + term * group] = done
        return wide

    return prepare
