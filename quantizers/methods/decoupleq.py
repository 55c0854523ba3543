"""decoupleQ: integers and floats of a quantized matrix optimised in turn, both against the layer's output.

After "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and Floating
Points" (Guo et al.): scales and offsets are free numbers found in closed form under the full Hessian, not properties of
the range of the weights, and the integers solve a least-squares problem inside a box. Beyond the paper, the starting
grid comes from a weighted search, and the integer problem is finished by coordinate descent that begins with noise and
cools down, in the manner of "Optimization by Simulated Annealing" (Kirkpatrick et al.).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.compiler.errors import RunError
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.factor import Prepared, prepare
from lowbit.quantizers.formats import Format, WeightFormat
from lowbit.quantizers.methods.base import Quantized, check_finite, proxy_error, row_errors, scalar_only
from lowbit.quantizers.methods.box import BoxSystems, box_feedback
from lowbit.quantizers.methods.fit import choose_rows, fitted
from lowbit.quantizers.methods.gptq import keep_better
from lowbit.quantizers.methods.grid import Grid, search_grid, stored_offset
from lowbit.quantizers.methods.sweep import ColumnGrid, coordinate_sweeps, feedback
from lowbit.quantizers.methods.target import SecondOrder

__all__ = ["DecoupleQ", "Incumbent"]

_ROUNDINGS = ("gptq", "box", "cd")
_STALLED = 1e-4  # share of rows; fewer improvements than this end a loop
_SEED = 0


@dataclass(eq=False)
class Incumbent:
    """The best grid and codes so far of every row, under the damped Hessian. Losses never rise.

    errors: float64 [N], the loss of every row. trace: `errors` after each offer.
    """

    weight: Tensor
    hessian: Tensor
    grid: Grid
    codes: Tensor
    errors: Tensor = field(init=False)
    trace: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.errors = self.losses(self.grid, self.codes)
        self.trace = [self.errors]

    def losses(self, grid: Grid, codes: Tensor) -> Tensor:
        """d H d^T of every row, float64 [N]."""
        return row_errors(grid.qtensor(codes).dequantize() - self.weight, self.hessian)

    def offer(self, grid: Grid, codes: Tensor) -> float:
        """Take the rows that improve (all or none, where all rows share a scale); returns their share."""
        errors = self.losses(grid, codes)
        better = errors < self.errors
        if len(grid.scale) == 1 < len(errors):
            better[:] = errors.sum() < self.errors.sum()
        self.grid = choose_rows(better[: len(grid.scale)], grid, self.grid)
        self.codes = torch.where(better[:, None], codes, self.codes)
        self.errors = torch.where(better, errors, self.errors)
        self.trace.append(self.errors)
        return float(better.float().mean())


@dataclass(frozen=True)
class DecoupleQ(SecondOrder):
    """decoupleQ, for formats with offsets (`fz`); symmetric formats are its mode without offsets.

    damping: share of the mean diagonal added to the Hessian's diagonal. iterations: 0 rounds to nearest, 1 adds GPTQ on
    that grid, 2 GPTQ on a grid found by search, and every further one finds scales and offsets in closed form and then
    new integers. rounding: how integers are found: `gptq`; `box`, GPTQ that keeps open columns at the minimum of the
    relaxed problem; `cd`, that followed by `rounds` rounds of coordinate descent (`sweeps` passes each) and closed
    forms, which start at `temperature` (noise as a share of the row's root mean square error; 0 only ever descends) and
    cool down. shrinks: ranges tried in the search. act_order: most important columns first. block: columns between two
    full updates. integer_zero: offsets are whole multiples of their scales. asymmetric: see `SecondOrder`.
    """

    damping: float = 0.01
    iterations: int = 3
    rounding: str = "cd"
    shrinks: int = 20
    act_order: bool = True
    block: int = 128
    rounds: int = 6
    sweeps: int = 2
    temperature: float = 0.3
    integer_zero: bool = False
    asymmetric: float | None = None

    name: ClassVar[str] = "decoupleq"

    @classmethod
    def effort(cls, fmt: WeightFormat) -> float:
        return 5.0

    def __post_init__(self) -> None:
        if self.rounding not in _ROUNDINGS:
            raise RunError(
                "LB0503", f"unknown rounding {self.rounding!r}", where=self.name, hint=f"use {', '.join(_ROUNDINGS)}"
            )
        self.check_calibration()
        if not self.temperature >= 0:
            raise RunError("LB0503", "temperature must not be negative", where=self.name)
        if self.block < 1 or self.shrinks < 1 or min(self.iterations, self.rounds, self.sweeps) < 0:
            raise RunError("LB0503", "block and shrinks must be positive, no count negative", where=self.name)

    def quantize(self, weight: Tensor, fmt: WeightFormat, stats: LayerStats | None) -> Quantized:
        check_finite(weight)
        fmt = self._offsets_or_symmetric(scalar_only(fmt, self.name))
        fmt.check(weight.shape[0], weight.shape[1], "weight")
        plain = self._allowed(search_grid(weight, fmt, signed=True)).encode(weight)
        prepared = prepare(stats, self.damping, self.act_order) if stats is not None else None
        if prepared is None:
            why = "no calibration statistics" if stats is None else "the Hessian is zero or not finite"
            error = proxy_error(weight, plain.dequantize(), None)
            return Quantized(plain, error, error, (f"{why}; rounded to nearest",))
        found = self.solve(weight, fmt, prepared)
        return keep_better(weight, found.grid.qtensor(found.codes), plain, prepared)

    def _offsets_or_symmetric(self, fmt: Format) -> Format:
        if fmt.zero:
            raise RunError(
                "LB0515",
                f"{self.name} cannot produce {fmt}: its zero points are integers",
                hint=f"use an offset: {str(fmt).replace('.asym', '.fz')}",
            )
        return fmt

    def solve(self, weight: Tensor, fmt: Format, prepared: Prepared) -> Incumbent:
        """Grid and codes of [N, K] under the damped Hessian, with the trace of losses that led there."""
        grid = self._allowed(search_grid(weight, fmt, clip=False))
        best = Incumbent(weight, prepared.damped, grid, grid.encode(weight).codes)
        if self.iterations >= 1:
            best.offer(grid, self._feedback(weight, grid, prepared))
        round_ = self._rounder(weight, prepared) if self.iterations >= 2 else None
        if round_ is not None:
            grid = self._searched(weight, fmt, prepared)
            best.offer(grid, round_(grid))
            for _ in range(self.iterations - 2):
                if best.offer(self._fitted(best), best.codes) < _STALLED:
                    break
                if best.offer(best.grid, round_(best.grid)) < _STALLED:
                    break
            best.offer(self._fitted(best), best.codes)
        if self.rounding == "cd":
            self._anneal(best, prepared)
        return best

    def _feedback(self, weight: Tensor, grid: Grid, prepared: Prepared) -> Tensor:
        return feedback(weight, ColumnGrid.of(grid, weight.shape), prepared.upper, prepared.order, self.block)

    def _rounder(self, weight: Tensor, prepared: Prepared) -> Callable[[Grid], Tensor]:
        """The integer step: codes for a grid, by error feedback."""
        if self.rounding == "gptq":
            return lambda grid: self._feedback(weight, grid, prepared)
        systems = BoxSystems.of(prepared, self.block)
        return lambda grid: box_feedback(weight, ColumnGrid.of(grid, weight.shape), prepared, systems, self.block)

    def _allowed(self, grid: Grid) -> Grid:
        """`grid`, its offsets moved to the nearest multiple of their scale if the options ask for it."""
        if not self.integer_zero or grid.offset is None:
            return grid
        ratio = torch.where(grid.scale == 0, torch.zeros_like(grid.scale), grid.offset / grid.scale)
        moved = stored_offset((ratio + 0.5).floor() * grid.scale, grid.fmt)
        return Grid(grid.fmt, grid.scale, grid.zero, torch.where(grid.scale == 0, grid.offset, moved))

    def _fitted(self, best: Incumbent) -> Grid:
        return self._allowed(fitted(best.weight, best.grid, best.codes, best.hessian))

    def _searched(self, weight: Tensor, fmt: Format, prepared: Prepared) -> Grid:
        """The grid that GPTQ starts from. Errors count by the square root of their column's share in the loss: feedback
        moves errors between columns, so the full share overstates the differences (and none at all, understates)."""
        importance = prepared.damped.diagonal().masked_fill(prepared.dead, 1e-6).sqrt()
        return self._allowed(search_grid(weight, fmt, importance, signed=True, shrinks=self.shrinks))

    def _anneal(self, best: Incumbent, prepared: Prepared) -> None:
        """Rounds of coordinate descent and closed forms: a noisy walk that cools down, then descent from the best."""
        order = prepared.order
        grid, codes = best.grid, best.codes
        random = torch.Generator().manual_seed(_SEED)
        hot = self.rounds - 1 if self.temperature > 0 else 0
        for index in range(self.rounds):
            if index == hot:
                grid, codes = best.grid, best.codes
            jitter = None
            if index < hot:
                size = (best.losses(grid, codes) / codes.shape[1]).sqrt().float()
                jitter = _jitter(size * self.temperature * (1 - index / hot) ** 0.5, random)
            codes = coordinate_sweeps(best.weight, grid, codes, best.hessian, order, self.block, self.sweeps, jitter)
            grid = self._allowed(fitted(best.weight, grid, codes, best.hessian))
            best.offer(grid, codes)


def _jitter(size: Tensor, random: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Normal noise [B, N] for gradients: `size` [N], in units of the loss's square root, times curvature's root."""
    return lambda curvature: torch.randn(len(curvature), len(size), generator=random).mul_(size).mul_(curvature)
