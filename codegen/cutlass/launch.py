"""Launchers: parameters and grid, through the CUDA backend's driver. Nothing waits for the GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from lowbit.codegen.backend import Launcher
from lowbit.codegen.cuda.driver import Kernel
from lowbit.codegen.cutlass.plan import Plan
from lowbit.codegen.cutlass.toolchain import read_artifact
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.sums import over_repeated
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["OFFSETS", "PARAMETERS", "Args", "fill", "make_launcher", "packed_columns"]

PARAMETERS = ("x", "plane0", "plane1", "plane2", "scale", "zero", "offset", "tensor_scale", "bias", "residual", "out")
"""The kernel's pointers, in its order; the number of tokens follows, 32 bits."""


class Args(ctypes.Structure):
    """One launch's parameters; each is a parameter of the kernel."""

    _fields_ = [*[(name, ctypes.c_void_p) for name in PARAMETERS], ("tokens", ctypes.c_int)]


OFFSETS = tuple(getattr(Args, name).offset for name in (*PARAMETERS, "tokens"))
"""Where each parameter begins in `Args`."""


def fill(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> Args:
    """Parameters of a launch. The tensors must outlive it."""
    given = {**weight.tensors, "x": x, "bias": bias, "residual": residual, "out": out}
    held = {name: tensor for name in PARAMETERS if (tensor := given.get(name)) is not None}
    return Args(tokens=x.shape[0], **{name: tensor.data_ptr() for name, tensor in held.items()})


def packed_columns(plan: Plan) -> Callable[[torch.Tensor, PackedWeight], torch.Tensor]:
    """x as a kernel reads it: columns in the weight's order, groups padded as packed ones are. A pass of its own where
    anything has to move."""
    spec, size = plan.spec, plan.padded_group
    columns = torch.arange(spec.k)
    places = columns if spec.groups == 1 else columns // spec.group * size + columns % spec.group
    kept: dict[torch.device, torch.Tensor] = {}
    if torch.cuda.is_available() and not plan.dense:  # not inside the first call, which may be captured
        here = torch.device("cuda", torch.cuda.current_device())
        kept[here] = places.to(here)

    def ready(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        order = weight.tensors.get("columns")
        x = x if order is None else x.index_select(1, order)
        if not plan.dense:
            at = kept.setdefault(x.device, places.to(x.device))
            x = x.new_zeros(x.shape[0], plan.x_columns).index_copy_(1, at, x)
        return x if x.data_ptr() % 16 == 0 else x.clone()

    return ready


def make_launcher(artifact: Path, given: KernelSpec, plan: Plan) -> Launcher:
    """A launcher for a compiled kernel of `plan`, whose spec is that of the one matrix that `given`'s is."""
    made, spec, ready = read_artifact(artifact), plan.spec, packed_columns(plan)
    kernel = Kernel(made.cubin, made.kernel, made.threads, made.shared)
    if torch.cuda.is_available():
        kernel.load(torch.cuda.current_device())

    def run(
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        if weight.k != spec.k or weight.segments != spec.segments or x.shape[1] != spec.k:
            raise KernelError("LB0462", f"a kernel for {spec.segments} x {spec.k} got {weight.segments} x {weight.k}")
        x = ready(x, weight)
        grid = (plan.tile_sets * plan.token_blocks(x.shape[0]), 1)
        kernel.launch(grid, fill(x, weight, bias, residual, out), x.device, OFFSETS)

    return over_repeated(given, run)
