"""Columns in activation order: which group each is of (`g_idx`), as GPTQ and compressed-tensors store it, and the order
of columns in which groups are contiguous, as ordered formats do."""

from __future__ import annotations

import torch

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.qtensor import QTensor

__all__ = ["column_order", "grouped_columns"]


def column_order(g_idx: torch.Tensor, group: int) -> torch.Tensor | None:
    """int64 [K]: the columns in the order that makes groups of `group` contiguous, or None when they are already.

    g_idx: integers [K], the group of each column. Raises FormatError (LB0219) where they are not such groups.
    """
    if g_idx.ndim != 1 or g_idx.is_floating_point():
        raise FormatError("LB0219", "g_idx is not a list of groups")
    found, straight = g_idx.long(), torch.arange(g_idx.numel()) // group
    if torch.equal(found, straight):
        return None
    order = torch.argsort(found, stable=True)
    if not torch.equal(found[order], straight):
        raise FormatError("LB0219", f"g_idx does not divide the columns into groups of {group}")
    return order


def grouped_columns(q: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, K] with columns where the matrix has them, g_idx int32 [K]): the inverse for a matrix."""
    g_idx = (torch.arange(q.shape[1]) // q.fmt.granularity.group_size(q.shape[1])).to(torch.int32)
    if q.perm is None:
        return q.codes, g_idx
    place = torch.argsort(q.perm)
    return q.codes[:, place], g_idx[place]
