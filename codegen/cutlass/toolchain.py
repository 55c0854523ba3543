"""nvidia-cutlass-dsl as a compiler: a generated module in, one file with the kernel's name and machine code out.

The DSL reads its settings from the environment when it is imported and keeps state of its own, so every kernel is
compiled by a process of its own, which is the generated module itself: `python MODULE OUT`. No GPU is needed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from lowbit.codegen.cuda.toolchain import arch_of
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target

__all__ = ["SUFFIX", "Artifact", "compile_module", "dsl_version", "flags_for", "installed", "read_artifact"]

SUFFIX = ".cute"
_PACKAGE = "nvidia-cutlass-dsl"
_ENV = "CUTE_DSL_"
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Artifact:
    """A compiled kernel: its name in the cubin, the threads of a block, bytes of shared memory."""

    kernel: str
    threads: int
    shared: int
    cubin: bytes


def installed() -> bool:
    """Whether the DSL could be imported; nothing is."""
    return find_spec("nvidia_cutlass_dsl") is not None and find_spec("cutlass") is not None


def dsl_version() -> str:
    """The package and its version, which decide the compiler's; raises KernelError (LB0493) without it."""
    try:
        return f"{_PACKAGE} {version(_PACKAGE)}"
    except PackageNotFoundError as e:
        raise KernelError("LB0493", f"{_PACKAGE} is not installed", hint=f"pip install {_PACKAGE}") from e


def flags_for(target: Target) -> tuple[str, ...]:
    """What the DSL calls a target."""
    return (f"sm_{arch_of(target)}",)


def compile_module(text: str, flags: Sequence[str], out: Path, ptx: Path | None = None) -> None:
    """Compile the module `text` for the architecture that `flags` names into the file `out`, and its PTX into `ptx`.
    Raises KernelError: LB0493 without the DSL, LB0491 with its last words when it refuses or takes too long."""
    dsl_version()
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        module, made = Path(folder) / "kernel.py", Path(folder) / "kernel"
        module.write_text(text)
        command = [sys.executable, "-P", str(module), str(made)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
                env=_environment(flags, folder),
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise KernelError("LB0491", f"CuTe DSL cannot be run: {e}") from e
        if done.returncode or not made.is_file():
            raise KernelError("LB0491", f"CuTe DSL does not compile the kernel: {_last(done.stdout + done.stderr)}")
        out.write_bytes(made.read_bytes())
        if ptx is not None:
            ptx.write_bytes((Path(folder) / "kernel.ptx").read_bytes())


def _environment(flags: Sequence[str], folder: str) -> dict[str, str]:
    """The user's environment without settings of the DSL, and those that decide what is made and where it goes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_ENV)}
    chosen = {"ARCH": flags[0], "KEEP": "ptx,cubin", "DUMP_DIR": folder, "NO_CACHE": "1", "DISABLE_FILE_CACHING": "1"}
    return kept | {_ENV + name: value for name, value in chosen.items()}


def _last(said: str) -> str:
    """The lines of a compiler's output that say what is wrong, without colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines() if line.strip()]
    found = [line for line in lines if re.search(r"error\b", line, re.I)] or lines
    return " / ".join(found[-3:])[:1500]


def read_artifact(path: Path) -> Artifact:
    """What `compile_module` wrote; raises KernelError (LB0492) when it is something else."""
    head, _, cubin = path.read_bytes().partition(b"\n")
    try:
        found = json.loads(head)
        artifact = Artifact(str(found["kernel"]), int(found["threads"]), int(found["shared"]), cubin)
    except (ValueError, KeyError, TypeError) as e:
        raise KernelError("LB0492", "is no kernel compiled by CuTe DSL", where=path.name) from e
    if not re.fullmatch(r"\w+", artifact.kernel) or not cubin.startswith(b"\x7fELF"):
        raise KernelError("LB0492", "is no kernel compiled by CuTe DSL", where=path.name)
    return artifact
