"""Targets: the machine a kernel is generated for. Text forms: `cpu-avx512vnni`, `cpu-avx2`, `sm_90`, `ref`."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lowbit.compiler.errors import KernelError

__all__ = ["CPU_ISAS", "Target", "host_target", "isa_compiles_here", "isa_runs_here"]

CPU_ISAS = ("avx512bf16", "avx512vbmi", "avx512vnni", "avx512", "avx2vnni", "avx2", "neondot", "neon", "generic")
"""Instruction sets kernels are emitted for, best first: those of x86-64, those of AArch64, and what any machine has."""

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "bmi2"})
_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})

_NEEDS = {
    "avx512bf16": _AVX512 | {"avx512_vnni", "avx512vbmi", "avx512_bf16"},
    "avx512vbmi": _AVX512 | {"avx512_vnni", "avx512vbmi"},
    "avx512vnni": _AVX512 | {"avx512_vnni"},
    "avx512": _AVX512,
    "avx2vnni": _AVX2 | {"avx_vnni"},
    "avx2": _AVX2,
    "neondot": frozenset({"asimd", "asimddp"}),
    "neon": frozenset({"asimd"}),
    "generic": frozenset[str](),
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
    flags = _cpu_flags()
    return Target("cpu", next(isa for isa in CPU_ISAS if _NEEDS[isa] <= flags))


def isa_runs_here(isa: str) -> bool:
    """True when this machine has everything kernels for `isa` use."""
    return _NEEDS[isa] <= _cpu_flags()


def isa_compiles_here(isa: str) -> bool:
    """True when this machine's own compiler has instructions for `isa`, whether it runs them or not."""
    family = "arm" if isa.startswith("neon") else "x86" if isa.startswith("avx") else ""
    return family in ("", _FAMILIES.get(platform.machine(), ""))


_FAMILIES = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm", "arm64": "arm"}


def _cpu_flags() -> frozenset[str]:
    """Names of what the CPU has; where the operating system lists nothing, what every one of its family has."""
    family = _FAMILIES.get(platform.machine(), "")
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset(("asimd",) if family == "arm" else ())
    line = next((row for row in text.splitlines() if row.startswith(("flags", "Features"))), ":") if family else ":"
    return frozenset(line.split(":", 1)[1].split())
