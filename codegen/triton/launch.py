"""Running a generated module: loading it from its file, workspaces, grids, the current stream."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lowbit.codegen.backend import Launcher
from lowbit.codegen.counters import counters
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.tiles import Tiles
from lowbit.codegen.triton.vector_tiles import VectorTiles
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["TORCH_TYPES", "kernels_of", "load_module", "make_launcher", "on_device"]

TORCH_TYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "i8": torch.int8, "i32": torch.int32,
    "i16": torch.int16, "u8": torch.uint8,
}  # fmt: skip
"""Triton's name of what a pointer points to -> torch's."""


def load_module(path: Path) -> ModuleType:
    """Import a generated module from `path`. Triton needs its source in a real file, which stays where it is."""
    name = f"lowbit_triton_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise KernelError("LB0445", "cannot import the generated kernel", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def kernels_of(module: ModuleType) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """(function, parameter types, compiler options) of a generated module's kernels, the main one first."""
    main = (module.kernel, module.ARGS, module.OPTIONS)
    if hasattr(module, "JOIN_ARGS"):
        return [main, (module.join, module.JOIN_ARGS, module.JOIN_OPTIONS)]
    if not module.PREPARE_ARGS:
        return [main]
    return [main, (module.prepare, module.PREPARE_ARGS, module.PREPARE_OPTIONS)]


def make_launcher(module: ModuleType, spec: KernelSpec, schedule: Schedule) -> Launcher:
    """A launcher for an imported module. On a GPU both kernels are compiled now, not inside the first call."""
    tiles = VectorTiles(spec, schedule) if spec.vector else Tiles(spec, schedule)
    options = dict(module.OPTIONS)
    if torch.cuda.is_available() and hasattr(module.kernel, "warmup"):
        for fn, args, its_options in kernels_of(module):
            given = (TORCH_TYPES[t[1:]] if t.startswith("*") else 16 for t in args.values())
            fn.warmup(*given, grid=(1,), **its_options)
        counters.reserve(torch.device("cuda", torch.cuda.current_device()))

    def launch(
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        m = x.shape[0]
        first = _prepared(module, tiles, x, weight) if module.PREPARE_ARGS else [x]
        args: list[Any] = [*first, *weight.tensors.values()]
        args += [t for t in (bias, residual) if t is not None]
        programs = tiles.n_tiles * -(-m // schedule.tile_m)
        args.append(out)
        if schedule.split_k > 1:
            shape = (schedule.split_k, len(tiles.accumulators), m, tiles.n_acc)
            args += [
                torch.empty(shape, dtype=torch.float32, device=x.device),
                counters.take(programs, x.device),
            ]
        if len(args) + 1 != len(module.ARGS):
            raise KernelError("LB0446", f"the kernel takes {', '.join(module.ARGS)}; {len(args) + 1} values were given")
        with on_device(x.device):
            module.kernel[(programs, schedule.split_k)](*args, m, **options)

    return launch


def on_device(device: torch.device) -> Any:
    """Makes `device` current: Triton launches on the current device's current stream."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _prepared(module: ModuleType, tiles: Tiles | VectorTiles, x: torch.Tensor, weight: PackedWeight) -> list[Any]:
    """What the main kernel takes for x: int8 digits with their scales and sums, or x in the columns' stored order."""
    m = x.shape[0]
    given = [t for name, t in weight.tensors.items() if f"{name}_ptr" in module.PREPARE_ARGS]
    if isinstance(tiles, VectorTiles):
        parts, made = tiles.pieces, [torch.empty_like(x)]
        if "x_sum_ptr" in module.PREPARE_ARGS:
            made.append(torch.empty((m, parts), dtype=torch.float32, device=x.device))
    elif not tiles.integer:
        parts, made = tiles.prepared_groups, [torch.empty_like(x)]
    else:
        parts, steps = tiles.prepared_groups, tiles.steps
        made = [
            torch.empty((m, steps * tiles.step_columns), dtype=torch.int8, device=x.device),
            torch.empty((m, steps), dtype=torch.float32, device=x.device),
            torch.empty((m, steps), dtype=torch.int32, device=x.device),
        ]
    with on_device(x.device):
        module.prepare[(m, parts)](x, *made, *given, m, **module.PREPARE_OPTIONS)
    return made
