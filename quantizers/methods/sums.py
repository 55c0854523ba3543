"""Binary coding: scales of weights that are sums of signs, and rounding to the nearest of these sums.

Scales and signs are found in turns, as in "Alternating Multi-bit Quantization for Recurrent Neural Networks" (Xu et
al.): scales by least squares for fixed signs, and signs for fixed scales. They start as that paper's, greedily, each
for what the ones before leave, and once more as a uniform grid, which from three signs on ends up better (of Gaussian
weights in groups of 128 by 0.15 dB with three signs and 0.6 with four). Every scale counts as it will be stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.quantizers.formats import Format
from lowbit.quantizers.scales import stored_scale

__all__ = ["SumTable", "search_sums"]

_ROUNDS = 15
_RIDGE = 1e-6
_REACH = 0.75  # of the largest magnitude: where a uniform grid starts


@cache
def _signs(terms: int) -> Tensor:
    """float32 [2**terms, terms]: the signs that every code stands for."""
    codes = torch.arange(2**terms)[:, None]
    return ((codes >> torch.arange(terms)) & 1) * 2.0 - 1.0


@dataclass(frozen=True, eq=False)
class SumTable:
    """The 2**terms numbers of every group, in ascending order: values and codes [..., 2**terms]."""

    values: Tensor
    codes: Tensor

    @staticmethod
    def of(scale: Tensor) -> SumTable:
        """Of scales [..., terms]."""
        values, codes = (scale @ _signs(scale.shape[-1]).T).sort(dim=-1, stable=True)
        return SumTable(values, codes)

    @property
    def edges(self) -> Tensor:
        """[..., 2**terms - 1]: halfway from each number to the next."""
        return (self.values[..., 1:] + self.values[..., :-1]) / 2

    def nearest(self, x: Tensor) -> Tensor:
        """uint8 [..., E]: codes of the numbers nearest to x [..., E]; of two as near the lower one."""
        rank = torch.zeros(x.shape, dtype=torch.int64)
        for edge in self.edges.unbind(-1):
            rank += x > edge[..., None]
        return self.codes.gather(-1, rank).to(torch.uint8)


def search_sums(weight: Tensor, importance: Tensor | None, fmt: Format) -> Tensor:
    """Stored scales [R, G, terms], largest first, that lower the squared error of units [R, G, E].

    importance: what the square of each error counts, broadcast with `weight`.
    """
    units = _Units.of(weight, importance)
    best_scale, best = torch.zeros(*weight.shape[:2], fmt.terms), torch.full(weight.shape[:2], torch.inf)
    for start in (_greedy, _uniform):
        scale, error = _alternate(units, fmt, start(weight, importance, fmt.terms).flatten(0, 1))
        scale, error = scale.view_as(best_scale), error.view_as(best)
        better = (error < best) | ~best.isfinite()
        best, best_scale = torch.where(better, error, best), torch.where(better[..., None], scale, best_scale)
    return best_scale


@dataclass(frozen=True, eq=False)
class _Units:
    """Units of weights in ascending order [U, E], and float64 sums [U, E + 1] of the importance of those before each
    place, alone and times the weight: what neighbours that get one code add up to is a difference of two sums.

    squares [U]: the sum of all weights' squares times importance.
    """

    weight: Tensor
    count: Tensor
    sums: Tensor
    squares: Tensor

    @staticmethod
    def of(weight: Tensor, importance: Tensor | None) -> _Units:
        """Of weights [R, G, E]."""
        ordered, place = weight.flatten(0, 1).sort(-1)
        if importance is None:
            count = torch.ones_like(ordered, dtype=torch.float64)
        else:
            count = importance.expand_as(weight).flatten(0, 1).gather(-1, place).double()
        products = count * ordered
        squares = (products * ordered).sum(-1)
        counts, sums = (torch.nn.functional.pad(x.cumsum(-1), (1, 0)) for x in (count, products))
        return _Units(ordered, counts, sums, squares)

    def parts(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Importance, and that times weights, of what lies below, between and above edges [U, V]: [U, V + 1] each."""
        place = torch.searchsorted(self.weight, edges.contiguous(), right=True)
        place = torch.nn.functional.pad(place, (1, 0))
        place = torch.nn.functional.pad(place, (0, 1), value=self.weight.shape[-1])
        return self.count.gather(-1, place).diff(dim=-1), self.sums.gather(-1, place).diff(dim=-1)


def _alternate(units: _Units, fmt: Format, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The best stored scales [U, terms] on the way from `scale`, and their errors [U]."""
    best_scale, best = torch.zeros_like(scale), torch.full(scale.shape[:1], torch.inf)
    for _ in range(_ROUNDS):
        scale = _stored(scale, fmt)
        table = SumTable.of(scale)
        count, sums = units.parts(table.edges)
        missing = sums - count * table.values
        error = (units.squares - ((sums + missing) * table.values).sum(-1)).clamp(min=0).float()
        better = (error < best) | ~error.isfinite()
        if not bool((error < best).any()):
            break
        best, best_scale = torch.where(better, error, best), torch.where(better[..., None], scale, best_scale)
        scale = scale + _least_squares(_signs(fmt.terms)[table.codes].double(), count, missing)
    return best_scale, best


def _least_squares(signs: Tensor, count: Tensor, missing: Tensor) -> Tensor:
    """float32 [U, terms]: changes of scales for the smallest squared error with fixed signs [U, V, terms] of so much
    importance [U, V], where so much is missing [U, V]; none where signs do not tell."""
    weighted = signs * count[..., None]
    normal, right = weighted.mT @ signs, (signs * missing[..., None]).sum(1)
    normal.diagonal(dim1=1, dim2=2).add_(count.sum(-1, keepdim=True).clamp(min=1e-30) * _RIDGE)
    terms = right.shape[-1]
    for i in range(terms):  # Gauss and Jordan, on all units at once
        for j in range(terms):
            if i != j:
                factor = normal[:, j, i] / normal[:, i, i]
                normal[:, j] -= factor[:, None] * normal[:, i]
                right[:, j] -= factor * right[:, i]
    change = right / normal.diagonal(dim1=1, dim2=2)
    return torch.where(change.isfinite(), change, 0.0).float()


def _uniform(weight: Tensor, importance: Tensor | None, terms: int) -> Tensor:
    unit = weight.abs().amax(-1, keepdim=True) * (_REACH / (2**terms - 1))
    return torch.ldexp(unit.expand(*unit.shape[:-1], terms), torch.arange(terms))


def _greedy(weight: Tensor, importance: Tensor | None, terms: int) -> Tensor:
    rest, scales = weight, []
    for _ in range(terms):
        size = rest.abs()
        mean = (
            size.mean(-1) if importance is None else (size * importance).sum(-1) / importance.sum(-1).clamp(min=1e-45)
        )
        scales.append(mean)
        rest = rest - torch.where(rest < 0, -1.0, 1.0) * mean[..., None]
    return torch.stack(scales, -1)


def _stored(scale: Tensor, fmt: Format) -> Tensor:
    """Scales as they are stored, positive and the largest first: signs are in the codes. Powers of two are the nearest
    ones by ratio."""
    scale = scale.abs().sort(dim=-1, descending=True).values
    if fmt.scale == "e8m0":
        scale = torch.exp2(torch.log2(scale.clamp(min=2.0**-126)).round())
    return stored_scale(scale, fmt)
