"""Compiling kernels for a GPU that is not there, and reading what the compiler made of them.

Triton's compiler and the tools it ships (ptxas, cuobjdump) need no driver, so registers, spills, shared memory and
instruction counts of every schedule can be checked anywhere. Each call uses a process of its own: a process that has
interpreted kernels cannot compile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.codegen.backend import Source
from lowbit.compiler.errors import KernelError

__all__ = ["OfflineReport", "attempt_offline", "compile_offline"]

_TOOL_TIMEOUT_S = 300


@dataclass(frozen=True)
class OfflineReport:
    """What one kernel compiled to.

    registers: per thread. spills: bytes of local memory stored and loaded. shared_bytes: of one program.
    sass: machine instruction -> how often it occurs, by full name (`HMMA.16816.F32.BF16`).
    """

    target: str
    kernel: str
    registers: int
    spills: int
    shared_bytes: int
    cubin_bytes: int
    ptx: str = field(repr=False)
    sass: dict[str, int] = field(repr=False)

    def count(self, *prefixes: str) -> int:
        """Instructions whose name starts with one of `prefixes`."""
        return sum(n for name, n in self.sass.items() if name.startswith(prefixes))

    @property
    def matrix_instructions(self) -> int:
        """Tensor core instructions."""
        return self.count("HMMA", "HGMMA", "IMMA", "IGMMA")


def compile_offline(jobs: Sequence[tuple[Source, str]], keep: Path | None = None) -> list[list[OfflineReport]]:
    """Compile (source, architecture such as `sm_90`) pairs; the reports of each pair's kernels, main kernel first.

    `keep` is a folder that receives module, cubin and PTX of job i under `i/`. Raises KernelError: LB0441 with the
    compiler's message when a kernel does not compile, LB0442 when the compiling process dies.
    """
    reports = []
    for result in attempt_offline(jobs, keep):
        if isinstance(result, KernelError):
            raise result
        reports.append(result)
    return reports


def attempt_offline(
    jobs: Sequence[tuple[Source, str]], keep: Path | None = None
) -> list[list[OfflineReport] | KernelError]:
    """As `compile_offline`, with the error (LB0441) in the place of a job that does not compile."""
    with tempfile.TemporaryDirectory(prefix="lowbit-offline-") as scratch:
        root = keep or Path(scratch)
        plan = []
        for i, (source, arch) in enumerate(jobs):
            folder = root / str(i)
            folder.mkdir(parents=True, exist_ok=True)
            module = folder / f"module{source.suffix}"
            module.write_text(source.text)
            plan.append({"module": str(module), "out": str(folder), "arch": arch})
        results, said = _run_worker(plan, Path(scratch))
        return [_outcome(job, result, said) for job, result in zip(plan, results, strict=True)]


def _outcome(job: dict[str, str], result: dict[str, Any], said: str) -> list[OfflineReport] | KernelError:
    if "error" in result:
        message = f"{result['error']}\n{_first_errors(said)}"
        return KernelError("LB0441", message, where=f"{job['module']} for {job['arch']}")
    return [_report(name, facts, job) for name, facts in result.items()]


def _run_worker(plan: list[dict[str, str]], scratch: Path) -> tuple[list[dict[str, Any]], str]:
    # Never the user's cache: a stale entry would hide a kernel that no longer compiles.
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(scratch / "triton-cache")}
    done = subprocess.run(
        [sys.executable, "-m", "lowbit.codegen.triton.offline_worker"],
        input=json.dumps(plan),
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    if done.returncode:
        raise KernelError("LB0442", f"the compiling process ended with {done.returncode}: {done.stderr[-1000:]}")
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results, done.stderr


def _first_errors(text: str) -> str:
    """The lines of a compiler's output that say what is wrong."""
    return "\n".join(line for line in text.splitlines() if "error:" in line)[:2000]


def _tool(name: str) -> str:
    from importlib.util import find_spec

    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise KernelError("LB0443", "triton is not installed", hint="install triton")
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def _report(kernel: str, facts: dict[str, int], job: dict[str, str]) -> OfflineReport:
    folder = Path(job["out"])
    cubin = folder / f"{kernel}.cubin"
    usage = _run([_tool("cuobjdump"), "-res-usage", str(cubin)])
    ptx = (folder / f"{kernel}.ptx").read_text()
    sass = _run([_tool("cuobjdump"), "-sass", str(cubin)])
    return OfflineReport(
        target=job["arch"],
        kernel=kernel,
        registers=int(_find(r"REG:(\d+)", usage)),
        spills=_spills(folder / f"{kernel}.ptx", ptx),
        shared_bytes=facts["shared"],
        cubin_bytes=cubin.stat().st_size,
        ptx=ptx,
        sass=_count(sass),
    )


def _spills(path: Path, ptx: str) -> int:
    arch = _find(r"\.target (sm_\d+a?)", ptx)
    text = _run([_tool("ptxas"), "-v", f"--gpu-name={arch}", str(path), "-o", os.devnull])
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))


def _count(sass: str) -> dict[str, int]:
    """Machine instructions by name; predicates (`@P0`) are left out."""
    return dict(Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, flags=re.M)))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False)
    if done.returncode:
        raise KernelError("LB0444", f"{Path(command[0]).name} failed: {done.stderr[-500:] or done.stdout[-500:]}")
    return done.stdout + done.stderr


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise KernelError("LB0444", f"the compiler's report lacks {pattern!r}")
    return found[1]
