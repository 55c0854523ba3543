"""From a weight and its format to the problem VPTQ solves, and from its solution back to a stored matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quantizers.factor import Prepared
from lowbit.quantizers.formats import VectorFormat
from lowbit.quantizers.methods.vptq.problem import Part, Problem, Solution
from lowbit.quantizers.vqtensor import VQTensor, book_tensors

__all__ = ["Norm", "make_norm", "make_parts", "make_problem", "to_vqtensor"]

_DEAD = 1e-6  # what an input that was always zero counts, next to the mean of one


@dataclass(frozen=True, eq=False)
class Norm:
    """weight = scale * vector-quantized value + bias, with scale and bias (as stored) along `axis`: 1 for input
    columns, 0 for output rows."""

    scale: Tensor
    bias: Tensor
    axis: int

    def apply(self, weight: Tensor) -> Tensor:
        """The matrix [N, K] to be vector-quantized."""
        scale, bias = (x.float().unsqueeze(1 - self.axis) for x in (self.scale, self.bias))
        return (weight - bias) / scale


def make_norm(weight: Tensor, fmt: VectorFormat) -> Norm | None:
    """Mean and standard deviation of every column or row, rounded to the format's type; None without a norm."""
    if fmt.norm == "none":
        return None
    axis = 1 if fmt.norm == "col" else 0
    bias = weight.mean(1 - axis)
    scale = (weight - bias.unsqueeze(1 - axis)).square().mean(1 - axis).sqrt()
    stored = scale.to(fmt.scale_dtype)
    usable = (stored > 0) & stored.isfinite()
    return Norm(torch.where(usable, stored, torch.ones_like(stored)), bias.to(fmt.scale_dtype), axis)


def make_parts(fmt: VectorFormat, n: int, k: int) -> tuple[Part, ...]:
    """The parts of an [n, k] matrix in stored order, still without books: outliers first, then group after group."""
    outliers, size = fmt.partition(k)
    parts = []
    if fmt.outliers is not None:
        parts.append(Part(0, outliers, fmt.outliers.dim, math.ceil(n / fmt.outliers.dim), ()))
    for start in range(outliers, k, size):
        parts.append(Part(start, start + size, fmt.dim, fmt.vectors(n), (), fmt.axis))
    return tuple(parts)


def make_problem(weight: Tensor, fmt: VectorFormat, norm: Norm | None, prepared: Prepared | None) -> Problem:
    """The problem in the order of `prepared` (the natural one without it, where every column counts the same).

    With W = S Q + b per column the objective's Hessian in terms of Q is S H S, whose inverse has the factor U S^-1;
    with scales per row each row counts with the square of its scale.
    """
    n, k = weight.shape
    dims = () if fmt.axis == "in" else (fmt.dim, fmt.outliers.dim if fmt.outliers else 1)
    length = max((math.ceil(n / d) * d for d in dims), default=n)
    order = torch.arange(k) if prepared is None else prepared.order
    hessian = torch.eye(k) if prepared is None else prepared.damped[order][:, order]
    upper = torch.eye(k) if prepared is None else prepared.upper.clone()
    if prepared is not None and bool(prepared.dead.any()):
        dead = prepared.dead[order]
        hessian.diagonal()[dead] = _DEAD
        upper.diagonal()[dead] = _DEAD**-0.5
    rows = None if length == n else (torch.arange(length) < n).float()
    if norm is not None:
        weight, scale = norm.apply(weight), norm.scale.float()
        if norm.axis == 1:
            hessian = hessian * scale[order][:, None] * scale[order]
            upper = upper / scale[order]
        else:
            rows = torch.nn.functional.pad(scale.square() / scale.square().mean(), (0, length - n))
    target = torch.zeros(k, length)
    target[:, :n] = weight.T[order]
    return Problem(target, hessian.contiguous(), upper, rows)


def to_vqtensor(solution: Solution, fmt: VectorFormat, order: Tensor, n: int, norm: Norm | None) -> VQTensor:
    """The stored form of a solution whose columns are in `order`."""
    outliers = solution.indices[0] if fmt.outliers else None
    first = 1 if fmt.outliers else 0
    main, books = solution.indices[first:], [p.books for p in solution.parts[first:]]
    perm = order if fmt.ordered else None
    places = order[:: fmt.dim] // fmt.dim if fmt.axis == "in" else order

    def index(stage: int) -> Tensor:
        stacked = torch.cat([i[stage] for i in main])
        if perm is None:
            natural = torch.empty_like(stacked)
            natural[places] = stacked
            stacked = natural
        return stacked.T.contiguous().to(torch.int32)

    found = {"centroids": torch.stack([b[0] for b in books])}
    if fmt.residual:
        found["residual_centroids"] = torch.stack([b[1] for b in books])
    if outliers:
        found["outlier_centroids"] = solution.parts[0].books[0]
    return VQTensor(
        fmt,
        n,
        len(order),
        index(0),
        residual=index(1) if fmt.residual else None,
        outlier_indices=outliers[0].T.contiguous().to(torch.int32) if outliers else None,
        perm=perm,
        norm_scale=norm.scale if norm else None,
        norm_bias=norm.bias if norm else None,
        **book_tensors(fmt, found),
    )
