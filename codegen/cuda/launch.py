"""Launchers: workspace, grid, parameters. Nothing waits for the GPU, and captures into CUDA graphs work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lowbit.codegen.backend import Launcher
from lowbit.codegen.counters import counters
from lowbit.codegen.cuda.any_plan import make_plan
from lowbit.codegen.cuda.arguments import Args, fill, order_of
from lowbit.codegen.cuda.driver import Kernel, tensor_map
from lowbit.codegen.cuda.plan import PREPARE_THREADS
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.sums import one_matrix, over_repeated
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["core_spec", "finish_in_torch", "make_launcher", "split", "split_float"]

LIMBS = 3
"""bfloat16 numbers whose sum is a float32."""
_PREPARE_SHARED = 1024  # bytes: a word for each of its warps


def core_spec(spec: KernelSpec) -> KernelSpec:
    """The spec whose kernel runs: float32 activations are three bfloat16 ones, and their epilogue is done by torch.
    Activations that are rounded are what they are; those of sums are repeated (`one_matrix`)."""
    spec = one_matrix(spec)
    return spec if not split(spec) else replace(spec, x_dtype="bf16", out_dtype="f32", epilogue=())


def split(spec: KernelSpec) -> bool:
    """Whether activations are float32 that stays float32."""
    return spec.x_dtype == "f32" and not spec.activation


def split_float(x: torch.Tensor) -> torch.Tensor:
    """[M, K] float32 -> [3 M, K] bfloat16, three rows of blocks that add up to x."""
    parts, rest = [], x
    for _ in range(LIMBS):
        part = rest.to(torch.bfloat16)
        rest = rest - part.float()
        parts.append(part)
    return torch.cat(parts)


def finish_in_torch(
    spec: KernelSpec, y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, out: torch.Tensor
) -> None:
    """The epilogue on [3 M, rows] float32 products of `split_float`, into `out`."""
    y = y.view(LIMBS, -1, y.shape[1]).flip(0).sum(0)
    for step in spec.epilogue:
        if step == "silu_mul":
            gate, up = y.chunk(2, dim=1)
            y = torch.nn.functional.silu(gate) * up
        elif (side := bias if step == "bias" else residual) is not None:
            y = y + side.float()
    out.copy_(y)


def make_launcher(artifact: Path, spec: KernelSpec, schedule: Schedule) -> Launcher:
    """A launcher for a cubin made from the plan of `core_spec(spec)`."""
    given, spec = spec, one_matrix(spec)
    plan = make_plan(core_spec(spec), schedule)
    early = bool(schedule.get("early", 0))
    kernel = Kernel(artifact, "lb_kernel", plan.threads, plan.shared_bytes, early)
    before = Kernel(artifact, "lb_prepare", PREPARE_THREADS, _PREPARE_SHARED) if plan.prepared else None
    if torch.cuda.is_available():
        counters.reserve(torch.device("cuda", torch.cuda.current_device()))
        for k in (kernel, before):  # not inside the first call, which may be captured
            if k is not None:
                k.load(torch.cuda.current_device())

    def run(
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        if weight.k != spec.k or weight.segments != spec.segments or x.shape[1] != spec.x_width:
            raise KernelError("LB0462", f"a kernel for {spec.segments} x {spec.k} got {weight.segments} x {weight.k}")
        x = order_of(plan, x, weight)
        if x.data_ptr() % 16:  # kernels read 16 bytes at a time
            x = x.clone()
        args, tokens = fill(Args(), x, weight, bias, residual, out), x.shape[0]
        held = [torch.empty(n, dtype=torch.uint8, device=x.device) for n in plan.x_bytes(tokens)] if before else []
        if before is not None:
            args.ready, args.x_scale = (t.data_ptr() for t in held)
            before.launch((tokens, 1), args, x.device)
        grid = plan.grid(_multiprocessors(x.device), tokens)
        part = torch.empty(plan.part_floats(grid, tokens), dtype=torch.float32, device=x.device)
        args.part = part.data_ptr()
        args.count = counters.take(plan.counts(grid, tokens), x.device).data_ptr()
        if plan.warpgroup:
            width = plan.operand_bits // 8
            line = spec.x_width if plan.reads_rows else plan.x_columns * width
            args.map = tensor_map(args.ready, tokens, plan.x_columns, width, plan.schedule.tile_m, line)
        kernel.launch(grid, args, x.device)

    def run_float(
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        limbs = split_float(x)
        y = torch.empty((limbs.shape[0], plan.spec.n_out), dtype=torch.float32, device=x.device)
        run(limbs, weight, None, None, y)
        finish_in_torch(spec, y, bias, residual, out)

    return over_repeated(given, run_float if split(spec) else run)


_counts: dict[int, int] = {}


def _multiprocessors(device: torch.device) -> int:
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _counts:
        _counts[index] = torch.cuda.get_device_properties(index).multi_processor_count
    return _counts[index]
