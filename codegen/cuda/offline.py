"""Compiling kernels for a GPU that is not there, and reading what the compiler made of them.

nvcc and cuobjdump need no driver. What decides speed can be checked anywhere: registers, spills, matrix instructions,
the width of loads, and how many instructions the main loop takes for a weight.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lowbit.codegen.cuda.any_plan import AnyPlan, make_plan
from lowbit.codegen.cuda.backend import CudaBackend
from lowbit.codegen.cuda.launch import core_spec
from lowbit.codegen.cuda.toolchain import compile_cubin, find_tool, nvcc_version, run_tool
from lowbit.codegen.cuda.vector_plan import VectorPlan
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target

__all__ = ["CudaReport", "inspect", "loop_of"]

_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", re.M)
_MATRIX = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA")
_FLOATS = ("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "FSEL", "FMNMX", "FSETP")
_INTEGERS = ("LOP3", "SHF", "PRMT", "IMAD", "IADD", "LEA", "ISETP", "SEL", "IMNMX", "I2F", "F2F", "I2I", "VIADD",
             "VIMNMX", "MOV", "PLOP3", "BFE", "SGXT")  # fmt: skip


@dataclass(frozen=True)
class CudaReport:
    """What one kernel compiled to.

    registers: per thread. spills, stack: bytes of local memory, those of a kernel that runs before
    included. loop: instructions of the main loop by name. weights: how many a lane decodes in it.
    """

    target: str
    registers: int
    spills: int
    stack: int
    shared_bytes: int
    cubin_bytes: int
    sass: dict[str, int] = field(repr=False)
    loop: dict[str, int] = field(repr=False)
    weights: int

    def count(self, *prefixes: str) -> int:
        """Instructions of the whole kernel whose names start with one of `prefixes`."""
        return _count(self.sass, prefixes)

    @property
    def matrix(self) -> dict[str, int]:
        """Matrix instructions by kind."""
        return {kind: n for kind in _MATRIX if (n := self.count(kind + "."))}

    @property
    def decode(self) -> float:
        """Integer and float instructions of the main loop for each weight of a lane, everything included."""
        return _count(self.loop, _FLOATS + _INTEGERS) / self.weights

    @property
    def issued(self) -> float:
        """All instructions of the main loop for each weight of a lane."""
        return sum(self.loop.values()) / self.weights

    def summary(self) -> dict[str, object]:
        """What the committed baseline holds."""
        return {
            "registers": self.registers, "spills": self.spills, "stack": self.stack,
            "shared_bytes": self.shared_bytes, "matrix_instructions": self.matrix,
            "wide_copies": self.count("LDGSTS.E.BYPASS", "UBLKCP"), "wide_shared_loads": self.count("LDS.128"),
            "arithmetic_per_weight": round(self.decode, 3), "instructions_per_weight": round(self.issued, 3),
        }  # fmt: skip


def _count(found: dict[str, int], prefixes: tuple[str, ...]) -> int:
    return sum(n for name, n in found.items() if name.startswith(prefixes))


def inspect(
    jobs: Sequence[tuple[KernelSpec, Schedule, Target]], folder: Path | None = None, workers: int | None = None
) -> list[CudaReport]:
    """Compile and read kernels; `folder` keeps the cubins and reports, and what is there is not compiled again.

    Raises KernelError: LB0463, LB0464 as the toolchain, LB0460 for schedules that do not exist.
    """
    with tempfile.TemporaryDirectory(prefix="lowbit-offline-") as scratch:
        root = folder or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            running = [pool.submit(_inspect, spec, schedule, target, root) for spec, schedule, target in jobs]
            return [job.result() for job in running]


def _inspect(spec: KernelSpec, schedule: Schedule, target: Target, root: Path) -> CudaReport:
    source = CudaBackend().emit(spec, schedule, target)
    parts = (source.text, *source.flags, nvcc_version(), Path(__file__).read_text())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    kept = root / f"{name}.json"
    if kept.exists():
        return CudaReport(**json.loads(kept.read_text()))
    text, cubin = root / f"{name}.cu", root / f"{name}.cubin"
    text.write_text(source.text)
    said = compile_cubin(text, source.flags, cubin)
    report = _read(said, cubin, make_plan(core_spec(spec), schedule), target)
    staged = root / f"{name}.{os.getpid()}.tmp"
    staged.write_text(json.dumps(asdict(report), sort_keys=True))
    os.replace(staged, kept)
    return report


def _read(said: str, cubin: Path, plan: AnyPlan, target: Target) -> CudaReport:
    tool = find_tool("cuobjdump")
    if tool is None:
        raise KernelError("LB0463", "cuobjdump was not found", hint="install the CUDA toolkit, or triton, which has it")
    kernels = _functions(run_tool([tool, "-sass", str(cubin)]))
    lines = [line for found in kernels.values() for line in found]
    return CudaReport(
        target=str(target),
        registers=_numbers(r"Used (\d+) registers", said)["lb_kernel"],
        spills=sum(n for kind in ("stores", "loads") for n in _numbers(rf"(\d+) bytes spill {kind}", said).values()),
        stack=sum(_numbers(r"(\d+) bytes stack frame", said).values()),
        shared_bytes=plan.shared_bytes,
        cubin_bytes=cubin.stat().st_size,
        sass=dict(Counter(name for _, name, _ in lines)),
        loop=dict(Counter(name for _, name, _ in loop_of(kernels["lb_kernel"]))),
        weights=_weights(plan),
    )


def _functions(sass: str) -> dict[str, list[tuple[int, str, str]]]:
    """Kernel -> its instructions (address, name, operands). Addresses begin anew with every kernel."""
    found = {}
    for part in re.split(r"Function : ", sass)[1:]:
        name, _, text = part.partition("\n")
        found[name.strip()] = [(int(at, 16), op, rest) for at, op, rest in _LINE.findall(text)]
    return found


def _weights(plan: AnyPlan) -> int:
    """Weights of a lane in one round of the main loop."""
    if isinstance(plan, VectorPlan):
        return plan.tile_rows * plan.run // 32
    units = 2 if plan.warpgroup else 1  # whose operands take turns
    return units * plan.parts * 16 * plan.schedule.tile_k // 32


def _numbers(pattern: str, said: str) -> dict[str, int]:
    """The number that ptxas reports for every kernel."""
    found = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", said, re.S):
        number = re.search(pattern, text)
        if number is None:
            raise KernelError("LB0464", f"ptxas does not report {pattern!r}")
        found[name] = int(number[1])
    return found


def loop_of(lines: Sequence[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """The shortest loop around matrix instructions: lines (address, name, operands) between a backward branch and its
    target. Empty where there is none."""
    matrix = [at for at, name, _ in lines if name.startswith(_MATRIX)]
    loops = []
    for at, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            first = int(target[1], 16)
            inside = sum(first <= m <= at for m in matrix)
            if inside:
                loops.append((-inside, at - first, first, at))
    if not loops:
        return []
    _, _, first, last = min(loops)
    return [line for line in lines if first <= line[0] <= last]
