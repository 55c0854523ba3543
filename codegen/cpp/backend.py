"""The C++ backend: generated kernels on x86 vector units, compiled by the system's compiler."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from lowbit.codegen.backend import NO_ROWS, Backend, Launcher, Source
from lowbit.codegen.cpp.assemble import ISA_FLAGS
from lowbit.codegen.cpp.bytes_plan import vector_plan
from lowbit.codegen.cpp.emit import emit_text
from lowbit.codegen.cpp.launch import load_kernel
from lowbit.codegen.cpp.machines import WHOLE_ARCHES
from lowbit.codegen.cpp.plan import PANELS, Plan, level_magnitudes
from lowbit.codegen.cpp.predictions import predict
from lowbit.codegen.cpp.rounding import rounding_problem
from lowbit.codegen.cpp.schedules import schedules
from lowbit.codegen.cpp.space import illegal, space
from lowbit.codegen.cpp.toolchain import FLAGS, compile_shared, compiler_version, find_compiler
from lowbit.codegen.cpp.vector_emit import emit_vector_text
from lowbit.codegen.cpp.vector_schedules import vector_predict, vector_schedules
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS, plane_bits
from lowbit.compiler.ir.target import Target, isa_compiles_here, isa_runs_here
from lowbit.quantizers.formats import Format, WeightFormat, exact_integers

__all__ = ["CppBackend"]


class CppBackend(Backend):
    """Serves every CPU target. Kernels come in two shapes, for few and for many tokens: `direct` and `buffered` for
    formats with one code per weight, `vector_direct` and `vector_buffered` for vector formats."""

    name = "cpp"
    kinds = ("cpu",)
    layout = "panel16"
    vector_layout = "vectors8"
    input_layout = "rows64"
    invariant = True
    traits = (
        ("buffered", "words", "bf16", "lut", "permute", "sums"),
        ("buffered", "words", "bf16", "lut", "permute", "sums", "tile_m", "tile_n"),
        ("buffered", "words", "bf16", "lut", "permute", "sums", "tile_m", "tile_n", "prefetch", "tokens", "vectors"),
    )

    def layout_of(self, fmt: WeightFormat, target: Target | None = None) -> str:
        if isinstance(fmt, Format) and fmt.element.window > 1:
            return "runs16"
        split = isinstance(fmt, Format) and len(plane_bits(fmt.bits)) > 1
        if not (split and target and target.arch in WHOLE_ARCHES):
            return super().layout_of(fmt)
        levels = exact_integers(fmt)
        return "signs16" if levels and level_magnitudes(levels) else "whole16"

    def reads(self, spec: KernelSpec) -> bool:
        if not spec.vector and spec.fmt.element.window == 1 and spec.layout_ in PANELS.values():
            return True
        return super().reads(spec)

    def available(self, target: Target) -> str | None:
        if target.kind != "cpu":
            return f"C++ kernels run on CPUs, not {target.kind}"
        if not isa_runs_here(target.arch):
            return f"this machine does not have {target.arch}"
        return self.builds(target)

    def builds(self, target: Target) -> str | None:
        if not isa_compiles_here(target.arch):
            return f"this machine's compiler makes no code for {target.arch}"
        return None if find_compiler() else "no C++ compiler was found; install g++ or set CXX"

    def supports(self, spec: KernelSpec, target: Target) -> str | None:
        if not self.reads(spec):
            return f"the C++ kernels read layout {LAYOUTS[self.layout_of(spec.weight_format, target)]}"
        if spec.uses_rows:
            return NO_ROWS
        if why := _vector_problem(spec) if spec.vector else rounding_problem(spec):
            return why
        steps = spec.epilogue
        if len(set(steps)) != len(steps):
            return f"an epilogue step appears twice in {steps}"
        if "silu_mul" in steps:
            at = steps.index("silu_mul")
            if "bias" in steps[at:] or "residual" in steps[:at]:
                return f"with silu_mul, bias comes before it and residual after it, not {steps}"
        return None

    def space(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        return space(spec, target.arch, m)

    def illegal(self, spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
        return illegal(spec, schedule, target.arch)

    def schedules(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        """The few that predictions are trusted to tell apart (see `codegen.cpp.space`)."""
        found = list((vector_schedules if spec.vector else schedules)(spec, target.arch, m))
        return sorted(found, key=lambda s: self.predict(spec, s, target, m))

    def predict(self, spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
        if spec.vector:
            return vector_predict(vector_plan(spec, schedule), target.arch, m)
        return predict(Plan(spec, schedule), target.arch, m)

    def emit(self, spec: KernelSpec, schedule: Schedule, target: Target) -> Source:
        if spec.vector:
            text = emit_vector_text(vector_plan(spec, schedule), target.arch)
        else:
            text = emit_text(Plan(spec, schedule), target.arch)
        return Source(text, ".so", (*FLAGS, *ISA_FLAGS[target.arch]))

    def compile(self, source: Source, out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
            text = Path(folder) / "kernel.cpp"
            text.write_text(source.text)
            compile_shared(text, source.flags, out)

    def toolchain(self) -> str:
        return compiler_version()

    def load(self, artifact: Path, spec: KernelSpec, schedule: Schedule) -> Launcher:
        return load_kernel(artifact, vector_plan(spec, schedule) if spec.vector else Plan(spec, schedule))


def _vector_problem(spec: KernelSpec) -> str | None:
    return "kernels of vector formats do not rotate activations" if spec.rotate else None
