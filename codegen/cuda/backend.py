"""The CUDA backend: kernels for NVIDIA GPUs from sm_80 on, written for tensor cores. The artifact is a cubin."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from lowbit.codegen.backend import Backend, Launcher, Source
from lowbit.codegen.cuda.arguments import KNOWN
from lowbit.codegen.cuda.emit import emit_text
from lowbit.codegen.cuda.launch import core_spec, make_launcher
from lowbit.codegen.cuda.model import predict
from lowbit.codegen.cuda.plan import Plan
from lowbit.codegen.cuda.recipe import find_recipe
from lowbit.codegen.cuda.space import candidates, illegal
from lowbit.codegen.cuda.toolchain import FLAGS, arch_of, compile_cubin, find_nvcc, nvcc_version
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import Format, WeightFormat

__all__ = ["CudaBackend"]

_OLDEST = 80
_LIMBS = 3  # of float32 activations: tokens a kernel sees for each


class CudaBackend(Backend):
    """Generated CUDA C++, compiled by nvcc: weights are the left operand of the matrix instructions, tokens the right
    one, so that few tokens waste little."""

    name = "cuda"
    kinds = ("cuda",)
    layout = "fragments"
    vector_layout = "vectors"

    def serves(self, fmt: WeightFormat, activation: str = "") -> str | None:
        if activation:
            return f"activations are not rounded to {activation} yet"
        if not isinstance(fmt, Format):
            return f"no kernels for vector formats such as {fmt} yet"
        return _unserved(fmt)

    def available(self, target: Target) -> str | None:
        if int(target.arch.removeprefix("sm_").rstrip("a") or 0) < _OLDEST:
            return f"{target} is older than sm_{_OLDEST}"
        if find_nvcc() is None:
            return "nvcc was not found; install the CUDA toolkit or set LOWBIT_NVCC"
        return None if torch.cuda.is_available() else "torch finds no CUDA device"

    def supports(self, spec: KernelSpec, target: Target) -> str | None:
        if spec.layout_ != (layout := LAYOUTS[self.layout]):
            return f"reads the layout {layout}, not {spec.layout}"
        if why := self.serves(spec.weight_format, spec.activation):
            return why
        if unknown := set(spec.operands) - KNOWN:
            return f"knows nothing of {', '.join(sorted(unknown))}"
        if spec.rotate:
            return "does not rotate activations"
        if spec.compute != "float":
            return f"activations stay floats; {spec.compute} products come later"
        steps = spec.epilogue
        if steps != tuple(e for e in ("bias", "silu_mul", "residual") if e in steps):
            return f"the epilogue is bias, silu_mul, residual in this order, not {steps}"
        return None

    def schedules(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        return candidates(core_spec(spec), target, _tokens(spec, m))

    def predict(self, spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
        return predict(Plan(core_spec(spec), schedule), target, _tokens(spec, m))

    def emit(self, spec: KernelSpec, schedule: Schedule, target: Target) -> Source:
        plan = Plan(core_spec(spec), schedule)
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
        return nvcc_version()

    def load(self, artifact: Path, spec: KernelSpec, schedule: Schedule) -> Launcher:
        return make_launcher(artifact, spec, schedule)


def _tokens(spec: KernelSpec, m: int) -> int:
    return m * _LIMBS if spec.x_dtype == "f32" else m


@cache
def _unserved(fmt: Format) -> str | None:
    g = fmt.granularity
    if g.kind == "g" and g.group < 16:
        return f"groups of {g.group} columns are smaller than a step of 16"
    if fmt.ordered:
        return "columns are read in the matrix's own order"
    for dtype in ("f16", "bf16"):
        if find_recipe(fmt.element, dtype) is None:
            return f"{fmt.element.name} has no exact {dtype} operands"
    return None
