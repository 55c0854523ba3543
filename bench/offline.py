"""What nvcc makes of the CUDA kernels, without a GPU: registers, spills, matrix instructions, instructions per weight.

    python bench/offline.py [--json] [--write] [--only TEXT] [--cache DIR]

--write replaces the committed baseline (bench/results/offline.json), with --only the chosen kernels of it; a test
compares some kernels with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit.codegen.cuda.backend import CudaBackend
from lowbit.codegen.cuda.offline import inspect
from lowbit.codegen.cuda.toolchain import nvcc_version
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec, rounded_products
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import parse_activation, parse_format

BASELINE = Path(__file__).parent / "results" / "offline.json"
Job = tuple[KernelSpec, Schedule, Target]

FORMATS = ("int4.g128.sym", "int4.g128.asym", "int2.g64.asym", "int3.g64.sym", "int8.ch.sym", "int1.g128.sym",
           "int6.ch.sym", "e3m2.ch", "e2m1.g32.e8m0", "e2m1.g16.e4m3.t32", "e4m3.ch")  # fmt: skip
VECTORS = (("vq.d4.k256", 0), ("vq.d8.k4096", 0), ("vq.d8.k256.r256.rn", 0), ("vq.d8.k4096.c4.o64v4k4096", 1),
           ("vq.d8.k65536", 1))  # fmt: skip
"""Vector formats, and whether their codebook stays in memory."""
BOTH = ("int4.g128.sym", "int2.g64.asym", "int8.ch.sym", "e3m2.ch", "e2m1.g16.e4m3.t32")
SMALL = {"m1": Schedule(1, 64, 128, 4, 4), "wide": Schedule(1, 64, 64, 4, 4), "m16": Schedule(16, 64, 64, 4, 4)}
TALL = {"int2.g64.asym": Schedule(1, 128, 128, 4, 3).with_extra(resident=1),
        "int8.ch.sym": Schedule(1, 128, 128, 4, 2).with_extra(resident=1),
        "e3m2.ch": Schedule(1, 128, 128, 4, 2).with_extra(resident=1)}  # fmt: skip
WARPGROUPS = Schedule(128, 128, 64, 8, 4).with_extra(row_warps=8, wgmma=1, resident=1)
WIDE = Schedule(256, 128, 64, 8, 4).with_extra(row_warps=8, wgmma=1, resident=1)
BYTES = Schedule(128, 128, 128, 8, 4).with_extra(row_warps=8, wgmma=1, resident=1)
MANY = Schedule(64, 256, 64, 8, 3).with_extra(row_warps=8, exact=1, resident=1)
FEW = Schedule(8, 128, 64, 4, 3).with_extra(resident=1)
FOUR_BITS = Schedule(64, 128, 128, 4, 3).with_extra(row_warps=4, resident=1, s4=1)


ROUNDED = (("int8.ch.sym", "int8.token"), ("int4.ch.sym", "int8.token"), ("int4.g128.sym", "int8.token"),
           ("int4.g128.asym", "int8.g128"), ("int4.g64.sym.perm", "int4.g64.w2"), ("e3m2.ch", "e4m3.token"),
           ("e2m3.ch", "e4m3.token"))  # fmt: skip
"""Weights and what activations are rounded to: W8A8, W4A8, COMET's mixed blocks, W6A8."""

ROWS = (("int4.g64.sym", "int8.g64"), ("int4.g64.sym", "int4.g64.asym"), ("int8.ch.sym", "int8.token.static"),
        ("e3m2.ch", "e4m3.token.static"))  # fmt: skip
"""Weights, and activations that one kernel rounds for the next."""

NIBBLES = (("sm_80", "int4.ch.sym", "int4.token"), ("sm_80", "int4.g128.sym", "int4.g128"),
              ("sm_89", "int4.g64.sym.perm", "int4.g64.w2.asym"))  # fmt: skip
"""Weights and activations of four bits, where matrix units multiply such integers: W4A4, COMET's mixed blocks."""


def spec(fmt: str, dtype: str, activation: str = "") -> KernelSpec:
    """One 8192 x 8192 layer."""
    weights, layout = parse_format(fmt), LAYOUTS["fragments"]
    compute = rounded_products(weights, 8192, layout, parse_activation(activation)) if activation else "float"
    return KernelSpec((8192,), 8192, fmt, str(layout), compute, dtype, dtype, activation=activation)


def rows_spec(fmt: str, activation: str, writes: bool) -> KernelSpec:
    """8192 rounded activations between two kernels: gate and up that round them, or what reads them."""
    found = spec(fmt, "bf16", activation)
    if writes:
        return replace(found, segments=(8192, 8192), epilogue=("silu_mul",), out_activation=activation)
    return replace(found, x_dtype="rounded")


def vector_spec(fmt: str) -> KernelSpec:
    """One 8192 x 8192 layer of a vector format."""
    return KernelSpec((8192,), 8192, fmt, str(LAYOUTS["vectors8"]), "float", "bf16", "bf16")


def jobs() -> dict[str, Job]:
    """Name -> kernel: every format for one token, some in both types; more tokens and architectures for some."""
    found: dict[str, Job] = {}

    def add(arch: str, fmt: str, dtype: str, label: str, schedule: Schedule, activation: str = "") -> None:
        s = schedule.with_extra(bulk=1) if arch == "sm_90" else schedule
        found[f"{arch} {fmt} {activation or dtype} {label}"] = (spec(fmt, dtype, activation), s, Target.parse(arch))

    for fmt in FORMATS:
        for dtype in ("f16", "bf16") if fmt in BOTH else ("bf16",):
            bits = spec(fmt, dtype).fmt.bits
            add("sm_90", fmt, dtype, "m1", SMALL["m1" if bits <= 4 else "wide"])
    for fmt in ("int4.g128.sym", "int2.g64.asym", "e3m2.ch"):
        add("sm_80", fmt, "f16", "m1", SMALL["wide" if fmt == "e3m2.ch" else "m1"])
        add("sm_90", fmt, "bf16", "m16", SMALL["m16"])
        for arch in ("sm_80", "sm_90"):
            add(arch, fmt, "bf16", "m64", MANY)
        add("sm_90", fmt, "bf16", "m128", WARPGROUPS)
    for fmt in ("int4.ch.sym", "int8.ch.sym", "e3m2.ch"):
        add("sm_90", fmt, "bf16", "m256", WIDE)
    for fmt, activation in ROUNDED:
        for arch in ("sm_80", "sm_90") if fmt.startswith("int4.g128") else ("sm_80",):
            add(arch, fmt, "bf16", "m16", SMALL["m16"].with_extra(resident=1), activation)
        fp8 = {"fp8": 1} if activation == "e4m3.token" else {}
        add("sm_90", fmt, "bf16", "m128", BYTES.with_extra(**fp8), activation)
    for arch, fmt, activation in NIBBLES:
        add(arch, fmt, "f16", "m64 s4", FOUR_BITS, activation)
    add("sm_90", "int8.ch.sym", "bf16", "m256", replace(BYTES, tile_m=256), "int8.token")
    for fmt, dtype in (("e3m2.ch", "bf16"), ("int8.ch.sym", "bf16")):
        add("sm_90", fmt, dtype, "m1 as f16", SMALL["wide"].with_extra(half=1))
    add("sm_90", "e3m2.ch", "bf16", "m128 as f16", WARPGROUPS.with_extra(half=1))
    for fmt, tall in TALL.items():
        add("sm_90", fmt, "f16", "m1 tall", tall)
    for fmt, far in VECTORS:
        schedule = Schedule(8, 64, 64, 8, 2).with_extra(resident=1, **({"far": 1} if far else {}))
        for arch in ("sm_80", "sm_90") if fmt.startswith("vq.d4") else ("sm_90",):
            found[f"{arch} {fmt} bf16 m8"] = (vector_spec(fmt), schedule, Target.parse(arch))
    for fmt, activation in ROWS:
        for side in ("writes", "reads"):
            made = rows_spec(fmt, activation, side == "writes")
            for arch in ("sm_80", "sm_90"):
                few = FEW.with_extra(**({"bulk": 1} if arch == "sm_90" else {}))
                found[f"{arch} {fmt} {activation} m8 {side}"] = (made, few, Target.parse(arch))
            many = BYTES.with_extra(bulk=1, **({"fp8": 1} if activation.startswith("e4m3") else {}))
            found[f"sm_90 {fmt} {activation} m128 {side}"] = (made, many, Target.parse("sm_90"))
    backend = CudaBackend()
    for m in (1, 16, 64, 512):  # what would run
        s = next(iter(backend.schedules(spec("int4.g128.sym", "bf16"), Target.parse("sm_90"), m)))
        found[f"sm_90 int4.g128.sym bf16 best{m}"] = (spec("int4.g128.sym", "bf16"), s, Target.parse("sm_90"))
    return found


GROWS = ("registers", "spills", "stack", "shared_bytes", "arithmetic_per_weight", "instructions_per_weight")
SLACK = {"registers": 1.15, "arithmetic_per_weight": 1.05, "instructions_per_weight": 1.05}


def regressions(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of a kernel's summary became worse: more of what costs, or other instructions than were meant."""
    found = [
        f"{name}: {before[name]} -> {now[name]}" for name in GROWS if now[name] > before[name] * SLACK.get(name, 1)
    ]
    if set(now["matrix_instructions"]) != set(before["matrix_instructions"]):
        found.append(f"matrix instructions: {before['matrix_instructions']} -> {now['matrix_instructions']}")
    if now["wide_copies"] < before["wide_copies"] or now["wide_shared_loads"] < before["wide_shared_loads"]:
        found.append(f"wide loads: {before['wide_copies']} -> {now['wide_copies']}")
    return found


def described(job: Job) -> dict[str, str]:
    """What a kernel is for."""
    spec_, s, target = job
    regime = "many tokens" if s.get("wgmma", 0) or s.tile_m >= 64 else "few tokens" if s.tile_m > 8 else "one token"
    return {
        "format": spec_.format, "activation": spec_.activation or spec_.x_dtype, "target": str(target),
        "regime": regime,
    }  # fmt: skip


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
        name: {**report.summary(), **described(job), "schedule": job[1].to_dict()}
        for (name, job), report in zip(chosen.items(), reports, strict=True)
    }
    result = {"toolchain": nvcc_version(), "kernels": kernels}
    if args.write:
        kept = json.loads(BASELINE.read_text())
        if args.only and kept["toolchain"] == result["toolchain"]:
            result["kernels"] = {n: k for n, k in kept["kernels"].items() if n in jobs()} | kernels
        BASELINE.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    if args.json:
        listed = [{"name": name, **kernel} for name, kernel in kernels.items()]
        print(json.dumps({**result, "kernels": listed}, indent=1, sort_keys=True))
    else:
        for name, k in kernels.items():
            print(f"{name:44s} regs {k['registers']:3d} spills {k['spills']} shared {k['shared_bytes']:6d} "
                  f"per weight: arithmetic {k['arithmetic_per_weight']:.2f} all {k['instructions_per_weight']:.2f} "
                  f"{k['matrix_instructions']}")  # fmt: skip
    return 1 if any(k["spills"] for k in kernels.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
