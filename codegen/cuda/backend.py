"""The CUDA backend: kernels for NVIDIA GPUs from sm_80 on, written for tensor cores. The artifact is a cubin."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from lowbit.codegen.backend import Backend, Launcher, Source
from lowbit.codegen.cuda.any_plan import make_plan
from lowbit.codegen.cuda.arguments import KNOWN, VECTOR_OPERANDS
from lowbit.codegen.cuda.emit import emit_text
from lowbit.codegen.cuda.fragments import TILE
from lowbit.codegen.cuda.launch import core_spec, make_launcher, split
from lowbit.codegen.cuda.plan import Plan
from lowbit.codegen.cuda.recipe import find_recipe
from lowbit.codegen.cuda.schedules import candidates, illegal, predict, space
from lowbit.codegen.cuda.toolchain import FLAGS, arch_of, compile_cubin, compiler_version, no_compiler
from lowbit.codegen.cuda.vector_space import unserved_vectors
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.sums import unserved_sums
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import (
    ActivationFormat,
    FloatElement,
    Format,
    VectorFormat,
    WeightFormat,
    parse_activation,
)

__all__ = ["CudaBackend"]

_OLDEST = 80
_KINDS = ("wgmma", "fp8", "half", "far")  # schedule fields that make another kernel
_LIMBS = 3  # of float32 activations: tokens a kernel sees for each


class CudaBackend(Backend):
    """Generated CUDA C++, compiled by nvcc: weights are the left operand of the matrix instructions, tokens the right
    one, so that few tokens waste little."""

    name = "cuda"
    kinds = ("cuda",)
    layout = "fragments"
    vector_layout = "vectors8"
    invariant = True
    traits = (
        (*_KINDS, "tile_m", "tile_n", "row_warps", "exact"),
        (*_KINDS, "tile_m", "tile_n", "row_warps", "exact", "resident", "warps", "tile_k", "stages"),
    )

    def serves(self, fmt: WeightFormat, activation: str = "") -> str | None:
        if isinstance(fmt, VectorFormat):
            return "activations of vector formats are not rounded" if activation else unserved_vectors(fmt)
        assert isinstance(fmt, Format)
        return _unserved(fmt) or (_unrounded(activation) if activation else None)

    def available(self, target: Target) -> str | None:
        return self.builds(target) or (None if torch.cuda.is_available() else "torch finds no CUDA device")

    def builds(self, target: Target) -> str | None:
        if int(target.arch.removeprefix("sm_").rstrip("a") or 0) < _OLDEST:
            return f"{target} is older than sm_{_OLDEST}"
        return no_compiler()

    def supports(self, spec: KernelSpec, target: Target) -> str | None:
        if not self.reads(spec):
            return f"reads the layout {LAYOUTS[self.layout_of(spec.weight_format)]}, not {spec.layout}"
        if why := self.serves(spec.weight_format, spec.activation):
            return why
        if unknown := set(spec.operands) - KNOWN - set(VECTOR_OPERANDS):
            return f"knows nothing of {', '.join(sorted(unknown))}"
        if spec.rotate:
            return "does not rotate activations"
        if why := unserved_sums(spec):
            return why
        if spec.out_rounding and (why := _unwritten(spec, spec.out_rounding)):
            return why
        if spec.vector and spec.reads_rows:
            return "activations of vector formats are not rounded"
        if spec.vector and spec.vector.norm == "col" and spec.x_dtype == "f32":
            return "activations times column norms are rounded to float16, which float32 ones should not be"
        if not spec.vector and (why := _unmultiplied(spec)):
            return why
        steps = spec.epilogue
        if steps != tuple(e for e in ("bias", "silu_mul", "residual") if e in steps):
            return f"the epilogue is bias, silu_mul, residual in this order, not {steps}"
        return None

    def space(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        return space(core_spec(spec), target, _tokens(spec, m))

    def illegal(self, spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
        return illegal(make_plan(core_spec(spec), schedule), target)

    def schedules(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        return candidates(core_spec(spec), target, _tokens(spec, m))

    def predict(self, spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
        return predict(make_plan(core_spec(spec), schedule), target, _tokens(spec, m))

    def emit(self, spec: KernelSpec, schedule: Schedule, target: Target) -> Source:
        plan = make_plan(core_spec(spec), schedule)
        if why := self.supports(spec, target) or illegal(plan, target):
            raise KernelError("LB0460", f"no such CUDA kernel: {why}", where=spec.format)
        arch = arch_of(target)
        return Source(emit_text(plan), ".cubin", (*FLAGS, "-gencode", f"arch=compute_{arch},code=sm_{arch}"))

    def compile(self, source: Source, out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
            text = Path(folder) / "kernel.cu"
            text.write_text(source.text)
            compile_cubin(text, source.flags, out)

    def toolchain(self) -> str:
        return compiler_version()

    def load(self, artifact: Path, spec: KernelSpec, schedule: Schedule) -> Launcher:
        return make_launcher(artifact, spec, schedule)


def _tokens(spec: KernelSpec, m: int) -> int:
    return m * _LIMBS if split(spec) else m


def _unwritten(spec: KernelSpec, rounding: ActivationFormat) -> str | None:
    """Why a kernel cannot round its own output to a format, or None."""
    if spec.vector:
        return "kernels of vector formats do not round their outputs"
    if split(spec):
        return "epilogues of float32 activations are torch's, which rounds no outputs"
    tile = TILE if "silu_mul" in spec.epilogue else 2 * TILE
    if not rounding.static and tile % rounding.group:
        return f"a thread block has {tile} outputs of a token side by side, no whole groups of {rounding.group}"
    return _unrounded(spec.out_activation)


def _unmultiplied(spec: KernelSpec) -> str | None:
    """Why products of a scalar format cannot be formed as `spec` asks for, or None."""
    if spec.compute == "int16":
        return "two-digit integer products are for CPUs; use compute='float' or 'int8'"
    if spec.compute == "int8" and (spec.rounding is None or not spec.fmt.element.integer or spec.parts > 1):
        return "integer products are of the codes of plain integers and activations rounded by their format"
    return _ungrouped(spec)


def _ungrouped(spec: KernelSpec) -> str | None:
    """Why groups of activations cannot lie beside those of weights, or None."""
    try:
        _ = Plan(core_spec(spec), Schedule(1, 64, 64)).flush
    except KernelError as e:
        return e.message
    return spec.rounding_problem


@cache
def _unrounded(activation: str) -> str | None:
    """Why activations cannot be rounded to a format, or None."""
    rounding = parse_activation(activation)
    element, levels = rounding.element, rounding.element.levels()
    if rounding.group % 16:
        return f"groups of {rounding.group} activations are no multiple of 16"
    if isinstance(element, FloatElement) and not element.mantissa:
        return f"activations in {element.name}, without mantissa bits, are not rounded to nearest"
    finite = levels[levels.isfinite()]
    exact = all(bool((finite.to(t).float() == finite).all()) for t in (torch.float16, torch.bfloat16))
    return None if exact else f"float16 does not hold every number of {element.name}"


@cache
def _unserved(fmt: Format) -> str | None:
    g = fmt.granularity
    if g.kind == "g" and g.group < 16:
        return f"groups of {g.group} columns are smaller than a step of 16"
    if fmt.element.window > 1:
        return f"values of {fmt.element.name} depend on codes of columns before, which other lanes hold"
    for dtype in ("f16", "bf16"):
        if find_recipe(fmt.element, dtype) is None:
            return f"{fmt.element.name} has no exact {dtype} operands"
    return None
