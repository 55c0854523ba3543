"""CPU kernels side by side with torch, llama.cpp and onnxruntime, interleaved in one process, cold weights.

Every kernel of one shape is visited in turn, and every visit uses the next of several copies of its weights, so that
weights come from memory as they do in a model. One thread is timed with the CPU clock of the thread, several with the
wall clock. Medians and 5th percentiles are kept; ratios of medians above 1 mean that lowbit is faster. Rows of several
threads are marked `contended` when those threads together read memory more slowly than one by its CPU clock:
other processes held the cores, and the row says little.

    python bench/cpu.py --quick --json bench/results/cpu.json
    python bench/cpu.py --formats int8.ch.sym int4.g128.sym --activations int8.token --tokens 1 16 512 \
        --json bench/results/cpu_int8.json

With `--target cpu-avx2` our kernels are those of another instruction set that this machine runs, and where sums may be
looked up there are two, one that does and one of dot products.

With `--activations`, kernels whose activations are rounded to these formats are added, and torch's own int8 product
`torch._int_mm` beside them, its rounding of x to int8 included, as they include theirs. llama.cpp's kernels take part
where its libraries are found (see `ggml_peer.py`), so do those of its fork ik_llama.cpp, and onnxruntime's where it can
be imported (`ort_peer.py`); otherwise a line says so. `vs_torch`, `vs_llamacpp`, `vs_ik_llamacpp` and `vs_onnxruntime`
compare with the fastest kernel of each whose codes have as many bits as ours or more.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import ort_peer
import torch
from ggml_peer import BITS, IK_TYPES, TYPES, Ggml, find_ik_libraries, find_libraries

from lowbit.codegen.cpp.assemble import ISA_FLAGS
from lowbit.codegen.cpp.backend import CppBackend
from lowbit.codegen.cpp.launch import load_openmp
from lowbit.codegen.cpp.toolchain import FLAGS, compile_shared
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.runtime.build import sample_weight
from lowbit.quantizers.formats import VectorFormat, exact_integers, parse_format, sixteen_bit_products
from lowbit.quantizers.qtensor import PackedWeight

BACKEND = CppBackend()
COLD_BYTES = 128 << 20
_PAUSE = 0.005  # seconds; threads wait in a loop after a call, libgomp's for 6 to 17 ms, onnxruntime's for 40
_WAKING = 0.012  # seconds; threads that wake on one core share it, 4 to 6 ms a call, until the scheduler's next rounds
_PEERS = {"torch": "vs_torch", "ggml": "vs_llamacpp", "ik": "vs_ik_llamacpp", "ort": "vs_onnxruntime"}
_TORCH_BITS = {"bf16": 16, "f32": 32, "int8": 8, "int4pack.g128": 4}
Call = Callable[[], object]
Products = list[Callable[[torch.Tensor], object]]

_READ = """
#include <cstdint>
#include <cstring>
#include <omp.h>
// Sums `n` bytes in four streams per thread; fast enough that memory is what limits it. What is `ahead` bytes away is
// fetched: some processors are better off without.
extern "C" __attribute__((visibility("default")))
uint64_t read_all(const char* p, int64_t n, int threads, int64_t ahead) {
  uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    const int64_t share = n / omp_get_num_threads() / 4 / 4096 * 4096;
    const char* base = p + share * 4 * omp_get_thread_num();
    typedef uint64_t V __attribute__((vector_size(32)));  // every machine's compiler keeps these sums in registers
    V sum[8] = {};
    for (int64_t i = 0; i < share; i += 64)
      for (int s = 0; s < 8; ++s) {
        V v;
        memcpy(&v, base + s / 2 * share + i + s % 2 * 32, 32);
        if (s % 2 == 0) __builtin_prefetch(base + s / 2 * share + i + ahead);
        sum[s] += v;
      }
    for (int s = 0; s < 8; ++s)
      for (int j = 0; j < 4; ++j) total += sum[s][j];
  }
  return total;
}
"""


@dataclass(frozen=True)
class Timed:
    """One kernel: what it is, how to call it, how many bytes of weights a call reads."""

    label: dict[str, Any]
    call: Call
    nbytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description="time lowbit's CPU kernels and torch's")
    parser.add_argument("--quick", action="store_true", help="fewer formats, shapes and repetitions")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("N", "K"), help="instead of the usual")
    parser.add_argument("--formats", nargs="*", help="instead of the usual")
    parser.add_argument("--activations", nargs="*", default=[], help="formats of rounded activations to add")
    parser.add_argument("--tokens", type=int, nargs="*", metavar="M", help="instead of the usual")
    parser.add_argument("--target", type=Target.parse, default=host_target(), help="of our kernels, if not the best")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--ggml", nargs="*", choices=sorted(TYPES), help="llama.cpp's types; none: leave it out")
    parser.add_argument("--ik", nargs="*", choices=sorted(IK_TYPES), help="ik_llama.cpp's; none: leave it out")
    parser.add_argument(
        "--ort", nargs="*", type=int, choices=ort_peer.BITS, help="onnxruntime's bits; none: leave it out"
    )
    options = parser.parse_args()
    ggml = [*open_ggml(options.ggml), *open_ggml(options.ik, fork=True)]
    shapes = [(4096, 4096)] if options.quick else [(4096, 4096), (11008, 4096), (4096, 11008)]
    shapes = [(n, k) for n, k in options.shape] if options.shape else shapes
    ort = Ort.open(options.ort, shapes, options.threads)
    formats = ["int4.g128.asym", "int4.g128.sym", "int8.ch.sym", "int2.g64.asym", "int3.g128.asym", "int2.g64.fz"]
    formats += ["e3m2.ch", "e2m3.ch", "mxfp4", "nvfp4", "e4m3.ch", "vq.d4.k256", "vq.d8.k256.r256", "vq.d8.k4096"]
    formats += ["vq.d8.k256.r256.in", "vq.d4.k256.in"]
    formats = options.formats or (formats[:2] if options.quick else formats)
    tokens = options.tokens or ([1, 512] if options.quick else [1, 8, 16, 512])
    rows: list[dict[str, Any]] = []
    bandwidth = {t: read_bandwidth(t) for t in options.threads}
    print("read bandwidth GB/s:", {t: round(b, 1) for t, b in bandwidth.items()})
    for n, k in shapes:
        for m in tokens:
            if m == 512 and (n, k) != (4096, 4096) and not options.activations:
                continue
            rows += measure(formats, options.activations, n, k, m, bandwidth, options.quick, ggml, ort, options.target)
            if options.json:  # after every shape: a run on a busy machine is long
                save(options.json, rows, bandwidth, ggml, ort, options.target)


def save(
    path: Path,
    rows: list[dict[str, Any]],
    bandwidth: dict[int, float],
    ggml: list[Types],
    ort: Ort | None,
    target: Target,
) -> None:
    """Write the rows so far, and where they were measured."""
    versions = {"torch": torch.__version__, "python": platform.python_version(), "compiler": BACKEND.toolchain()}
    result = {
        "machine": machine(bandwidth, target),
        "versions": versions
        | {library.name: library.version for library, _ in ggml}
        | ({"onnxruntime": ort.module.__version__} if ort else {}),
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "kernels": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


@dataclass(frozen=True)
class Ort:
    """onnxruntime, if it is there and wanted: its products by shape [N, K], bits and number of threads.

    All are made before anything is measured, those of one thread first, see `ort_peer.share_threads`."""

    module: Any
    products: dict[tuple[int, int], dict[int, dict[int, Products]]]

    @staticmethod
    def open(bits: list[int] | None, shapes: list[tuple[int, int]], counts: list[int]) -> Ort | None:
        module = None if bits == [] else ort_peer.find_onnxruntime()
        if module is None and bits:
            sys.exit("--ort needs onnxruntime and onnx, or LOWBIT_ORT naming the folder of an environment's packages")
        if module is None:
            print("onnxruntime is left out" + ("" if bits == [] else ": it or onnx is not here, LOWBIT_ORT is not set"))
            return None
        several = [threads for threads in counts if threads > 1]
        if len(several) > 1:
            why = f"a process has one number of threads to share, not {several}"
            if bits:
                sys.exit(f"--ort takes 1 and one other number of --threads: {why}")
            print(f"onnxruntime is left out: {why}")
            return None
        made: dict[tuple[int, int], dict[int, dict[int, Products]]] = {shape: {} for shape in shapes}
        for threads in sorted(counts):
            if threads > 1:
                ort_peer.share_threads(module, threads)
            for (n, k), b in product(shapes, bits or ort_peer.BITS):
                copies = max(2, COLD_BYTES // ort_peer.weight_bytes(b, n, k) + 1)
                try:
                    made[n, k].setdefault(b, {})[threads] = ort_peer.products(module, b, n, k, copies, threads > 1)
                except RuntimeError as e:
                    print(e)
        return Ort(module, made)


Types = tuple[Ggml, list[str]]
"""llama.cpp's library or its fork's, and the types to measure."""


def open_ggml(kinds: list[str] | None, fork: bool = False) -> list[Types]:
    """llama.cpp's library, or its fork's, if it is there and wanted."""
    name, option, variable = ("ik_llama.cpp", "ik", "IK_GGML") if fork else ("llama.cpp", "ggml", "GGML")
    folder = find_ik_libraries() if fork else find_libraries()
    if folder is None and kinds:
        sys.exit(f"--{option} needs LOWBIT_{variable}, naming the folder of {name}'s libraries (see ggml_peer.py)")
    if folder is None or kinds == []:
        print(f"{name} is left out" + ("" if folder else f": it is not here, and LOWBIT_{variable} is not set"))
        return []
    return [(Ggml(folder, fork), kinds or list(IK_TYPES if fork else TYPES))]


def measure(
    formats: list[str],
    activations: list[str],
    n: int,
    k: int,
    m: int,
    bandwidth: dict[int, float],
    quick: bool,
    ggml: list[Types],
    ort: Ort | None,
    target: Target,
) -> list[dict[str, Any]]:
    """Rows of one shape and token count at every thread count, printed as they come."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    specs = [spec_of(fmt, compute, n, k) for fmt in formats for compute in computes(fmt, bool(activations))]
    integers = [fmt for fmt in formats if exact_integers(parse_format(fmt)) is not None]
    specs += [spec_of(fmt, "int8", n, k, a) for a in activations for fmt in integers]
    kernels = [ours(spec, schedule, x, target) for spec in specs for schedule in choices(spec, m, target)]
    kernels += torch_kernels(n, k, m, x) + ([torch_int8(n, k, m, x)] if activations else [])
    for library, kinds in ggml:
        kernels += ggml_kernels(library, kinds, n, x)
    kernels += ort_kernels(ort, n, x) if ort else []
    reps = (5 if quick or n * k > 2**25 else 9) if m >= 64 else (20 if quick else 40)
    rows = []
    alone = bandwidth.get(1, 0.0)
    for threads, roof in bandwidth.items():
        torch.set_num_threads(threads)
        for library, _ in ggml:
            library.set_threads(threads)
        times = interleaved([t.call for t in kernels], reps, threads)
        peers = {t.label["format"]: statistics.median(us) for t, us in zip(kernels, times, strict=True)}
        for timed, us in zip(kernels, times, strict=True):
            rows.append(
                row(
                    timed,
                    us,
                    {"M": m, "N": n, "K": k, "threads": threads, "cold": True, "contended": roof < alone},
                    roof,
                    peers,
                )
            )
    return rows


def row(timed: Timed, us: list[float], where: dict[str, Any], roof: float, peers: dict[str, float]) -> dict[str, Any]:
    """One result: median and 5th percentile, share of the read bandwidth, and the peers' times over ours."""
    median, best = statistics.median(us), low(us)
    found = {
        **timed.label,
        **where,
        "us": round(median, 1),
        "us_p5": round(best, 1),
        "share_of_read_bandwidth": round(timed.nbytes / median / 1e3 / roof, 3),
        "gops": round(2e-3 * where["M"] * where["N"] * where["K"] / median, 1),
        "vs_torch_bf16": round(peers["torch bf16"] / median, 2),
        "vs_torch_f32": round(peers["torch f32"] / median, 2),
        "vs_torch_int4pack": round(peers["torch int4pack.g128"] / median, 2),
    }
    if "torch int8" in peers:
        found["vs_torch_int8"] = round(peers["torch int8"] / median, 2)
    theirs = {name.removeprefix("ggml "): us for name, us in peers.items() if name.startswith("ggml ")}
    if "schedule" in found:
        found |= against(peers, bits_of(found["format"]), median)
    shape = f"M={where['M']:<4d} {where['N']}x{where['K']} {where['threads']}t"
    ratios = "  ".join(f"x{v:<5.2f} {peer.removeprefix('vs_torch_')}" for peer, v in found.items() if "vs_" in peer)
    kind = found.get("activation") or found["compute"]
    kind += " lut" if found.get("schedule", {}).get("lut", 0) else ""
    print(
        f"{found['format']:19s} {kind:11s} {shape} {median:10.1f} us (p5 {best:10.1f}) "
        f"{found['share_of_read_bandwidth']:5.2f} of bandwidth {found['gops']:6.1f} GOP/s  {ratios}",
        flush=True,
    )
    return found | ({"vs_ggml": {name: round(us / median, 2) for name, us in theirs.items()}} if theirs else {})


def bits_of(fmt: str) -> float:
    """Bits of a weight of one of our formats, without its share of scales and codebooks."""
    found = parse_format(fmt)
    if isinstance(found, VectorFormat):
        return (math.log2(found.centroids) + (math.log2(found.residual) if found.residual else 0)) / found.dim
    return found.bits


def against(peers: dict[str, float], bits: float, median: float) -> dict[str, float]:
    """Time of each library's fastest kernel with codes of at least `bits` bits over ours."""
    best: dict[str, float] = {}
    for name, us in peers.items():
        library, _, kind = name.partition(" ")
        if (column := _PEERS.get(library)) is None:
            continue
        width = int(kind[3]) if library == "ort" else {**BITS, **_TORCH_BITS}.get(kind.split()[0], 0)
        if width >= bits:
            best[column] = max(best.get(column, 0.0), 1 / us)
    return {column: round(1 / rate / median, 2) for column, rate in best.items()}


def low(us: list[float]) -> float:
    """The 5th percentile."""
    return sorted(us)[len(us) // 20]


def computes(fmt: str, rounded: bool = False) -> tuple[str, ...]:
    """Kinds of products to measure: integers where the format has them; without the short cut of int8 digits where
    kernels with activations that are meant to be int8 are measured."""
    found = parse_format(fmt)
    if exact_integers(found) is None:
        return ("int16",) if sixteen_bit_products(found) else ("float",)
    return ("int16",) if rounded else ("int16", "int8")


def spec_of(fmt: str, compute: str, n: int, k: int, activation: str = "") -> KernelSpec:
    """One layer, with numbers in bfloat16 outside."""
    layout = str(LAYOUTS[BACKEND.layout_of(parse_format(fmt), host_target())])
    return KernelSpec((n,), k, fmt, layout, compute, "bf16", "bf16", activation=activation)  # type: ignore[arg-type]


def choices(spec: KernelSpec, m: int, target: Target) -> list[Schedule]:
    """The backend's first choice; where sums may be looked up instead of computed, the first that does the other."""
    found = list(BACKEND.schedules(spec, target, m))
    other = (s for s in found if s.get("lut", 0) != found[0].get("lut", 0))
    return [found[0], *([s] if (s := next(other, None)) else [])]


def ours(spec: KernelSpec, schedule: Schedule, x: torch.Tensor, target: Target) -> Timed:
    """One kernel of the backend."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "kernel.so"
        BACKEND.compile(BACKEND.emit(spec, schedule, target), artifact)
        launch = BACKEND.load(artifact, spec, schedule)
    weight = sample_weight(spec)
    copies = [clone(weight) for _ in range(max(2, COLD_BYTES // weight.nbytes() + 1))]
    out, turn = torch.empty(x.shape[0], spec.n_out, dtype=torch.bfloat16), [0]

    def call() -> None:
        turn[0] += 1
        launch(x, copies[turn[0] % len(copies)], None, None, out)

    label = {"format": spec.format, "compute": spec.compute, "schedule": schedule.to_dict()}
    label |= {"activation": spec.activation} if spec.activation else {}
    return Timed(label, call, weight.nbytes())


def clone(weight: PackedWeight) -> PackedWeight:
    """The same weight elsewhere in memory."""
    return replace(weight, tensors={name: t.clone() for name, t in weight.tensors.items()})


def torch_kernels(n: int, k: int, m: int, x: torch.Tensor) -> list[Timed]:
    """torch's own: F.linear in bfloat16 and float32, and the 4-bit weight kernel with groups of 128."""
    found = []
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        size = n * k * dtype.itemsize
        weights = [torch.randn(n, k).to(dtype) for _ in range(COLD_BYTES // size + 1)]
        call = rotate(torch.nn.functional.linear, x.to(dtype), [(w,) for w in weights])
        found.append(Timed({"format": f"torch {name}", "compute": name}, call, size))
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    side = torch.rand(k // 128, n, 2).bfloat16()
    size = n * k // 2 + side.numel() * 2
    copies = [(packed.clone(), 128, side.clone()) for _ in range(COLD_BYTES // size + 1)]
    call = rotate(torch.ops.aten._weight_int4pack_mm_for_cpu, x, copies)
    found.append(Timed({"format": "torch int4pack.g128", "compute": "bf16"}, call, size))
    return found


def torch_int8(n: int, k: int, m: int, x: torch.Tensor) -> Timed:
    """x rounded to int8 by token, `torch._int_mm` with int8 weights, and both scales: what torch users write."""
    copies = [torch.randint(-127, 128, (n, k), dtype=torch.int8).t() for _ in range(COLD_BYTES // (n * k) + 1)]
    scale, turn = torch.rand(n).bfloat16(), [0]

    def call() -> None:
        turn[0] += 1
        steps = x.abs().amax(1, keepdim=True) / 127
        levels = (x / steps).round().to(torch.int8)
        (torch._int_mm(levels, copies[turn[0] % len(copies)]) * steps.float() * scale).bfloat16()

    return Timed({"format": "torch int8", "compute": "int8"}, call, n * k)


def ggml_kernels(ggml: Ggml, kinds: list[str], n: int, x: torch.Tensor) -> list[Timed]:
    """llama.cpp's or its fork's: weights as they are, and where it can also rearranged for this machine (`repacked`).
    Activations are rounded inside, to 8 bits in blocks."""
    found, ggml_x = [], x.float().contiguous()
    for kind in kinds:
        for place, suffix in (("CPU", ""), ("CPU_REPACK", " repacked")):
            if place in ggml.buffer_types and ggml.supports(kind, place, n, x.shape[1]):
                size = n * ggml.row_bytes(kind, x.shape[1])
                products = ggml.products(kind, place, ggml_x, n, max(2, COLD_BYTES // size + 1))
                call = rotate(lambda _, run: run(), ggml_x, [(run,) for run in products])
                found.append(Timed({"format": f"{ggml.name} {kind}{suffix}", "compute": "q8"}, call, size))
    return found


def ort_kernels(ort: Ort, n: int, x: torch.Tensor) -> list[Timed]:
    """onnxruntime's: groups of 128, scales float32, activations rounded inside to 8 bits in blocks."""
    found, ort_x = [], x.float().contiguous()
    for bits, made in ort.products[n, x.shape[1]].items():
        label = {"format": f"ort int{bits}.g128", "compute": "q8"}
        found.append(Timed(label, rotate(by_threads(made), ort_x, [()]), ort_peer.weight_bytes(bits, n, x.shape[1])))
    return found


def by_threads(made: dict[int, Products]) -> Callable[[torch.Tensor], None]:
    """A function that uses the next of the products for as many threads as torch has now."""
    turn = [0]

    def call(x: torch.Tensor) -> None:
        turn[0] += 1
        copies = made[torch.get_num_threads()]
        copies[turn[0] % len(copies)](x)

    return call


def rotate(function: Callable[..., object], x: torch.Tensor, copies: list[tuple[Any, ...]]) -> Call:
    """A call that uses the next copy every time."""
    turn = [0]

    def call() -> None:
        turn[0] += 1
        function(x, *copies[turn[0] % len(copies)])

    return call


def interleaved(calls: list[Call], reps: int, threads: int) -> list[list[float]]:
    """Microseconds of every visit to each call, visited in turn; the first two rounds are not counted.

    Each library has threads of its own, which wait in a loop for a while after a call and so take the next one's cores:
    with several threads a visit begins with a pause until they sleep, and with calls until its own are awake and apart.
    """
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    times: list[list[int]] = [[] for _ in calls]
    for _ in range(reps + 2):
        for call, found in zip(calls, times, strict=True):
            if threads > 1:
                settle()
                awake = time.perf_counter() + _WAKING
                call()
                while time.perf_counter() < awake:
                    call()
            start = clock()
            call()
            found.append(clock() - start)
    return [[ns / 1e3 for ns in found[2:]] for found in times]


def settle() -> None:
    """Pause until none of this process's threads does anything, or for half a second."""
    for _ in range(100):
        before = time.process_time()
        time.sleep(_PAUSE)
        if time.process_time() - before < _PAUSE / 10:
            return


def read_bandwidth(threads: int) -> float:
    """GB/s that `threads` threads read from memory, best of 12."""
    load_openmp()
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder) / "read.cpp", Path(folder) / "read.so"
        text.write_text(_READ)
        compile_shared(text, (*FLAGS, *ISA_FLAGS[host_target().arch]), out)
        run = ctypes.CDLL(str(out)).read_all
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64], ctypes.c_uint64
    data = torch.ones(512 << 20, dtype=torch.uint8)
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    best = 0.0
    for ahead in (0, 512, 2048) * 4:
        start = clock()
        run(data.data_ptr(), data.numel(), threads, ahead)
        best = max(best, data.numel() / (clock() - start))
    return best


def machine(bandwidth: dict[int, float], target: Target) -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "target": str(target),
        "load_average": round(os.getloadavg()[0], 2),
        "read_gb_per_s": {str(t): round(b, 1) for t, b in bandwidth.items()},
    }


def commit() -> str:
    """The checkout's commit, or `unknown`."""
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    main()
