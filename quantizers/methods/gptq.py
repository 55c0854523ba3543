"""GPTQ: rounding column by column, each column's error made up for by the columns that follow.

After "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Frantar et al.), with three
additions that only ever lower the calibration loss and are accepted row by row when they do: scales re-fitted to the
codes under the full Hessian, cyclic coordinate descent over the codes, and a comparison with plain rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.compiler.errors import RunError
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.factor import Prepared, prepare
from lowbit.quantizers.formats import Format, WeightFormat
from lowbit.quantizers.methods.base import Quantized, check_finite, row_errors, scalar_only
from lowbit.quantizers.methods.fit import refit_scales
from lowbit.quantizers.methods.grid import Grid, search_grid
from lowbit.quantizers.methods.rtn import Rtn
from lowbit.quantizers.methods.sweep import ColumnGrid, descend, feedback
from lowbit.quantizers.methods.target import SecondOrder
from lowbit.quantizers.methods.trellis import feedback_trellis
from lowbit.quantizers.methods.two_level import two_level_grid, within_bytes
from lowbit.quantizers.qtensor import QTensor

__all__ = ["Gptq", "keep_better"]

_WORTH_A_NOTE = 0.1  # share of rows in which plain rounding won
_WEIGHTINGS = ("none", "diagonal", "conditional")


@dataclass(frozen=True)
class Gptq(SecondOrder):
    """GPTQ with static groups.

    damping: share of the mean diagonal added to the Hessian's diagonal. block: columns between two full updates.
    act_order: most important columns first. static_groups: scales chosen from the original weights; off, they are
    chosen from the weights as updated so far, which needs act_order off (scales of two levels stay what rounding to
    nearest has). clip_search: see `Rtn`. weighting: what a
    column's squared error counts in the choice of scales: nothing special (`none`), the Hessian's diagonal, or the
    error's cost after compensation (`conditional`, the inverse diagonal of H^-1's factor squared). refits: rounds of
    re-fitting scales and coordinate descent; sweeps: passes over the columns in each. signed_scale: see `Rtn`.
    asymmetric: see `SecondOrder`. Trellises keep the order of columns and choose scales in their own way: of these
    options `damping` and `asymmetric` hold for them, and `refits` as far as that 0 leaves the second search out.
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = True
    static_groups: bool = True
    clip_search: bool = True
    weighting: str = "diagonal"
    refits: int = 2
    sweeps: int = 1
    signed_scale: bool = True
    asymmetric: float | None = None

    name: ClassVar[str] = "gptq"
    usual: ClassVar[float] = 0.25

    @classmethod
    def effort(cls, fmt: WeightFormat) -> float:
        return 0.8 * fmt.terms if isinstance(fmt, Format) and fmt.terms > 1 else 1.0

    def __post_init__(self) -> None:
        self.check_calibration()
        if self.block < 1 or self.refits < 0 or self.sweeps < 0:
            raise RunError("LB0503", "block must be positive, refits and sweeps must not be negative", where="gptq")
        if self.weighting not in _WEIGHTINGS:
            raise RunError(
                "LB0503", f"unknown weighting {self.weighting!r}", where="gptq", hint=f"use {', '.join(_WEIGHTINGS)}"
            )
        if self.act_order and not self.static_groups:
            raise RunError(
                "LB0503",
                "activation order needs static groups: the format stores no permutation",
                where="gptq",
                hint="set act_order = false, or leave static_groups on",
            )

    def quantize(self, weight: Tensor, fmt: WeightFormat, stats: LayerStats | None) -> Quantized:
        check_finite(weight)
        fmt = scalar_only(fmt, self.name)
        fmt.check(weight.shape[0], weight.shape[1], "weight")
        if fmt.channel and not self.static_groups:
            raise RunError("LB0515", f"scales of {fmt} are chosen once, from the original weights", where=self.name)
        rtn = Rtn(self.clip_search, self.signed_scale)
        trellis = fmt.element.window > 1
        act_order = self.act_order and not trellis  # a path follows the columns as they are stored
        prepared = prepare(stats, self.damping, act_order) if stats is not None else None
        if prepared is None:
            plain = rtn.quantize(weight, fmt, None)
            why = "no calibration statistics" if stats is None else "the Hessian is zero or not finite"
            return Quantized(plain.qtensor, plain.proxy_error, plain.rtn_error, (f"{why}; rounded to nearest",))
        baseline = rtn.round(weight, fmt)
        if trellis:
            return keep_better(
                weight, feedback_trellis(weight, fmt, prepared, 1 + min(1, self.refits)), baseline, prepared
            )
        grid, codes = self._solve(weight, fmt, prepared)
        found = grid.qtensor(codes)
        return keep_better(weight, within_bytes(found) if fmt.channel else found, baseline, prepared)

    def _solve(self, weight: Tensor, fmt: Format, prepared: Prepared) -> tuple[Grid, Tensor]:
        """Grid and codes: the column loop, then refinement under the damped Hessian."""
        importance = self._importance(prepared)
        if fmt.channel:
            grid = two_level_grid(weight, fmt)
        else:
            grid = search_grid(weight, fmt, importance, clip=self.clip_search, signed=self.signed_scale)
        columns = ColumnGrid.of(grid, weight.shape)
        research = None if self.static_groups else self._researcher(fmt, importance, grid.tensor)
        codes = feedback(weight, columns, prepared.upper, prepared.order, self.block, research)
        grid = columns.grid()
        damped = prepared.damped
        for _ in range(self.refits):
            grid = grid if fmt.channel else refit_scales(weight, grid, codes, damped)
            codes = descend(weight, grid, codes, damped, prepared.order, self.block, self.sweeps)
        return grid, codes

    def _importance(self, prepared: Prepared) -> Tensor | None:
        if self.weighting == "none":
            return None
        if self.weighting == "diagonal":
            return prepared.damped.diagonal().masked_fill(prepared.dead, 1e-6)
        cost = prepared.costs()
        return cost / cost.mean()

    def _researcher(self, fmt: Format, importance: Tensor | None, tensor: Tensor | None) -> GroupSearch:
        return GroupSearch(fmt, importance, self.clip_search, self.signed_scale, tensor)


@dataclass(frozen=True, eq=False)
class GroupSearch:
    """Chooses the scale of one group of columns from their current weights."""

    fmt: Format
    importance: Tensor | None
    clip: bool
    signed: bool
    tensor: Tensor | None = None

    def __call__(self, weight: Tensor, start: int) -> Grid:
        """The grid of the group [N, g] whose first column is `start`."""
        stop = start + weight.shape[1]
        importance = self.importance[start:stop] if self.importance is not None else None
        return search_grid(weight, self.fmt, importance, clip=self.clip, signed=self.signed, tensor=self.tensor)


def keep_better(weight: Tensor, found: QTensor, baseline: QTensor, prepared: Prepared) -> Quantized:
    """Per row (per matrix when all rows share a scale), whichever of the two has the lower calibration loss."""
    hessian = prepared.raw
    size = float(row_errors(weight, hessian).sum())
    new, old = (row_errors(q.dequantize() - weight, hessian) for q in (found, baseline))
    if found.fmt.granularity.kind == "t":
        new, old = new.sum()[None], old.sum()[None]
    worse = ~(new <= old)
    notes = list(prepared.notes)
    if bool(worse.any()):
        if int(worse.sum()) > _WORTH_A_NOTE * len(worse):
            notes.append(f"rounding to nearest was better for {int(worse.sum())} of {len(worse)} rows")
        found = _mix(found, baseline, worse)
    kept = torch.where(worse, old, new)
    scale = 1 / size if size > 0 else 0.0
    return Quantized(found, float(kept.sum()) * scale, float(old.sum()) * scale, tuple(notes))


def _mix(first: QTensor, second: QTensor, take_second: Tensor) -> QTensor:
    pick = take_second[:, None]

    def mixed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return torch.where(pick, b, a) if a is not None and b is not None else None

    scale = torch.where(pick, second.scale, first.scale)
    zero, offset = mixed(first.zero, second.zero), mixed(first.offset, second.offset)
    codes, channel = torch.where(pick, second.codes, first.codes), mixed(first.channel_scale, second.channel_scale)
    return QTensor(first.fmt, codes, scale, zero, offset, first.tensor_scale, channel_scale=channel)
