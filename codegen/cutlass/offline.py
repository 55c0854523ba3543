"""Compiling kernels for a GPU that is not there, and reading what the compiler made of them.

Neither the DSL nor cuobjdump needs a driver. What decides speed can be checked anywhere: registers, spills, matrix
instructions.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.codegen.backend import Source
from lowbit.codegen.cuda.toolchain import find_tool, run_tool
from lowbit.codegen.cutlass.toolchain import Artifact, compile_module, read_artifact
from lowbit.compiler.errors import KernelError

__all__ = ["CutlassReport", "inspect"]

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)


@dataclass(frozen=True)
class CutlassReport:
    """What one kernel compiled to. registers: of a thread. stack: bytes of local memory, where spills go. sass: machine
    instruction -> how often it occurs."""

    artifact: Artifact = field(repr=False)
    ptx: str = field(repr=False)
    registers: int
    stack: int
    sass: dict[str, int] = field(repr=False)

    def count(self, *prefixes: str) -> int:
        """Instructions whose names start with one of `prefixes`."""
        return sum(n for name, n in self.sass.items() if name.startswith(prefixes))


def inspect(source: Source) -> CutlassReport:
    """Compile a kernel and read it; raises KernelError: LB0463, LB0464, LB0491, LB0493."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise KernelError("LB0463", "cuobjdump was not found", hint="install the CUDA toolkit, or triton, which has it")
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        out, ptx, cubin = (Path(folder) / name for name in ("kernel", "kernel.ptx", "kernel.cubin"))
        compile_module(source.text, source.flags, out, ptx)
        artifact = read_artifact(out)
        cubin.write_bytes(artifact.cubin)
        used = run_tool([tool, "-res-usage", str(cubin)])
        sass = run_tool([tool, "-sass", str(cubin)])
        registers, stack, local = (_number(name, used) for name in ("REG", "STACK", "LOCAL"))
        return CutlassReport(
            artifact, ptx.read_text(), registers, stack + local, dict(Counter(_INSTRUCTION.findall(sass)))
        )


def _number(name: str, used: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", used)
    if found is None:
        raise KernelError("LB0464", f"cuobjdump does not report {name}")
    return int(found[1])
