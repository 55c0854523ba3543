"""Special registers: who a thread is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from _ptx.errors import PtxError
from _ptx.lanes import WARP
from _ptx.values import Array

__all__ = ["special_register"]


def special_register(name: str, threads: int, shape: Sequence[int], place: Sequence[int], grid: Sequence[int]) -> Array:
    """Values for all threads (whole warps of them). shape: of the block in threads, at `place` in the grid. Raises
    PtxError for names that nobody knows."""
    t = np.arange(threads, dtype=np.uint32)
    nx, ny = shape[0], shape[1]
    each = {"%tid.x": t % nx, "%tid.y": t // nx % ny, "%tid.z": t // (nx * ny), "%laneid": t % WARP,
            "%warpid": t // WARP}  # fmt: skip
    one = np.uint64(1) << (t % WARP).astype(np.uint64)
    each |= {"%lanemask_eq": one, "%lanemask_lt": one - np.uint64(1), "%lanemask_le": 2 * one - np.uint64(1),
             "%lanemask_gt": ~(2 * one - np.uint64(1)) & np.uint64(0xFFFFFFFF),
             "%lanemask_ge": ~(one - np.uint64(1)) & np.uint64(0xFFFFFFFF)}  # fmt: skip
    if name in each:
        return each[name]
    same = {"%nwarpid": threads // WARP, "%total_smem_size": 0}
    for i, axis in enumerate("xyz"):
        same |= {f"%ntid.{axis}": shape[i], f"%ctaid.{axis}": place[i], f"%nctaid.{axis}": grid[i],
                 f"%clusterid.{axis}": place[i], f"%nclusterid.{axis}": grid[i],
                 f"%cluster_ctaid.{axis}": 0, f"%cluster_nctaid.{axis}": 1}  # fmt: skip
    same |= {"%cluster_ctarank": 0, "%cluster_nctarank": 1, "%smid": 0, "%nsmid": 1, "%gridid": 0, "%clock": 0,
             "%clock64": 0, "%globaltimer": 0, "%globaltimer_lo": 0, "%is_explicit_cluster": 0}  # fmt: skip
    if name not in same:
        raise PtxError(f"unknown special register {name}")
    return np.full(threads, same[name], dtype=np.uint64)
