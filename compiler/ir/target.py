"""Targets: the machine a kernel is generated for. Text forms: `cpu-avx512vnni`, `cpu-avx2`, `sm_90`, `ref`."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lowbit.compiler.errors import KernelError

__all__ = ["CPU_ISAS", "Target", "host_target", "isa_runs_here"]

CPU_ISAS = ("avx512vnni", "avx512", "avx2vnni", "avx2", "generic")
"""Instruction sets kernels are emitted for, best first."""

_NEEDS = {
    "avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "bmi2"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "bmi2"},
    "avx2vnni": {"avx2", "fma", "f16c", "bmi2", "avx_vnni"},
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "generic": set[str](),
}


@dataclass(frozen=True)
class Target:
    """`kind` is `cpu`, `cuda` or `ref`; `arch` the instruction set or `sm_XX`."""

    kind: str
    arch: str

    def __str__(self) -> str:
        return self.arch if self.kind == "cuda" else (f"cpu-{self.arch}" if self.kind == "cpu" else "ref")

    @staticmethod
    def parse(text: str) -> Target:
        """The target written as `text`; raises KernelError (LB0405)."""
        if text == "ref":
            return Target("ref", "ref")
        if text.startswith("cpu-") and text[4:] in CPU_ISAS:
            return Target("cpu", text[4:])
        if text.startswith("sm_") and text[3:].rstrip("a").isdigit():
            return Target("cuda", text)
        raise KernelError(
            "LB0405",
            f"unknown target {text!r}",
            hint="use ref, sm_90, or cpu- followed by " + ", ".join(CPU_ISAS),
        )


@cache
def host_target() -> Target:
    """The best CPU target this machine runs, from the operating system's list of CPU flags."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return Target("cpu", "generic")
    flags = _cpu_flags()
    return Target("cpu", next(isa for isa in CPU_ISAS if _NEEDS[isa] <= flags))


def isa_runs_here(isa: str) -> bool:
    """True when this machine has everything kernels for `isa` use."""
    if isa == "generic":
        return True
    return platform.machine() in ("x86_64", "AMD64") and _NEEDS[isa] <= _cpu_flags()


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((row for row in text.splitlines() if row.startswith("flags")), ":")
    return frozenset(line.split(":", 1)[1].split())
