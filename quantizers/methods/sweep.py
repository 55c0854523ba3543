"""The loops over columns: GPTQ's error feedback and coordinate descent over the codes.

All work on transposed matrices [K, N], where a column of the weight is contiguous, and on blocks of columns: inside a
block updates are rank one, the rest of the matrix is updated once per block by a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.quantizers.formats import Format
from lowbit.quantizers.methods.base import row_errors
from lowbit.quantizers.methods.grid import Codec, Grid, codec_of
from lowbit.quantizers.methods.sums import SumTable

__all__ = ["ColumnGrid", "coordinate_sweeps", "descend", "feedback"]


@dataclass(eq=False)
class ColumnGrid:
    """A grid laid out for column access: scale, its inverse, zero point and offset of each group, [groups, N]."""

    fmt: Format
    codec: Codec
    rows: int
    k: int
    scale: Tensor
    inverse: Tensor
    zero: Tensor | None
    offset: Tensor | None
    tensor: Tensor | None = None
    channel: Tensor | None = None

    @staticmethod
    def of(grid: Grid, shape: torch.Size) -> ColumnGrid:
        """The grid of an [N, K] matrix."""
        n, k = shape
        scale = grid.scale.expand(n, -1).T.contiguous()
        zero, offset = (
            side.expand(n, -1).T.contiguous() if side is not None else None for side in (grid.zero, grid.offset)
        )
        codec, rows = codec_of(grid.fmt.element), grid.scale.shape[0]
        seconds = (grid.tensor, grid.channel)
        kind = ColumnGrid if grid.fmt.terms == 1 else SumColumns
        return kind(grid.fmt, codec, rows, k, scale, _inverse(scale), zero, offset, *seconds)

    @property
    def size(self) -> int:
        """Columns per group."""
        return self.fmt.granularity.group_size(self.k)

    def replace(self, group: int, grid: Grid) -> None:
        """Set one group's scales, zero points and offsets from the grid of that group alone."""
        self.scale[group] = grid.scale[:, 0]
        self.inverse[group] = _inverse(self.scale[group])
        if self.zero is not None and grid.zero is not None:
            self.zero[group] = grid.zero[:, 0]
        if self.offset is not None and grid.offset is not None:
            self.offset[group] = grid.offset[:, 0]

    def grid(self) -> Grid:
        """Back to the usual layout."""
        zero, offset = (
            side.T[: self.rows].contiguous() if side is not None else None for side in (self.zero, self.offset)
        )
        return Grid(self.fmt, self.scale.T[: self.rows].contiguous(), zero, offset, self.tensor, self.channel)

    def round(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Nearest positions (see `Codec.index`) and the values they stand for, of one column [N]."""
        offset = self.offset[group] if self.offset is not None else None
        zero = self.zero[group] if self.zero is not None else None
        x = (column if offset is None else column - offset) * self.inverse[group]
        if zero is not None:
            x += zero
        index = self.codec.index(x)
        level = self.codec.level(index)
        if zero is not None:
            level = level - zero
        if offset is not None:
            return index, torch.addcmul(offset, level, self.scale[group])
        return index, level * self.scale[group]

    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number of every group, [groups, N]."""
        ends = []
        for level in (self.codec.low, self.codec.high):
            value = (level if self.zero is None else level - self.zero) * self.scale
            ends.append(value if self.offset is None else value + self.offset)
        return torch.minimum(*ends), torch.maximum(*ends)

    def positions(self, n: int) -> Tensor:
        """Room for what `round` returns first, for all columns: [K, N]."""
        return torch.empty(self.k, n, dtype=torch.float32 if self.codec.step else torch.int64)

    def codes(self, positions: Tensor, order: Tensor) -> Tensor:
        """uint8 codes [N, K] of positions [K, N] whose rows follow `order`."""
        out = torch.empty(positions.shape, dtype=torch.uint8)
        out[order] = self.codec.code(positions)
        return out.T.contiguous()


@dataclass(eq=False)
class SumColumns(ColumnGrid):
    """The same for weights that are sums of terms: scales are [groups * terms, N], positions are codes.

    edges, values, value_codes: the `SumTable` of every group, [groups, 2**terms (edges: less 1), N].
    """

    edges: Tensor = field(init=False)
    values: Tensor = field(init=False)
    value_codes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        table = SumTable.of(self.scale.unflatten(0, (-1, self.fmt.terms)).transpose(1, 2))
        self.edges = table.edges.transpose(1, 2).contiguous()
        self.values = table.values.transpose(1, 2).contiguous()
        self.value_codes = table.codes.transpose(1, 2).contiguous()

    def replace(self, group: int, grid: Grid) -> None:
        terms = self.fmt.terms
        self.scale[group * terms : (group + 1) * terms] = grid.scale.T
        table = SumTable.of(grid.scale)
        self.edges[group], self.values[group], self.value_codes[group] = table.edges.T, table.values.T, table.codes.T

    def round(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        rank = (column > self.edges[group]).sum(0, keepdim=True)
        return self.value_codes[group].gather(0, rank)[0], self.values[group].gather(0, rank)[0]

    def positions(self, n: int) -> Tensor:
        return torch.empty(self.k, n, dtype=torch.int64)

    def codes(self, positions: Tensor, order: Tensor) -> Tensor:
        out = torch.empty(positions.shape, dtype=torch.uint8)
        out[order] = positions.to(torch.uint8)
        return out.T.contiguous()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale).nan_to_num_(posinf=3e38, neginf=-3e38)


def feedback(
    weight: Tensor,
    columns: ColumnGrid,
    upper: Tensor,
    order: Tensor,
    block: int,
    research: Callable[[Tensor, int], Grid] | None = None,
    relax: Callable[[int, int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Codes uint8 [N, K] by error feedback along `order`, with U^T U = H^-1 in that order.

    research: called at the first column of each group with its current weights, for scales that follow the updates
    (the order must be the natural one). relax: called before the first block (0, 0) and after every block with its
    bounds, its values [B, N] and the columns that follow [open, N]; returns what to put in their place.
    """
    n, k = weight.shape
    left = weight.T[order].contiguous()
    positions = columns.positions(n)
    group_of = (order // columns.size).tolist()
    diagonal = upper.diagonal().tolist()
    if relax is not None:
        left = relax(0, 0, left[:0], left)
    if research is not None:
        block = max(1, block // columns.size) * columns.size
    for start in range(0, k, block):
        stop = min(start + block, k)
        errors, values = torch.empty(2, stop - start, n)
        for c in range(start, stop):
            if research is not None and c % columns.size == 0:
                columns.replace(group_of[c], research(left[c : c + columns.size].T.contiguous(), c))
            positions[c], value = columns.round(left[c], group_of[c])
            values[c - start] = value
            error = errors[c - start]
            torch.sub(left[c], value, out=error).div_(diagonal[c])
            if c + 1 < stop:
                left[c + 1 : stop].addr_(upper[c, c + 1 : stop], error, alpha=-1)
        if stop < k:
            left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
            if relax is not None:
                left[stop:] = relax(start, stop, values, left[stop:])
    return columns.codes(positions, order)


def descend(
    weight: Tensor, grid: Grid, codes: Tensor, hessian: Tensor, order: Tensor, block: int, sweeps: int
) -> Tensor:
    """Lower the loss by cyclic coordinate descent: every code in turn is set to its best value given all others.

    No step raises the loss in exact arithmetic; rows that float32 made worse keep their old codes.
    """
    if sweeps == 0:
        return codes
    found = coordinate_sweeps(weight, grid, codes, hessian, order, block, sweeps)
    return _better_rows(weight, grid, codes, found, hessian)


def coordinate_sweeps(
    weight: Tensor,
    grid: Grid,
    codes: Tensor,
    hessian: Tensor,
    order: Tensor,
    block: int,
    sweeps: int,
    jitter: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Codes uint8 [N, K] after `sweeps` passes in which every code is set to its best value given all others.

    jitter: called once per block of columns with the square roots of their curvatures [B, 1]; what it returns ([B, N])
    is added to their gradients, so that a pass can leave a local minimum.
    """
    columns = ColumnGrid.of(grid, weight.shape)
    permuted = hessian[order][:, order].contiguous()
    diagonal = permuted.diagonal().clamp(min=1e-30)
    curvature = diagonal.tolist()
    group_of = (order // columns.size).tolist()
    target, current = weight.T[order].contiguous(), grid.qtensor(codes).dequantize().T[order].contiguous()
    n, k = weight.shape
    positions = columns.positions(n)
    gradient = permuted @ (current - target)
    for _ in range(sweeps):
        for start in range(0, k, block):
            stop = min(start + block, k)
            before = current[start:stop].clone()
            local = gradient[start:stop].clone()
            if jitter is not None:
                local += jitter(diagonal[start:stop, None].sqrt())
            for c in range(start, stop):
                wanted = torch.add(current[c], local[c - start], alpha=-1 / curvature[c])
                positions[c], value = columns.round(wanted, group_of[c])
                step = value - current[c]
                current[c] = value
                if c + 1 < stop:
                    local[c + 1 - start :].addr_(permuted[c, c + 1 : stop], step)
            gradient.addmm_(permuted[:, start:stop], current[start:stop] - before)
    return columns.codes(positions, order)


def _better_rows(weight: Tensor, grid: Grid, old: Tensor, new: Tensor, hessian: Tensor) -> Tensor:
    before, after = (row_errors(grid.qtensor(c).dequantize() - weight, hessian) for c in (old, new))
    return torch.where((after <= before)[:, None], new, old)
