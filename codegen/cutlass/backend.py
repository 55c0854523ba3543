"""The CUTLASS backend: kernels in CuTe DSL for NVIDIA GPUs from sm_80 on, for many tokens.

The artifact is a cubin with a line that names its kernel: machines that run it need no compiler.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from lowbit.codegen.backend import NO_ROWS, Backend, Launcher, Source
from lowbit.codegen.cuda.arguments import KNOWN
from lowbit.codegen.cutlass.emit import emit_text
from lowbit.codegen.cutlass.launch import make_launcher
from lowbit.codegen.cutlass.model import predict
from lowbit.codegen.cutlass.operands import unscaled
from lowbit.codegen.cutlass.plan import Plan
from lowbit.codegen.cutlass.space import illegal, space
from lowbit.codegen.cutlass.toolchain import SUFFIX, compile_module, dsl_version, flags_for, installed
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.sums import one_matrix, unserved_sums
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import Format, WeightFormat

__all__ = ["CutlassBackend"]

_OLDEST, _NEWEST = 80, 90  # what the kernels' instructions were checked for
_MOST = 2**31


class CutlassBackend(Backend):
    """Scalar formats with activations of 16 bits. Scales of groups meet weights, rounded to 16 bits once, so that sums
    need no second set of registers: tiles of many tokens are what this is for."""

    name = "cutlass"
    kinds = ("cuda",)
    layout = "fragments"
    vector_layout = "vectors8"
    invariant = True
    traits = (("wgmma", "tile_m", "tile_n"), ("wgmma", "tile_m", "tile_n", "stages"))
    beside = ("cuda",)

    def serves(self, fmt: WeightFormat, activation: str = "") -> str | None:
        if not isinstance(fmt, Format):
            return "has kernels of formats with one code per weight only"
        if activation:
            return "activations are not rounded"
        if fmt.element.window > 1:
            return f"values of {fmt.element.name} depend on codes of columns before, which other lanes hold"
        g = fmt.granularity
        if g.kind == "g" and g.group < 16:
            return f"groups of {g.group} columns are smaller than a step of 16"
        served = unscaled(fmt.element, "f16") or unscaled(fmt.element, "bf16")
        return None if served else f"{fmt.element.name} has no exact operands of 16 bits"

    def available(self, target: Target) -> str | None:
        return self.builds(target) or (None if torch.cuda.is_available() else "torch finds no CUDA device")

    def builds(self, target: Target) -> str | None:
        if not _OLDEST <= int(target.arch.removeprefix("sm_").rstrip("a") or 0) <= _NEWEST:
            return f"{target} is not among sm_{_OLDEST} to sm_{_NEWEST}"
        return None if installed() else "nvidia-cutlass-dsl is not installed"

    def supports(self, spec: KernelSpec, target: Target) -> str | None:
        if why := self.serves(spec.weight_format, spec.activation):
            return why
        if not self.reads(spec):
            return f"reads the layout {LAYOUTS[self.layout]}, not {spec.layout}"
        if spec.uses_rows:
            return NO_ROWS
        if unknown := set(spec.operands) - KNOWN:
            return f"knows nothing of {', '.join(sorted(unknown))}"
        if spec.rotate:
            return "does not rotate activations"
        if why := unserved_sums(spec):
            return why
        steps = spec.epilogue
        if steps != tuple(e for e in ("bias", "silu_mul", "residual") if e in steps):
            return f"the epilogue is bias, silu_mul, residual in this order, not {steps}"
        return _unmultiplied(one_matrix(spec))

    def space(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        return space(one_matrix(spec), target, m)

    def illegal(self, spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
        return illegal(Plan(one_matrix(spec), schedule), target)

    def predict(self, spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
        return predict(Plan(one_matrix(spec), schedule), target, m)

    def emit(self, spec: KernelSpec, schedule: Schedule, target: Target) -> Source:
        if why := self.supports(spec, target) or self.illegal(spec, schedule, target):
            raise KernelError("LB0490", f"no such CUTLASS kernel: {why}", where=spec.format)
        return Source(emit_text(Plan(one_matrix(spec), schedule)), SUFFIX, flags_for(target))

    def compile(self, source: Source, out: Path) -> None:
        compile_module(source.text, source.flags, out)

    def toolchain(self) -> str:
        return dsl_version()

    def load(self, artifact: Path, spec: KernelSpec, schedule: Schedule) -> Launcher:
        return make_launcher(artifact, spec, Plan(one_matrix(spec), schedule))


def _unmultiplied(spec: KernelSpec) -> str | None:
    """Why weights and activations cannot be multiplied as `spec` asks for, or None."""
    if spec.compute != "float":
        return "products are of floats; use compute='float'"
    plan = Plan(spec, Schedule(64, 128, 64, 4, 3))
    try:
        _ = plan.dtype, plan.recipe, plan.span
    except KernelError as e:
        return e.message
    if plan.dtype == "f16" and plan.scaled and spec.scale_dtype in ("f32", "e8m0"):
        return f"float16 weights cannot have every scale in {spec.scale_dtype}"
    widest = max(plan.planes)
    if max(spec.rows * plan.k_blocks * 64 * widest // 32, spec.rows * spec.groups, spec.rows) >= _MOST:
        return "addresses have 32 bits, which the matrix is too large for"
    return None
