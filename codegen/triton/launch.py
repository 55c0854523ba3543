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
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.tiles import Tiles
from lowbit.codegen.triton.vector_tiles import VectorTiles
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["kernels_of", "load_module", "make_launcher"]

_COUNTERS = 1 << 20  # int32 arrival counters a device keeps: 4 MiB

_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "i8": torch.int8, "i32": torch.int32,
          "i16": torch.int16, "u8": torch.uint8}  # fmt: skip


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
    if not module.PREPARE_ARGS:
        return [main]
    return [main, (module.prepare, module.PREPARE_ARGS, module.PREPARE_OPTIONS)]


class _Counters:
    """Arrival counters of split-K kernels: zero between launches, because the last program resets its own.

    Calls on one stream run one after the other and share one buffer. A call captured into a graph may later run beside
    anything, so each gets counters of its own, which are never given to anyone else.
    """

    def __init__(self) -> None:
        self._eager: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._pools: dict[torch.device, list[torch.Tensor]] = {}
        self._used: dict[torch.device, int] = {}

    def reserve(self, device: torch.device) -> None:
        """Have counters ready for captures, which cannot make any themselves."""
        pools = self._pools.setdefault(device, [])
        if not pools or self._used[device] > _COUNTERS // 2:
            pools.append(torch.zeros(_COUNTERS, dtype=torch.int32, device=device))
            self._used[device] = 0

    def take(self, n: int, device: torch.device) -> torch.Tensor:
        """`n` zeroed int32 counters for one launch on the current stream."""
        if device.type != "cuda":
            return torch.zeros(n, dtype=torch.int32)
        if torch.cuda.is_current_stream_capturing():
            used = self._used.get(device, _COUNTERS)
            if used + n > _COUNTERS:
                return torch.zeros(n, dtype=torch.int32, device=device)  # a memset becomes part of the graph
            self._used[device] = used + n
            return self._pools[device][-1][used : used + n]
        self.reserve(device)
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        held = self._eager.get(key)
        if held is None or held.numel() < n:
            held = self._eager[key] = torch.zeros(max(n, 4096), dtype=torch.int32, device=device)
        return held


_counters = _Counters()


def make_launcher(module: ModuleType, spec: KernelSpec, schedule: Schedule) -> Launcher:
    """A launcher for an imported module. On a GPU both kernels are compiled now, not inside the first call."""
    tiles = VectorTiles(spec, schedule) if spec.vector else Tiles(spec, schedule)
    options = dict(module.OPTIONS)
    if torch.cuda.is_available() and hasattr(module.kernel, "warmup"):
        for fn, args, its_options in kernels_of(module):
            fn.warmup(*(_TORCH[t[1:]] if t.startswith("*") else 16 for t in args.values()), grid=(1,), **its_options)
        _counters.reserve(torch.device("cuda", torch.cuda.current_device()))

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
                _counters.take(programs, x.device),
            ]
        if len(args) + 1 != len(module.ARGS):
            raise KernelError("LB0446", f"the kernel takes {', '.join(module.ARGS)}; {len(args) + 1} values were given")
        with _on(x.device):
            module.kernel[(programs, schedule.split_k)](*args, m, **options)

    return launch


def _on(device: torch.device) -> Any:
    """Makes `device` current: Triton launches on the current device's current stream."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _prepared(module: ModuleType, tiles: Tiles | VectorTiles, x: torch.Tensor, weight: PackedWeight) -> list[Any]:
    """What the main kernel takes for x: int8 digits with their scales and sums, or x in the columns' stored order."""
    m, given = x.shape[0], []
    if isinstance(tiles, VectorTiles):
        parts, made = tiles.pieces, [torch.empty_like(x)]
        if "x_sum_ptr" in module.PREPARE_ARGS:
            made.append(torch.empty((m, parts), dtype=torch.float32, device=x.device))
        given = [t for name, t in weight.tensors.items() if f"{name}_ptr" in module.PREPARE_ARGS]
    else:
        parts = tiles.steps
        made = [
            torch.empty((m, parts * tiles.step_columns), dtype=torch.int8, device=x.device),
            torch.empty((m, parts), dtype=torch.float32, device=x.device),
            torch.empty((m, parts), dtype=torch.int32, device=x.device),
        ]
    with _on(x.device):
        module.prepare[(m, parts)](x, *made, *given, m, **module.PREPARE_OPTIONS)
    return made
