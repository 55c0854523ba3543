"""The Triton backend: kernels for NVIDIA GPUs from sm_80 on. The artifact is the generated module itself.

Triton is imported only to load a kernel or to name its version, never by importing this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from lowbit.codegen.backend import NO_ROWS, Backend, Launcher, Source
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.sums import one_matrix, over_repeated, unserved_sums
from lowbit.codegen.triton.emitter import emit_source
from lowbit.codegen.triton.model import predict
from lowbit.codegen.triton.space import candidates, illegal, space
from lowbit.codegen.triton.tiles import Tiles
from lowbit.codegen.triton.vector_tiles import VectorTiles
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS, plane_bits
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import FloatElement

__all__ = ["TritonBackend"]

_OLDEST = 80


class TritonBackend(Backend):
    """Generated Triton kernels; compiled by Triton for the GPU that is there when a kernel is loaded."""

    name = "triton"
    kinds = ("cuda",)
    layout = "words"
    vector_layout = "vectors"
    invariant = True
    traits = (("tile_m", "tile_n", "gemv", "swap"), ("tile_m", "tile_n", "gemv", "swap", "split_k", "warps"))
    compiles_when_loaded = True

    def available(self, target: Target) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed"
        if int(target.arch.removeprefix("sm_").rstrip("a") or 0) < _OLDEST:
            return f"{target} is older than sm_{_OLDEST}"
        if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
            return "torch finds no CUDA device"
        return None

    def supports(self, spec: KernelSpec, target: Target) -> str | None:
        if not self.reads(spec):
            return f"reads the layout {LAYOUTS[self.layout_of(spec.weight_format)]}, not {spec.layout}"
        if spec.uses_rows:
            return NO_ROWS
        if why := unserved_sums(spec):
            return why
        if spec.rotate or spec.norm_eps:
            return f"does not {'rotate' if spec.rotate else 'normalise'} activations"
        if spec.vector:
            return _vector_limits(spec)
        if spec.rounding_problem:
            return spec.rounding_problem
        if spec.rounding and isinstance(spec.rounding.element, FloatElement) and not spec.rounding.element.mantissa:
            return f"rounds to floats with mantissa bits, not to {spec.rounding.element.name}"
        if spec.rounding and (spec.rounding.lead or (spec.rounding.wide and spec.rounding.wide_bits > 8)):
            return f"keeps no columns at {spec.rounding.wide_bits} bits or under a scale of their own"
        if spec.compute == "int16":
            return "two-digit integer products are for CPUs; use compute='float' or 'int8'"
        if spec.compute == "int8" and not spec.fmt.element.integer:
            return f"multiplies the codes of plain integers, not of {spec.fmt.element.name}; use compute='float'"
        if spec.compute == "int8" and spec.parts > 1:
            return f"integer products need groups of whole blocks, not of {spec.group}; use compute='float'"
        widest = max(plane_bits(spec.fmt.bits))
        if spec.rows * spec.blocks * widest >= 2**31:
            return "one plane has more than 2**31 words"
        return None

    def space(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        return space(one_matrix(spec), target, m)

    def illegal(self, spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
        return illegal(one_matrix(spec), schedule, target)

    def schedules(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        return candidates(one_matrix(spec), target, m)

    def predict(self, spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
        return predict(one_matrix(spec), schedule, target, m)

    def emit(self, spec: KernelSpec, schedule: Schedule, target: Target) -> Source:
        if why := self.supports(spec, target) or self.illegal(spec, schedule, target):
            raise KernelError("LB0440", f"no such Triton kernel: {why}", where=spec.format)
        return Source(emit_source(one_matrix(spec), schedule), ".py", (str(target),))

    def compile(self, source: Source, out: Path) -> None:
        """Check that the text is Python and store it: Triton compiles it for the device when it is loaded."""
        try:
            compile(source.text, str(out), "exec")
        except SyntaxError as e:
            raise KernelError("LB0410", f"the generated module is not Python: {e}", where=str(out)) from e
        out.write_text(source.text)

    def toolchain(self) -> str:
        try:
            return f"triton {version('triton')}"
        except PackageNotFoundError as e:
            raise KernelError("LB0443", "triton is not installed", hint="install triton") from e

    def load(self, artifact: Path, spec: KernelSpec, schedule: Schedule) -> Launcher:
        from lowbit.codegen.triton.launch import load_module, make_launcher

        # Tiles are built first: a schedule that does not belong to the spec fails here, not inside a launch.
        flat = one_matrix(spec)
        steps = (VectorTiles(spec, schedule) if spec.vector else Tiles(flat, schedule)).steps
        if steps < schedule.split_k:
            raise KernelError("LB0440", f"{schedule.split_k} splits of {steps} steps")
        return over_repeated(spec, make_launcher(load_module(artifact), flat, schedule))


def _vector_limits(spec: KernelSpec) -> str | None:
    """Why a vector format's operands cannot be addressed with 32 bits, or None."""
    fmt = spec.vector
    assert fmt is not None
    if spec.compute != "float" or spec.activation:
        return "activations of vector formats are not rounded"
    outliers, size = fmt.partition(spec.k)
    indices = max(spec.rows * fmt.positions(size) * fmt.groups, sum(spec.segments) * outliers)
    if indices >= 2**31:
        return "one plane has more than 2**31 indices"
    books = len(spec.segments) * fmt.groups * fmt.dim * max(fmt.centroids, fmt.residual)
    return "the codebooks have more than 2**31 elements" if books >= 2**31 else None
