"""Dequantize once, then torch's GEMM: so that a quantized layer need not be slower than a dense one for many tokens.

Where products outnumber weights by far, a kernel that decodes a weight for every tile of tokens can lose to one that
decodes it once and leaves the rest to the vendor's library ("never slower than 16 bits", as users of several projects
ask for). This is an ordinary backend with a cost model of its own; whether it runs is decided for every kernel and
token class by the same selection as everything else. It compiles nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch

from lowbit.codegen.backend import NO_ROWS, Backend, Launcher, Source
from lowbit.codegen.library.dequantize import RowDecoder, row_decoder, take_rows
from lowbit.codegen.library.model import CPU_GEMM, predict
from lowbit.codegen.reference.backend import finish
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import WeightFormat
from lowbit.quantizers.hadamard import rotate
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["LibraryBackend"]

_FEWEST = 64
"""Tokens below which a matrix is never dequantized for one call."""

_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Weights dequantized at once: what bounds the workspace."""

_TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class LibraryBackend(Backend):
    """Scalar formats in any packed layout, for activations as they are. Weights and activations are multiplied in the
    activations' type on GPUs, and in float32, torch's fastest without AMX, on CPUs."""

    name = "library"
    kinds = ("cpu", "cuda")
    layout = "panel16"
    vector_layout = "vectors8"
    any_layout = True

    def serves(self, fmt: WeightFormat, activation: str = "") -> str | None:
        return "serves many tokens only, in the layout of another backend's kernels"

    def available(self, target: Target) -> str | None:
        return None if target.kind == "cpu" or torch.cuda.is_available() else "torch finds no CUDA device"

    def supports(self, spec: KernelSpec, target: Target) -> str | None:
        if target.kind == "cpu" and target.arch not in CPU_GEMM:
            return f"nobody measured torch's GEMM on {target}"
        if spec.uses_rows:
            return NO_ROWS
        if spec.norm_eps:
            return "inputs are not normalised before a library's GEMM"
        if spec.vector:
            return "vector formats are not dequantized for a library's GEMM"
        return "activations are not rounded before a library's GEMM" if spec.activation else None

    def space(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        if m >= _FEWEST:
            yield Schedule(tile_m=_FEWEST, tile_n=_block_rows(spec, target.kind), tile_k=spec.k)

    def illegal(self, spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
        tile = spec.layout_.row_tile
        return f"blocks of {schedule.tile_n} rows are no whole tiles of {tile}" if schedule.tile_n % tile else None

    def predict(self, spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
        blocks = sum(-(-n // schedule.tile_n) for n in spec.segments)
        return predict(spec, target, m, blocks)

    def emit(self, spec: KernelSpec, schedule: Schedule, target: Target) -> Source:
        return Source(f"{spec.key()} {schedule.tile_n}", ".json")

    def compile(self, source: Source, out: Path) -> None:
        out.write_text(source.text)

    def toolchain(self) -> str:
        return f"torch {torch.__version__}"

    def load(self, artifact: Path, spec: KernelSpec, schedule: Schedule) -> Launcher:
        decode, dtype = None, _TORCH_DTYPES[spec.x_dtype]

        def launch(
            x: torch.Tensor,
            weight: PackedWeight,
            bias: torch.Tensor | None,
            residual: torch.Tensor | None,
            out: torch.Tensor,
        ) -> None:
            nonlocal decode
            kind = dtype if x.is_cuda else torch.float32
            decode = decode or _decoder(spec, kind, x.is_cuda)
            x = (rotate(x.float(), spec.rotate) if spec.rotate else x).to(kind)
            y = torch.empty(x.shape[0], sum(spec.segments), dtype=kind, device=x.device)
            start = 0
            for index, n in enumerate(weight.segments):
                for first in range(0, n, schedule.tile_n):
                    count = min(schedule.tile_n, n - first)
                    rows = decode(take_rows(weight, index, first, count))[:count]
                    y[:, start + first : start + first + count] = torch.nn.functional.linear(x, rows)
                start += n
            out.copy_(finish(spec, y.float(), bias, residual))

        return launch


def _decoder(spec: KernelSpec, dtype: torch.dtype, fused: bool) -> RowDecoder:
    """fused: as one kernel by Inductor, which is compiled when the first call (that checks the kernel) needs it."""
    decode = row_decoder(spec.fmt, spec.layout_, spec.k, dtype)
    if not fused or find_spec("triton") is None:
        return decode
    return cast(RowDecoder, torch.compile(decode, fullgraph=True, dynamic=False))


def _block_rows(spec: KernelSpec, kind: str) -> int:
    tile = spec.layout_.row_tile
    rows = max(1, _BLOCK[kind] // (spec.blocks * 32))
    return max(tile, min(rows, max(spec.segments) + tile - 1) // tile * tile)
