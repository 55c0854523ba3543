"""The TVM backend: CPU kernels compiled by TVM's own LLVM, where there is no C++ compiler.

The artifact is LLVM's text, which becomes machine code in memory when it is loaded: TVM's shared objects would need a
linker. TVM is imported only when a kernel is compiled or loaded, never by importing this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lowbit.codegen.backend import NO_ROWS, Backend, Launcher, Source
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.sums import one_matrix
from lowbit.codegen.tvm.emit import emit_text
from lowbit.codegen.tvm.launch import make_launcher
from lowbit.codegen.tvm.model import illegal, predict, schedules, space
from lowbit.codegen.tvm.plan import MOST_TOKENS, READS, plan_of
from lowbit.codegen.tvm.toolchain import SUFFIX, compile_text, flags_for, installed, load_function, tvm_version
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target, isa_runs_here
from lowbit.quantizers.formats import Format, WeightFormat

__all__ = ["TvmBackend"]


class TvmBackend(Backend):
    """Scalar formats on CPUs. Products are of floats whatever a spec says they may be, which is never less exact;
    activations that are rounded, rotated or normalised are so by torch, before the kernel."""

    name = "tvm"
    kinds = ("cpu",)
    layout = "panel16"
    vector_layout = "vectors8"
    traits = (("buffered",), ("buffered", "tile_m", "tile_n"))
    invariant = True
    compiles_when_loaded = True
    behind = ("cpp",)

    def reads(self, spec: KernelSpec) -> bool:
        return self.serves(spec.weight_format) is None and spec.layout_ in READS

    def serves(self, fmt: WeightFormat, activation: str = "") -> str | None:
        if not isinstance(fmt, Format):
            return "has kernels of formats with one code per weight only"
        return "codes of a trellis mean nothing without those before them" if fmt.element.window > 1 else None

    def available(self, target: Target) -> str | None:
        if target.kind != "cpu":
            return f"its kernels are for CPUs, not {target.kind}"
        if not isa_runs_here(target.arch):
            return f"this machine does not have {target.arch}"
        return None if installed() else "apache-tvm is not installed"

    def supports(self, spec: KernelSpec, target: Target) -> str | None:
        if why := self.serves(spec.weight_format):
            return why
        if not self.reads(spec):
            return f"reads panels of 16 rows, such as {READS[0]}, not {spec.layout}"
        if spec.uses_rows:
            return NO_ROWS
        flat, steps = one_matrix(spec), spec.epilogue
        if len(set(steps)) != len(steps):
            return f"an epilogue step appears twice in {steps}"
        if "silu_mul" in steps and ("bias" in steps[steps.index("silu_mul") :] or steps[0] == "residual"):
            return f"with silu_mul, bias comes before it and residual after it, not {steps}"
        words = flat.rows * flat.blocks * 32 * flat.fmt.bits // 32
        if max(words, MOST_TOKENS * flat.blocks * 32, MOST_TOKENS * spec.n_out, flat.rows * flat.groups) >= 2**31:
            return "addresses have 32 bits, which the matrix is too large for"
        return None

    def space(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        return space(one_matrix(spec), target.arch, m)

    def illegal(self, spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
        return illegal(one_matrix(spec), schedule)

    def schedules(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        return schedules(one_matrix(spec), target.arch, m)

    def predict(self, spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
        return predict(one_matrix(spec), schedule, target.arch, m)

    def emit(self, spec: KernelSpec, schedule: Schedule, target: Target) -> Source:
        if why := self.supports(spec, target) or self.illegal(spec, schedule, target):
            raise KernelError("LB0450", f"no such TVM kernel: {why}", where=spec.format)
        return Source(emit_text(plan_of(one_matrix(spec), schedule)), SUFFIX, flags_for(target.arch))

    def compile(self, source: Source, out: Path) -> None:
        compile_text(source.text, source.flags, out)

    def toolchain(self) -> str:
        return tvm_version()

    def load(self, artifact: Path, spec: KernelSpec, schedule: Schedule) -> Launcher:
        return make_launcher(plan_of(one_matrix(spec), schedule), spec, load_function(artifact))
