"""Rows of a packed matrix by torch: the row tiles they lie in are taken out, unpacked and decoded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.quantizers.formats import scalar_format
from lowbit.quantizers.qtensor import PackedWeight, padded_columns, unpack

__all__ = ["gather_rows"]


def gather_rows(weight: PackedWeight, ids: Tensor) -> Tensor:
    """float32 [ids, K]: rows `ids` [ids] of a packed matrix of one segment, on its device. Any scalar format and layout
    will do."""
    layout, fmt = weight.layout, scalar_format(str(weight.fmt))
    tile, cols = layout.row_tile, padded_columns(fmt, weight.k, layout.block)
    tiles, at = torch.unique(ids // tile, return_inverse=True)
    parts: dict[str, Tensor] = {}
    for (name, tensor), bits in zip(weight.tensors.items(), layout.widths(fmt.bits), strict=False):
        sizes = layout.plane_sizes(bits, weight.rows, cols)
        memory = layout.order(bits, sizes)[0]
        grid = tensor.view([sizes[digit] for digit in memory])
        parts[name] = grid.index_select(memory.index(layout.n[0][0]), tiles).reshape(-1)
    for name in weight.tensors.keys() - parts.keys():
        tensor = weight.tensors[name]
        if name in ("scale", "zero", "offset"):
            parts[name] = tensor.index_select(1 if tile == 1 else 0, tiles)
        elif name == "channel_scale":
            rows = tiles[:, None] * tile + torch.arange(tile, device=tiles.device)
            parts[name] = tensor[rows.flatten().clamp(max=weight.n - 1)]
        else:
            parts[name] = tensor
    few = replace(weight, segments=(len(tiles) * tile,), tensors={name: parts[name] for name in weight.tensors})
    return unpack(few)[0].dequantize()[at * tile + ids % tile]
