"""Scales and biases of rows that lower the objective for fixed indices and books: least squares, two unknowns a row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.quantizers.methods.vptq.layout import Norm
from lowbit.quantizers.methods.vptq.problem import Problem, Solution

__all__ = ["fit_row_norm"]


@dataclass(frozen=True, eq=False)
class _Rows:
    """Products under H of every row w of the weight, q of its decoded values and 1: float64 [N].

    own: q H q; cross: q H 1; flat: 1 H 1, one number; along: q H w; level: 1 H w.
    """

    own: Tensor
    cross: Tensor
    flat: Tensor
    along: Tensor
    level: Tensor

    @classmethod
    def of(cls, hessian: Tensor, value: Tensor, weight: Tensor) -> _Rows:
        """From float64 matrices [K, K] and [K, N]."""
        pulled, ones = hessian @ value, hessian.sum(1)
        products = (value * pulled).sum(0), value.T @ ones, ones.sum(), (pulled * weight).sum(0), weight.T @ ones
        return cls(*products)

    def best(self) -> tuple[Tensor, Tensor]:
        """Scale s and bias b that minimise (s q + b - w) H (s q + b - w); not finite where q is constant."""
        size = self.own * self.flat - self.cross.square()
        scale = (self.along * self.flat - self.cross * self.level) / size
        return scale, (self.own * self.level - self.cross * self.along) / size

    def cost(self, s: Tensor, b: Tensor) -> Tensor:
        """That objective, less what it is for s = b = 0."""
        return s * s * self.own + 2 * s * b * self.cross + b * b * self.flat - 2 * (s * self.along + b * self.level)


def fit_row_norm(problem: Problem, solution: Solution, norm: Norm) -> tuple[Problem, Norm]:
    """The problem under new norms of rows, as stored, and these; a row keeps its norm unless the new one is better."""
    n, (scale, bias) = len(norm.scale), (norm.scale.double(), norm.bias.double())
    weight = problem.target[:, :n].double() * scale + bias
    value = solution.decode(*problem.target.shape)[:, :n].double()
    rows = _Rows.of(problem.hessian.double(), value, weight)
    new_scale, new_bias = (x.to(norm.scale.dtype) for x in rows.best())
    better = rows.cost(new_scale.double(), new_bias.double()) < rows.cost(scale, bias)
    better &= (new_scale > 0) & new_scale.isfinite() & new_bias.isfinite()
    fitted = Norm(torch.where(better, new_scale, norm.scale), torch.where(better, new_bias, norm.bias), norm.axis)
    return _renormed(problem, weight, scale, fitted), fitted


def _renormed(problem: Problem, weight: Tensor, before: Tensor, norm: Norm) -> Problem:
    """The problem for float64 weights [K, N] under another norm of rows; every row counts as much as it did."""
    assert problem.rows is not None
    n, scale = len(before), norm.scale.double()
    target, rows = problem.target.clone(), problem.rows.clone()
    target[:, :n] = ((weight - norm.bias.double()) / scale).float()
    rows[:n] *= (scale / before).square().float()
    return replace(problem, target=target, rows=rows)
