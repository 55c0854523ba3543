"""Calling a generated attention module: grids, shares of the tokens, the workspace between its two kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lowbit.codegen.attend import AttendSpec
from lowbit.codegen.triton.attend import ROWS, TritonAttend
from lowbit.codegen.triton.launch import TORCH_TYPES, kernels_of, load_module, on_device

__all__ = ["load_attend"]

_WAVES = 4  # programs for every multiprocessor


def load_attend(path: Path, spec: AttendSpec) -> Callable[[Tensor, list[Tensor], int, Tensor | None, float], Tensor]:
    """`attend(q, state, length, mask, scale)` of the module at `path`: as `codegen.reference.kvstate.attend`, with the
    cache's tensors in the order of the operands. On a GPU both kernels are compiled now, not inside the first call."""
    module, a = load_module(path), TritonAttend(spec)
    at = {name: i for i, name in enumerate(spec.operands)}
    if torch.cuda.is_available() and hasattr(module.kernel, "warmup"):
        for fn, args, options in kernels_of(module):
            given = (TORCH_TYPES[t[1:]] if t[0] == "*" else 1.0 if t == "fp32" else 16 for t in args.values())
            fn.warmup(*given, grid=(1,), **options)

    def capacity(state: list[Tensor]) -> int:
        for letter, per in (("k", 16), ("v", 32)):
            if f"{letter}_plane0" in at:
                return state[at[f"{letter}_plane0"]].shape[2] * per
        return state[at["k_window"]].shape[2]

    def attend(q: Tensor, state: list[Tensor], length: int, mask: Tensor | None, scale: float) -> Tensor:
        q = q.contiguous()
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        batch, query_heads, queries, _ = q.shape
        heads = state[0].shape[1]
        rows, tiles = query_heads // heads * queries, -(-length // a.tile)
        row_tiles = -(-rows // ROWS)
        splits = max(1, min(tiles, -(-_wanted(q.device) // (batch * heads * row_tiles))))
        part = torch.empty(batch * heads * row_tiles * splits * ROWS * (a.dims + 2), device=q.device)
        seen = q.new_zeros(1, dtype=torch.uint8)
        if mask is not None:
            seen = mask.expand(batch, 1, queries, mask.shape[-1]).contiguous().view(torch.uint8)
        columns = seen.shape[-1]
        stored = (spec.fmt.stored(spec.fmt.key, length), spec.fmt.stored(spec.fmt.value, length))
        numbers = (rows, queries, length, *stored, capacity(state), heads, splits, int(mask is not None),
                   queries * columns, columns, scale)  # fmt: skip
        with on_device(q.device):
            module.kernel[(batch * heads, row_tiles, splits)](q, *state, seen, part, *numbers, **module.OPTIONS)
            module.join[(batch * heads, rows)](part, out, rows, row_tiles, splits, **module.JOIN_OPTIONS)
        return out

    return attend


def _wanted(device: torch.device) -> int:
    """Programs that keep a device busy; a few where kernels are interpreted, so that joining is tried."""
    if device.type != "cuda":
        return 6
    return _WAVES * int(torch.cuda.get_device_properties(device).multi_processor_count)
