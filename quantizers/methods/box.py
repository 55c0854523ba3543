"""Error feedback that knows the range of its grid.

GPTQ moves each column's error to the columns that follow as if these could take any value, and is surprised at the end
of the range. Here the columns still open are kept at the minimum of the loss over the box of values that the grid can
reach: a convex problem, solved again at every few blocks of columns from where it stood. This is the relaxed integer
problem of "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and
Floating Points" (Guo et al.), which solves it by projected gradient descent. The method used here is that of
"Distributed Optimization and Statistical Learning via the Alternating Direction Method of Multipliers" (Boyd et al.):
a dozen matrix products instead of hundreds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quantizers.factor import Prepared
from lowbit.quantizers.methods.sweep import ColumnGrid, feedback

__all__ = ["BoxSystems", "box_feedback"]

_PENALTY = 0.15  # of the diagonal
_OVERSHOOT = 1.6  # over-relaxation
_FIRST, _AGAIN = 12, 6  # steps from nothing, and from a solution of nearly the same problem
_SYSTEMS = 8


@dataclass(frozen=True, eq=False)
class BoxSystems:
    """Linear systems of the relaxed problem, one per place in the order where it is solved again.

    hessian [K, K]: damped, in the order of the columns. inverses: by number of columns done, rho (H + rho D)^-1 D of
    the others, with D the diagonal of H and rho the penalty.
    """

    hessian: Tensor
    inverses: Mapping[int, Tensor]

    @staticmethod
    def of(prepared: Prepared, block: int) -> BoxSystems:
        """For a prepared Hessian; at most eight places, all at starts of blocks."""
        hessian = prepared.damped[prepared.order][:, prepared.order].contiguous()
        k = len(hessian)
        stride = block * -(-k // (block * _SYSTEMS))
        return BoxSystems(hessian, {start: _system(hessian[start:, start:]) for start in range(0, k, stride)})


def _system(hessian: Tensor) -> Tensor:
    exact = hessian.double()
    penalty = exact.diagonal() * _PENALTY
    factor = torch.linalg.cholesky(exact + torch.diag(penalty))
    return (torch.cholesky_inverse(factor) * penalty).float()


def box_feedback(weight: Tensor, columns: ColumnGrid, prepared: Prepared, systems: BoxSystems, block: int) -> Tensor:
    """Codes uint8 [N, K] like those of `feedback`, from columns that never leave the range of their group."""
    relaxation = _Relaxation(weight, columns, prepared, systems)
    return feedback(weight, columns, prepared.upper, prepared.order, block, relax=relaxation)


class _Relaxation:
    """The open columns [open, N] at the minimum over the box.

    free: where they would be without a box. dual: the solver's (scaled) multipliers, kept between solutions.
    """

    def __init__(self, weight: Tensor, columns: ColumnGrid, prepared: Prepared, systems: BoxSystems) -> None:
        self.upper, self.systems = prepared.upper, systems
        self.free = weight.T[prepared.order].contiguous()
        self.dual = torch.zeros_like(self.free)
        group = prepared.order // columns.size
        self.low, self.high = (end[group] for end in columns.ends())

    def __call__(self, start: int, stop: int, values: Tensor, open_: Tensor) -> Tensor:
        """After columns start .. stop got `values` [B, N]: the other columns, given where error feedback put them."""
        if stop > start:
            block = self.upper[start:stop, start:stop].T
            errors = torch.linalg.solve_triangular(block, self.free[start:stop] - values, upper=False)
            self.free[stop:].addmm_(self.upper[start:stop, stop:].T, errors, alpha=-1)
        inverse = self.systems.inverses.get(stop)
        if inverse is None:
            return open_
        free, low, high, dual = self.free[stop:], self.low[stop:], self.high[stop:], self.dual[stop:]
        inside = open_.clamp(low, high)
        for _ in range(_AGAIN if stop else _FIRST):
            moved = torch.addmm(free, inverse, inside - dual - free)
            dual += torch.lerp(inside, moved, _OVERSHOOT)
            inside = dual.clamp(low, high)
            dual -= inside
        return inside
