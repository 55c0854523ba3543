"""What nvcc makes of the CUDA kernels, without a GPU: registers, spills, matrix instructions, instructions per weight.

    python bench/offline.py [--json] [--write] [--only TEXT] [--cache DIR]

--write replaces the committed baseline (bench/results/offline.json); a test compares some kernels with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lowbit.codegen.cuda.backend import CudaBackend
from lowbit.codegen.cuda.offline import inspect
from lowbit.codegen.cuda.toolchain import nvcc_version
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target

BASELINE = Path(__file__).parent / "results" / "offline.json"
Job = tuple[KernelSpec, Schedule, Target]

FORMATS = ("int4.g128.sym", "int4.g128.asym", "int2.g64.asym", "int3.g64.sym", "int8.ch.sym", "int1.g128.sym",
           "int6.ch.sym", "e3m2.ch", "e2m1.g32.e8m0", "e2m1.g16.e4m3.t32", "e4m3.ch")  # fmt: skip
SMALL = {"m1": Schedule(1, 64, 128, 4, 4), "wide": Schedule(1, 64, 64, 4, 4), "m16": Schedule(16, 64, 64, 4, 4)}
WARPGROUPS = Schedule(128, 128, 64, 8, 4).with_extra(row_warps=8, exact=1, wgmma=1, resident=1)
MANY = Schedule(64, 256, 64, 8, 3).with_extra(row_warps=8, exact=1, resident=1)


def spec(fmt: str, dtype: str, n: int = 8192, k: int = 8192) -> KernelSpec:
    """One 8192 x 8192 layer."""
    return KernelSpec((n,), k, fmt, str(LAYOUTS["fragments"]), "float", dtype, dtype)


def jobs() -> dict[str, Job]:
    """Name -> kernel: every format for one token, in both types; more tokens and architectures for some."""
    found: dict[str, Job] = {}

    def add(arch: str, fmt: str, dtype: str, label: str, schedule: Schedule) -> None:
        s = schedule.with_extra(bulk=1) if arch == "sm_90" else schedule
        found[f"{arch} {fmt} {dtype} {label}"] = (spec(fmt, dtype), s, Target.parse(arch))

    for fmt in FORMATS:
        for dtype in ("f16", "bf16"):
            bits = spec(fmt, dtype).fmt.bits
            add("sm_90", fmt, dtype, "m1", SMALL["m1" if bits <= 4 else "wide"])
    for fmt in ("int4.g128.sym", "int2.g64.asym", "e3m2.ch"):
        add("sm_80", fmt, "f16", "m1", SMALL["wide" if fmt == "e3m2.ch" else "m1"])
        add("sm_90", fmt, "bf16", "m16", SMALL["m16"])
        for arch in ("sm_80", "sm_90"):
            add(arch, fmt, "bf16", "m64", MANY)
        add("sm_90", fmt, "bf16", "m128", WARPGROUPS)
    backend = CudaBackend()
    for m in (1, 16, 64, 512):  # what would run
        s = next(iter(backend.schedules(spec("int4.g128.sym", "bf16"), Target.parse("sm_90"), m)))
        found[f"sm_90 int4.g128.sym bf16 best{m}"] = (spec("int4.g128.sym", "bf16"), s, Target.parse("sm_90"))
    return found


GROWS = ("registers", "spills", "stack", "shared_bytes", "arithmetic_per_weight", "issued_per_weight")
SLACK = {"registers": 1.15, "arithmetic_per_weight": 1.05, "issued_per_weight": 1.05}


def regressions(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of a kernel's summary became worse: more of what costs, or other instructions than were meant."""
    found = [
        f"{name}: {before[name]} -> {now[name]}" for name in GROWS if now[name] > before[name] * SLACK.get(name, 1)
    ]
    if set(now["matrix"]) != set(before["matrix"]):
        found.append(f"matrix: {before['matrix']} -> {now['matrix']}")
    if now["wide_copies"] < before["wide_copies"] or now["wide_shared_loads"] < before["wide_shared_loads"]:
        found.append(f"wide loads: {before['wide_copies']} -> {now['wide_copies']}")
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    chosen = {name: job for name, job in jobs().items() if args.only in name}
    reports = inspect(list(chosen.values()), args.cache)
    kernels: dict[str, Any] = {
        name: {**report.summary(), "schedule": job[1].to_dict()}
        for (name, job), report in zip(chosen.items(), reports, strict=True)
    }
    result = {"toolchain": nvcc_version(), "kernels": kernels}
    if args.write:
        BASELINE.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    if args.json:
        print(json.dumps(result, indent=1, sort_keys=True))
    else:
        for name, k in kernels.items():
            print(f"{name:44s} regs {k['registers']:3d} spills {k['spills']} shared {k['shared_bytes']:6d} "
                  f"per weight: arithmetic {k['arithmetic_per_weight']:.2f} all {k['issued_per_weight']:.2f} "
                  f"{k['matrix']}")  # fmt: skip
    return 1 if any(k["spills"] for k in kernels.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
