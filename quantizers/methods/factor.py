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
    """A Hessian ready for use: raw and damped (float64 [K, K], mean diagonal 1), dead columns, and what happened."""

    raw: Tensor
    damped: Tensor
    upper: Tensor
    order: Tensor
    dead: Tensor
    notes: tuple[str, ...]


def prepare(stats: LayerStats, damping: float, act_order: bool) -> Prepared | None:
    """A damped copy of the Hessian and the factor of its inverse; None when it holds no usable information.

    The copy is made symmetric and scaled to a mean diagonal of one; the caller's matrix is never written to. Dead
    columns (inputs that were always zero) are cut loose from the others, so that their weights are simply rounded.
    `order` sorts columns by importance when `act_order` is set.
    """
    hessian = stats.hessian.double()
    hessian = (hessian + hessian.T) / 2
    diagonal = hessian.diagonal()
    mean = diagonal.clamp(min=0).mean()
    if not bool(hessian.isfinite().all()) or not bool(mean > 0):
        return None
    raw = hessian / mean
    if not bool(raw.isfinite().all()):
        return None
    dead = raw.diagonal() <= 0
    notes = [f"{int(dead.sum())} input channels were always zero"] if bool(dead.any()) else []
    live = raw.masked_fill(dead[:, None] | dead[None, :], 0.0)
    live.diagonal()[dead] = 1.0
    importance = raw.diagonal().masked_fill(dead, -1.0)
    order = torch.argsort(importance, descending=True, stable=True) if act_order else torch.arange(len(dead))
    damped, upper, note = _damped_factor(live, damping, order)
    return Prepared(raw, damped, upper, order, dead, (*notes, *note))


def _damped_factor(hessian: Tensor, damping: float, order: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Climb the ladder of dampings until a factor exists; the last rung is the diagonal alone."""
    identity = torch.eye(len(hessian), dtype=torch.float64)
    for rung in range(_LADDER):
        damped = hessian + damping * 10**rung * identity
        upper = factor_inverse(damped[order][:, order])
        if upper is not None:
            note = (f"damping raised to {damping * 10**rung:g}",) if rung else ()
            return damped, upper, note
    diagonal = hessian.diagonal() + damping
    damped = torch.diag(diagonal)
    return damped, torch.diag(diagonal[order].rsqrt()), ("the Hessian has no factor; its diagonal was used",)


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
