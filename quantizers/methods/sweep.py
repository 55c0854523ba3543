"""The loops over columns: GPTQ's error feedback, coordinate descent, and the closed-form fit of scales to codes.

All work on transposed matrices [K, N], where a column of the weight is contiguous, and on blocks of columns: inside a
block updates are rank one, the rest of the matrix is updated once per block by a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quantizers.formats import Format
from lowbit.quantizers.methods.base import row_errors
from lowbit.quantizers.methods.grid import Codec, Grid, codec_of, stored_scale

__all__ = ["ColumnGrid", "descend", "feedback", "refit_scales"]

_ROW_BYTES = 1 << 26


@dataclass(eq=False)
class ColumnGrid:
    """A grid laid out for column access: scale, its inverse and zero point of each group, [groups, N]."""

    fmt: Format
    codec: Codec
    rows: int
    k: int
    scale: Tensor
    inverse: Tensor
    zero: Tensor | None

    @staticmethod
    def of(grid: Grid, shape: torch.Size) -> ColumnGrid:
        """The grid of an [N, K] matrix."""
        n, k = shape
        scale = grid.scale.expand(n, -1).T.contiguous()
        zero = grid.zero.expand(n, -1).T.contiguous() if grid.zero is not None else None
        return ColumnGrid(grid.fmt, codec_of(grid.fmt.element), grid.scale.shape[0], k, scale, _inverse(scale), zero)

    @property
    def size(self) -> int:
        """Columns per group."""
        return self.fmt.granularity.group_size(self.k)

    def replace(self, group: int, grid: Grid) -> None:
        """Set one group's scales and zero points from the grid of that group alone."""
        self.scale[group] = grid.scale[:, 0]
        self.inverse[group] = _inverse(self.scale[group])
        if self.zero is not None and grid.zero is not None:
            self.zero[group] = grid.zero[:, 0]

    def grid(self) -> Grid:
        """Back to the usual layout."""
        zero = self.zero.T[: self.rows].contiguous() if self.zero is not None else None
        return Grid(self.fmt, self.scale.T[: self.rows].contiguous(), zero)

    def round(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Nearest positions (see `Codec.index`) and the values they stand for, of one column [N]."""
        x = column * self.inverse[group]
        zero = self.zero[group] if self.zero is not None else None
        if zero is not None:
            x += zero
        index = self.codec.index(x)
        level = self.codec.level(index)
        if zero is not None:
            level = level - zero
        return index, level * self.scale[group]


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale).nan_to_num_(posinf=3e38, neginf=-3e38)


def feedback(
    weight: Tensor,
    columns: ColumnGrid,
    upper: Tensor,
    order: Tensor,
    block: int,
    research: Callable[[Tensor, int], Grid] | None = None,
) -> Tensor:
    """Codes uint8 [N, K] by error feedback along `order`, with U^T U = H^-1 in that order.

    research: called at the first column of each group with its current weights, for scales that follow the updates
    (the order must be the natural one).
    """
    n, k = weight.shape
    left = weight.T[order].contiguous()
    codes = torch.empty(k, n, dtype=torch.uint8)
    group_of = (order // columns.size).tolist()
    diagonal = upper.diagonal().tolist()
    if research is not None:
        block = max(1, block // columns.size) * columns.size
    for start in range(0, k, block):
        stop = min(start + block, k)
        errors = torch.empty(stop - start, n)
        for c in range(start, stop):
            if research is not None and c % columns.size == 0:
                columns.replace(group_of[c], research(left[c : c + columns.size].T.contiguous(), c))
            index, value = columns.round(left[c], group_of[c])
            codes[c] = columns.codec.code(index)
            error = errors[c - start]
            torch.sub(left[c], value, out=error).div_(diagonal[c])
            if c + 1 < stop:
                left[c + 1 : stop].addr_(upper[c, c + 1 : stop], error, alpha=-1)
        if stop < k:
            left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    out = torch.empty_like(codes)
    out[order] = codes
    return out.T.contiguous()


def descend(
    weight: Tensor, grid: Grid, codes: Tensor, hessian: Tensor, order: Tensor, block: int, sweeps: int
) -> Tensor:
    """Lower the loss by cyclic coordinate descent: every code in turn is set to its best value given all others.

    No step raises the loss in exact arithmetic; rows that float32 made worse keep their old codes.
    """
    if sweeps == 0:
        return codes
    columns = ColumnGrid.of(grid, weight.shape)
    permuted = hessian[order][:, order].contiguous()
    curvature = permuted.diagonal().clamp(min=1e-30).tolist()
    group_of = (order // columns.size).tolist()
    original = grid.qtensor(codes).dequantize()
    target, current = weight.T[order].contiguous(), original.T[order].contiguous()
    indices = codes.T[order].contiguous()
    k = weight.shape[1]
    gradient = permuted @ (current - target)
    for _ in range(sweeps):
        for start in range(0, k, block):
            stop = min(start + block, k)
            before = current[start:stop].clone()
            local = gradient[start:stop].clone()
            for c in range(start, stop):
                index, value = columns.round(current[c] - local[c - start] / curvature[c], group_of[c])
                step = value - current[c]
                indices[c] = columns.codec.code(index)
                current[c] = value
                if c + 1 < stop:
                    local[c + 1 - start :].addr_(permuted[c, c + 1 : stop], step)
            gradient.addmm_(permuted[:, start:stop], current[start:stop] - before)
    out = torch.empty_like(indices)
    out[order] = indices
    return _better_rows(weight, grid, codes, out.T.contiguous(), hessian)


def _better_rows(weight: Tensor, grid: Grid, old: Tensor, new: Tensor, hessian: Tensor) -> Tensor:
    before, after = (row_errors(grid.qtensor(c).dequantize() - weight, hessian) for c in (old, new))
    return torch.where((after <= before)[:, None], new, old)


def refit_scales(weight: Tensor, grid: Grid, codes: Tensor, hessian: Tensor) -> Grid:
    """Scales that minimise the loss for fixed codes, row by row where they do so after rounding to the stored type.

    With Z the levels (minus zero points) of a row, split by group into the columns of B [K, G], the best scales solve
    (B^T H B) s = B^T H w. Shared scales of per-tensor formats are one equation for the whole matrix.
    """
    levels = _levels(grid, codes)
    if grid.fmt.granularity.kind == "t":
        pulled = levels @ hessian
        scale = ((pulled * weight).double().sum() / (pulled * levels).double().sum().clamp(min=1e-300)).float()
        fitted = stored_scale(torch.where(scale.isfinite() & (scale != 0), scale, grid.scale), grid.fmt)
        candidate = Grid(grid.fmt, fitted.reshape(1, 1), grid.zero)
        return candidate if _loss(weight, candidate, codes, hessian) < _loss(weight, grid, codes, hessian) else grid
    fitted = stored_scale(_solve_scales(weight, grid, levels, hessian), grid.fmt)
    candidate = Grid(grid.fmt, fitted, grid.zero)
    before, after = (row_errors(g.qtensor(codes).dequantize() - weight, hessian) for g in (grid, candidate))
    return Grid(grid.fmt, torch.where((after < before)[:, None], fitted, grid.scale), grid.zero)


def _loss(weight: Tensor, grid: Grid, codes: Tensor, hessian: Tensor) -> float:
    return float(row_errors(grid.qtensor(codes).dequantize() - weight, hessian).sum())


def _levels(grid: Grid, codes: Tensor) -> Tensor:
    """float32 [N, K]: level minus zero point of every code."""
    levels = grid.fmt.element.levels().float()[codes.long()]
    _, zero = grid.column(codes.shape[1])
    return levels if zero is None else levels - zero


def _solve_scales(weight: Tensor, grid: Grid, levels: Tensor, hessian: Tensor) -> Tensor:
    """Solutions [N, G] of the normal equations; groups without any nonzero level keep their scale."""
    n, k = weight.shape
    size, groups = grid.fmt.granularity.group_size(k), grid.scale.shape[1]
    pad = groups * size - k
    out = grid.scale.clone()
    chunk = max(1, _ROW_BYTES // (4 * k * 2))
    identity = torch.eye(groups, dtype=torch.float64)
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        z = levels[rows]
        normal = torch.empty(len(z), groups, groups, dtype=torch.float64)
        for g in range(groups):
            cols = slice(g * size, (g + 1) * size)
            pulled = torch.nn.functional.pad((z[:, cols] @ hessian[cols]) * z, (0, pad))
            normal[:, g] = pulled.view(len(z), groups, size).sum(-1).double()
        right = (
            torch.nn.functional.pad((weight[rows] @ hessian) * z, (0, pad)).view(len(z), groups, size).sum(-1).double()
        )
        diagonal = normal.diagonal(dim1=1, dim2=2)
        idle = diagonal <= 0
        ridge = 1e-9 * diagonal.amax(1)[:, None, None] * identity
        solved, info = torch.linalg.solve_ex(normal + ridge + torch.diag_embed(idle.double()), right)
        good = (info == 0)[:, None] & solved.isfinite() & ~idle & (solved != 0)
        out[rows] = torch.where(good, solved.float(), out[rows])
    return out
