"""What the cost models expect of an H200, beside what others have published. Predictions, not measurements.

    python bench/predict.py [--json] [--write] [--only TEXT]

For every layer of LLaMA-3 8B and 70B, format and number of tokens: the backend that selection would take on
sm_90 where nothing was measured, and the time that its cost model gives, from bytes, instructions and vendors' peak
rates. No GPU is needed, and none was used. --write replaces bench/results/h200_predicted.json and the tables of
docs/predictions.md; `bench/gpu.sh` is what measures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.codegen import load_backend
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.gpus import LAUNCH, gpu_of
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLES = ROOT / "bench" / "results" / "h200_predicted.json", ROOT / "docs" / "predictions.md"
H200 = Target("cuda", "sm_90")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
BACKENDS = ("cuda", "triton", "library")


@dataclass(frozen=True)
class Layer:
    """A linear layer: K input columns, N output rows."""

    name: str
    k: int
    n: int


LAYERS = (
    Layer("8B qkv", 4096, 6144), Layer("8B o", 4096, 4096), Layer("8B gate_up", 4096, 28672),
    Layer("8B down", 14336, 4096), Layer("70B qkv", 8192, 10240), Layer("70B o", 8192, 8192),
    Layer("70B gate_up", 8192, 57344), Layer("70B down", 28672, 8192),
)  # fmt: skip
FORMATS = ("int4.g128.sym", "int2.g64.asym", "e3m2.ch")

PUBLISHED = {
    "what": "microseconds on other people's H200s, N = K = 8192, scales per channel, cold L2, triton's do_bench",
    "source": "Humming's own benchmark results (vllm-project/humming); Marlin, torch and Humming in one run of theirs",
    "rows": {
        "torch fp16": {1: 50.1, 16: 51.0, 32: 44.6, 64: 45.3, 128: 45.7, 256: 56.6, 512: 99.3, 1024: 200.9,
                       4096: 823.7},
        "Marlin W4A16": {1: 23.1, 16: 23.7, 32: 33.5, 64: 43.2, 128: 55.8, 256: 94.7, 512: 172.7, 1024: 332.0,
                         4096: 1347.0},
        "Humming W4A16": {1: 22.4, 16: 22.9, 32: 24.1, 64: 28.1, 128: 36.0, 256: 58.8, 512: 108.0, 1024: 201.1,
                          4096: 801.6},
        "Humming W2A16": {1: 19.4, 64: 26.4, 128: 35.3, 1024: 190.7},
        "Humming W6A16": {1: 26.9, 64: 32.2, 128: 37.8, 1024: 210.0},
        "Humming W8A16": {1: 31.2, 1024: 211.6},
    },
}  # fmt: skip


def dense_seconds(layer: Layer, m: int) -> float:
    """A bfloat16 GEMM of the library: the larger of memory and matrix units, on the rates all predictions use."""
    gpu = gpu_of(H200)
    moved = 2.0 * (layer.n * layer.k + m * (layer.n + layer.k))
    return LAUNCH + max(moved / gpu.bandwidth, 2.0 * m * layer.n * layer.k / gpu.matrix16)


def predictions(layer: Layer, fmt: str, m: int) -> dict[str, Any]:
    """What selection would take: a weight is packed once, in the layout of the CUDA C++ kernels, so Triton's kernels,
    which read another, are an alternative to all of them (`LOWBIT_BACKENDS=triton,reference`) and stand beside."""
    found = []
    for name in BACKENDS:
        backend = load_backend(name)
        layout = LAYOUTS["fragments" if name == "library" else backend.layout]
        spec = KernelSpec((layer.n,), layer.k, fmt, str(layout), "float", "bf16", "bf16")
        if backend.supports(spec, H200) is None:
            found += [(backend.predict(spec, s, H200, m), name, s) for s in list(backend.schedules(spec, H200, m))[:1]]
    seconds, name = min((t, b) for t, b, _ in found if b != "triton")
    weights = replace(spec, layout=str(layout)).weight_format.bits_per_weight(layer.n, layer.k) * layer.n * layer.k / 8
    return {
        "layer": layer.name, "K": layer.k, "N": layer.n, "format": fmt, "M": m, "backend": name,
        "predicted_us": round(seconds * 1e6, 2),
        "predicted_tb_per_s": round(weights / seconds / 1e12, 3),
        "predicted_tflops": round(2.0 * m * layer.n * layer.k / seconds / 1e12, 1),
        "predicted_bf16_us": round(dense_seconds(layer, m) * 1e6, 2),
        "by_backend_us": {b: round(t * 1e6, 2) for t, b, _ in found},
    }  # fmt: skip


def document(only: str = "") -> dict[str, Any]:
    """Everything, with what it is said first."""
    rows = []
    for layer in LAYERS:
        for fmt in (f for f in FORMATS if only in f):
            rows += [predictions(layer, fmt, m) for m in TOKENS]
            print(f"{layer.name} {fmt}", file=sys.stderr)
    gpu = gpu_of(H200)
    return {
        "what": "PREDICTIONS of cost models for an H200 (sm_90). Nothing here was measured; no GPU was used.",
        "command": "python bench/predict.py --write",
        "assumed": {"read_tb_per_s": gpu.bandwidth / 1e12, "tflops_16_bit": gpu.matrix16 / 1e12,
                    "multiprocessors": gpu.multiprocessors, "clock_ghz": gpu.clock / 1e9, "launch_us": LAUNCH * 1e6},
        "published": PUBLISHED,
        "predictions": rows,
    }  # fmt: skip


def _grid(rows: list[dict[str, Any]], fmt: str) -> list[str]:
    cells = {(r["layer"], r["M"]): r for r in rows if r["format"] == fmt}
    out = ["| layer (K x N) |" + "".join(f" {m} |" for m in TOKENS), "|---|" + "---:|" * len(TOKENS)]
    for layer in LAYERS:
        times = "".join(f" {cells[layer.name, m]['predicted_us']:.1f} |" for m in TOKENS)
        out.append(f"| {layer.name} ({layer.k} x {layer.n}) |{times}")
    return out


def _peers(values: dict[str, Any]) -> list[str]:
    """The square layer of 70B, for which there are published times."""
    out = ["| 8192 x 8192, us |" + "".join(f" {m} |" for m in TOKENS), "|---|" + "---:|" * len(TOKENS)]
    for name, times in values["published"]["rows"].items():
        known = {int(m): t for m, t in times.items()}
        out.append(f"| published: {name} |" + "".join(f" {known[m]:.1f} |" if m in known else " |" for m in TOKENS))
    mine = [r for r in values["predictions"] if r["layer"] == "70B o"]
    for fmt in dict.fromkeys(r["format"] for r in mine):
        times = {r["M"]: r["predicted_us"] for r in mine if r["format"] == fmt}
        out.append(f"| predicted: `{fmt}` |" + "".join(f" {times[m]:.1f} |" for m in TOKENS))
    dense = {r["M"]: r["predicted_bf16_us"] for r in mine}
    out.append("| predicted: bfloat16 GEMM |" + "".join(f" {dense[m]:.1f} |" for m in TOKENS))
    return out


def tables(values: dict[str, Any]) -> str:
    """docs/predictions.md, from the JSON document."""
    rows, assumed = values["predictions"], values["assumed"]
    ratio = [r["predicted_bf16_us"] / r["predicted_us"] for r in rows]
    worst = min(rows, key=lambda r: r["predicted_bf16_us"] / r["predicted_us"])
    mean, least = math.exp(sum(map(math.log, ratio)) / len(ratio)), min(ratio)
    published = values["published"]
    lines = [
        "# Predicted times on an H200", "",
        "**These are predictions of the cost models that choose kernels. Nothing here was measured.** They are written",
        "down so that a measurement has something to disagree with. `bench/predict.py --write` makes this page and",
        "[its data](../bench/results/h200_predicted.json) without a GPU; `bench/gpu.sh` measures on one.", "",
        f"Assumed: {assumed['read_tb_per_s']:.2f} TB/s read, {assumed['tflops_16_bit']:.0f} TFLOP/s of 16-bit",
        f"products, {assumed['launch_us']:.1f} us for a launch, weights in no cache; bfloat16 activations.",
        "Microseconds, by tokens. A weight is packed once: for the CUDA C++ kernels, and the library's GEMM where",
        "they are predicted to lose to it. Triton's kernels read another layout; their predictions are in the data.",
        "", "## Beside published times", "",
        f"Published: {published['what']}.", f"{published['source']}.",
        "Their clocks, drivers and timing are not ours: do_bench adds about 3 us to a kernel of 20 us.", "",
        *_peers(values), "",
        f"The predicted bfloat16 GEMM takes {mean:.2f} times as long as ours, in the geometric mean over all below,",
        f"and {least:.2f} times in the worst case: `{worst['format']}`, {worst['layer']}, {worst['M']} tokens.",
    ]  # fmt: skip
    for fmt in dict.fromkeys(r["format"] for r in rows):
        lines += ["", f"## `{fmt}`", "", *_grid(rows, fmt)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the document")
    parser.add_argument("--write", action="store_true", help="replace the results and the page of tables")
    parser.add_argument("--only", default="", help="formats that contain this text (not with --write)")
    args = parser.parse_args()
    values = json.loads(json.dumps(document("" if args.write else args.only)))
    if args.write:
        RESULTS.write_text(json.dumps(values, indent=1) + "\n")
        TABLES.write_text(tables(values), encoding="utf-8")
    if args.json:
        print(json.dumps(values, indent=1))
    elif not args.write:
        for r in values["predictions"]:
            print(f"{r['layer']:12s} {r['format']:16s} M={r['M']:<5d} predicted {r['predicted_us']:9.1f} us "
                  f"{r['predicted_tb_per_s']:5.2f} TB/s {r['predicted_tflops']:7.1f} TFLOP/s by {r['backend']}; "
                  f"bf16 GEMM predicted {r['predicted_bf16_us']:8.1f} us")  # fmt: skip


if __name__ == "__main__":
    main()
