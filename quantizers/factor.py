"""Preparing a Hessian for GPTQ: cleaning, damping, and the factor of its inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quantizers.calibration import LayerStats

__all__ = ["Prepared", "factor_inverse", "prepare"]

_LADDER = 5  # the damping asked for, then times ten up to four times


@dataclass(frozen=True, eq=False)
class Prepared:
    """A Hessian ready for use, scaled to a mean diagonal of one.

    raw, damped [K, K] and upper (with upper^T upper = damped^-1, in the order of `order`) are float32: they were
    computed in float64. dead: bool [K]. notes: what did not go as usual.
    """

    raw: Tensor
    damped: Tensor
    upper: Tensor
    order: Tensor
    dead: Tensor
    notes: tuple[str, ...]

    def costs(self) -> Tensor:
        """float32 [K]: what a squared error of one in each column costs after the columns behind it in `order` have
        made up for it as well as they can."""
        cost = torch.empty(len(self.order))
        cost[self.order] = self.upper.diagonal().square().reciprocal()
        return cost


def prepare(stats: LayerStats, damping: float, act_order: bool, run: int = 1) -> Prepared | None:
    """A damped copy of the Hessian and the factor of its inverse; None when it holds no usable information.

    Kept with the statistics, so that sibling layers (q, k, v) and all methods factor a Hessian once. The copy is made
    symmetric and scaled to a mean diagonal of one; the caller's matrix is never written to. Dead columns (inputs that
    were always zero) are cut loose from the others, so that their weights are simply rounded. `order` sorts columns by
    importance when `act_order` is set; every `run` neighbouring columns stay together, sorted by the sum of theirs.
    """
    key = ("prepared", damping, act_order, run)
    if key not in stats.derived:
        stats.derived[key] = _prepare(stats, damping, act_order, run)
    found: Prepared | None = stats.derived[key]
    return found


def _prepare(stats: LayerStats, damping: float, act_order: bool, run: int) -> Prepared | None:
    hessian = stats.hessian.double()
    hessian = (hessian + hessian.T).div_(2)  # a new matrix, worked on in place from here on: these are large
    mean = hessian.diagonal().clamp(min=0).mean()
    if not bool(hessian.isfinite().all()) or not bool(mean > 0):
        return None
    raw = hessian.div_(mean).float()
    if not bool(raw.isfinite().all()):
        return None
    dead = hessian.diagonal() <= 0
    notes: tuple[str, ...] = ()
    if bool(dead.any()):
        notes = (f"{int(dead.sum())} input channels were always zero",)
        hessian[dead] = 0
        hessian[:, dead] = 0
    order = _by_importance(hessian.diagonal().masked_fill(dead, -1.0), run) if act_order else torch.arange(len(dead))
    hessian.diagonal()[dead] = 1.0
    damped, upper, note = _damped_factor(hessian, damping, order)
    return Prepared(raw, damped, upper, order, dead, (*notes, *note))


def _by_importance(importance: Tensor, run: int) -> Tensor:
    """int64 [K]: columns by falling importance, runs of neighbours by that of all of them."""
    runs = torch.argsort(importance.view(-1, run).sum(1), descending=True, stable=True)
    return (runs[:, None] * run + torch.arange(run)).flatten()


def _damped_factor(hessian: Tensor, damping: float, order: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Climb the ladder of dampings until a factor exists; the last rung is the diagonal alone. Changes `hessian`."""
    diagonal = hessian.diagonal().clone()
    for rung in range(_LADDER):
        amount = damping * 10**rung
        hessian.diagonal().copy_(diagonal + amount)
        upper = factor_inverse(hessian[order][:, order])
        if upper is not None:
            return hessian.float(), upper.float(), (f"damping raised to {amount:g}",) if rung else ()
    diagonal += damping
    note = "the Hessian has no factor; its diagonal was used"
    return torch.diag(diagonal).float(), torch.diag(diagonal[order].rsqrt()).float(), (note,)


def factor_inverse(hessian: Tensor) -> Tensor | None:
    """Upper U with U^T U = hessian^-1, or None when there is none in float64.

    One Cholesky factorisation of the matrix in reverse order gives H = R R^T with R upper; then U = R^-1. That is a
    third of the work of inverting H and factoring the inverse, and loses fewer digits.
    """
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info) != 0:
        return None
    upper = lower.flip(0, 1)
    inverse = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=torch.float64), upper=True)
    limit = torch.finfo(torch.float32).max
    usable = (
        bool(inverse.isfinite().all()) and bool((inverse.abs() < limit).all()) and bool((inverse.diagonal() > 0).all())
    )
    return inverse if usable else None
