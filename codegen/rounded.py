"""Rounded activations between two kernels: the rows of bytes that one writes and the other reads.

A token is one row: the level of every column, a byte each, then float32 scales, one a group, unless they are static;
`row_bytes` in all, a multiple of 16. A byte is an int8 level, or a small float's level as e4m3. Columns come in pieces
of 16, the last one filled up with zeros, and a piece holds its columns in the order 0, 8, 1, 9, ... 7, 15: where matrix
instructions take bytes, a lane's four then are the columns whose weights it has decoded (two neighbours and the two
eight further), and what reads 16-bit numbers finds its two pairs in one word. So the one who writes bytes puts each
in its place for nothing, and nobody who reads has to move one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowbit.quantizers.formats import ActivationFormat, FloatElement

__all__ = ["ORDER", "PIECE", "ROUNDED", "RoundedRows", "unroundable", "unstored"]

ROUNDED = "rounded"
"""Type of activations, in a KernelSpec, that are such rows."""
PIECE = 16
"""Columns, and bytes, of a piece; rows and their parts begin at multiples of it."""
ORDER = tuple(i % 2 * 8 + i // 2 for i in range(PIECE))
"""The column of every byte of a piece."""


@dataclass(frozen=True)
class RoundedRows:
    """Rows of `columns` activations in the format `rounding`."""

    rounding: ActivationFormat
    columns: int

    @property
    def level_bytes(self) -> int:
        """Bytes of the levels, which is where the scales begin."""
        return -(-self.columns // PIECE) * PIECE

    @cached_property
    def scales(self) -> int:
        """float32 scales of a row."""
        return 0 if self.rounding.static else self.rounding.groups(self.columns)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.level_bytes + -(-4 * self.scales // PIECE) * PIECE

    def write(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """uint8 [M, row_bytes] of x [M, columns], rounded by `ActivationFormat.round` with static `scales` [groups]."""
        levels, steps = self.rounding.round(x, scales)
        rows = x.new_zeros((x.shape[0], self.row_bytes), dtype=torch.uint8)
        levels = levels + 0.0  # kernels know no zero below zero
        pieces = torch.nn.functional.pad(levels, (0, self.level_bytes - self.columns)).unflatten(1, (-1, PIECE))
        stored = pieces[..., list(ORDER)].to(self._level_dtype).contiguous().view(torch.uint8)
        rows[:, : self.level_bytes] = stored.flatten(1)
        if self.scales:
            first, size = self.level_bytes, 4 * self.scales
            rows[:, first : first + size] = steps.float().contiguous().view(torch.uint8)
        return rows

    def read(self, rows: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(levels float32 [M, columns], scales float32 [M, groups]) of rows uint8 [M, row_bytes], as
        `ActivationFormat.round` gives them. scales: [groups], of static formats."""
        pieces = rows[:, : self.level_bytes].contiguous().view(self._level_dtype).float().unflatten(1, (-1, PIECE))
        levels = pieces[..., [ORDER.index(column) for column in range(PIECE)]].flatten(1)[:, : self.columns]
        if scales is not None:
            return levels, scales.float().expand(rows.shape[0], -1)
        steps = rows[:, self.level_bytes : self.level_bytes + 4 * self.scales].contiguous()
        return levels, steps.view(torch.float32)

    def numbers(self, rows: Tensor, scales: Tensor | None = None) -> Tensor:
        """float32 [M, columns]: what the rows stand for, the same numbers as `ActivationFormat.apply` gives."""
        levels, steps = self.read(rows, scales)
        sizes = torch.tensor(self.rounding.sizes(self.columns), device=rows.device)
        return levels * steps.repeat_interleave(sizes, dim=-1)

    @property
    def _level_dtype(self) -> torch.dtype:
        return torch.int8 if self.rounding.integer else torch.float8_e4m3fn


def unstored(rounding: ActivationFormat) -> str | None:
    """Why levels of a format are no bytes, or None."""
    if rounding.wide and rounding.wide_bits > 8:
        return f"leading columns of {rounding.wide_bits} bits are no bytes"
    element = rounding.element
    if isinstance(element, FloatElement):
        levels = element.levels()
        finite = levels[levels.isfinite()]
        if not bool((finite.to(torch.float8_e4m3fn).float() == finite).all()):
            return f"e4m3 does not hold every number of {element.name}"
    return None


def unroundable(rounding: ActivationFormat, columns: int) -> str | None:
    """Why the kernel that makes `columns` outputs cannot round them to a format, or None: a thread block sees a few
    columns of a token only, and so cannot know a scale that depends on all."""
    if why := unstored(rounding):
        return why
    if rounding.static or rounding.group:
        return None
    return f"a scale per token depends on all {columns} columns of a row, of which a thread block makes a few"
