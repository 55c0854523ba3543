"""The closed-form fit of scales and offsets to fixed codes under a Hessian.

For fixed codes the loss of a row is a convex quadratic in its scales and offsets. With the levels (minus zero points)
of a row split by group into the columns of B [K, G], and E [K, G] marking the groups, the best scales s and offsets z
solve the normal equations [B E]^T H [B E] (s, z) = [B E]^T H w: the closed form of "decoupleQ: Towards 2-bit
Post-Training Uniform Quantization via decoupling Parameters into Integer and Floating Points" (Guo et al.).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.quantizers.methods.base import row_errors
from lowbit.quantizers.methods.grid import Grid, stored_offset, stored_scale

__all__ = ["best_sides", "choose_rows", "fitted", "refit_scales"]

_ROW_BYTES = 1 << 26
_RIDGE = 1e-9


def refit_scales(weight: Tensor, grid: Grid, codes: Tensor, hessian: Tensor) -> Grid:
    """Scales and offsets that minimise the loss for fixed codes.

    They are taken row by row (all or none, where all rows share them) if they lower the loss after rounding to the
    stored type.
    """
    candidate = fitted(weight, grid, codes, hessian)
    before, after = (row_errors(g.qtensor(codes).dequantize() - weight, hessian) for g in (grid, candidate))
    if grid.fmt.granularity.kind == "t":
        before, after = before.sum()[None], after.sum()[None]
    return choose_rows(after < before, candidate, grid)


def fitted(weight: Tensor, grid: Grid, codes: Tensor, hessian: Tensor) -> Grid:
    """The best scales and offsets for fixed codes, rounded to the stored type, improvement or not."""
    scale, offset = best_sides(weight, grid, codes, hessian)
    scale = torch.where(scale != 0, stored_scale(scale.float(), grid.fmt, grid.tensor), grid.scale)
    offset = None if offset is None else stored_offset(offset.float(), grid.fmt)
    return Grid(grid.fmt, scale, grid.zero, offset, grid.tensor)


def choose_rows(take: Tensor, first: Grid, second: Grid) -> Grid:
    """The rows of `first` where `take` [rows] is set, else those of `second`."""
    pick = take[:, None]
    zero = torch.where(pick, first.zero, second.zero) if first.zero is not None and second.zero is not None else None
    offset = None
    if first.offset is not None and second.offset is not None:
        offset = torch.where(pick, first.offset, second.offset)
    return Grid(first.fmt, torch.where(pick, first.scale, second.scale), zero, offset, first.tensor)


def best_sides(weight: Tensor, grid: Grid, codes: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets, float64 [rows, G] and not rounded, that minimise the loss for fixed codes.

    Directions that change nothing (groups whose levels are all zero, or all equal beside an offset) stay where `grid`
    has them, because the equations are solved for the change and carry a small ridge.
    """
    shared = grid.fmt.granularity.kind == "t"
    start = torch.cat([grid.scale] if grid.offset is None else [grid.scale, grid.offset], 1).double()
    changes, total = [], None
    for normal, right in _normal_equations(weight, grid, codes, hessian):
        if not shared:
            changes.append(_solve(normal, right))
            continue
        parts = (normal.sum(0, keepdim=True), right.sum(0, keepdim=True))
        total = parts if total is None else (total[0] + parts[0], total[1] + parts[1])
    found = start + (_solve(*total) if total is not None else torch.cat(changes))
    groups = grid.scale.shape[1]
    return found[:, :groups], found[:, groups:] if grid.offset is not None else None


def _normal_equations(weight: Tensor, grid: Grid, codes: Tensor, hessian: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Per chunk of rows [R]: float64 [R, P, P] and right side [R, P] of the change from `grid`; P is G or 2 G.

    Only a chunk's products with one group of columns of H exist at a time. A group of sums has a scale per term.
    """
    k = weight.shape[1]
    size, sides, joint = grid.fmt.granularity.group_size(k), grid.scale.shape[1], grid.offset is not None
    terms, q = grid.fmt.terms, grid.qtensor(codes)
    blocks = [slice(start, start + size) for start in range(0, k, size)]
    sums = torch.cat([_group_sums(part.double(), size) for part in hessian.split(size)])  # H E, [K, G]
    element, zero = grid.fmt.element, grid.column(k)[1]
    missing = weight - q.dequantize()
    count = sides * (2 if joint else 1)
    step = max(1, _ROW_BYTES // (8 * ((3 + terms) * k + count * count)))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        levels, left = [element.values(q.term(i)[rows]).double() for i in range(terms)], missing[rows].double()
        if zero is not None:
            levels[0] -= zero[slice(None) if len(zero) == 1 else rows]
        normal, right = left.new_empty(len(left), count, count), left.new_empty(len(left), count)
        for g, cols in enumerate(blocks):
            block, first = hessian[cols].double(), g * terms
            pulled = left @ block.T
            for i, mine in enumerate(levels):
                here = mine[:, cols] @ block[:, cols.start :]
                for j, other in enumerate(levels):
                    products = _group_sums(here * other[:, cols.start :], size)
                    normal[:, first + i, first + j : sides : terms] = products
                    normal[:, first + j : sides : terms, first + i] = products
                right[:, first + i] = (pulled * mine[:, cols]).sum(1)
            if joint:
                normal[:, g, sides:] = normal[:, sides:, g] = levels[0][:, cols] @ sums[cols]
                normal[:, sides + g, sides:] = sums[cols].sum(0)
                right[:, sides + g] = pulled.sum(1)
        yield normal, right


def _group_sums(x: Tensor, size: int) -> Tensor:
    """Sums of every `size` neighbours along the last axis; the last group may be shorter."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return padded.reshape(*x.shape[:-1], -1, size).sum(-1)


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """Solutions [R, P] of symmetric systems with a relative ridge; unknowns that matter to nothing get zero."""
    size = normal.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    unit = torch.where(size > 0, 1 / size, torch.zeros_like(size))
    scaled = normal * unit[:, :, None] * unit[:, None, :]
    scaled = (scaled + scaled.mT) / 2
    scaled.diagonal(dim1=1, dim2=2).add_(torch.where(size > 0, _RIDGE, 1.0))
    factor, info = torch.linalg.cholesky_ex(scaled)
    for attempt in range(1, 4):
        if not bool((info > 0).any()):
            break
        bad = info > 0
        scaled[bad] += 10.0 ** (2 * attempt) * _RIDGE * torch.eye(size.shape[1], dtype=scaled.dtype)
        factor, info = torch.linalg.cholesky_ex(scaled)
    solved = torch.cholesky_solve((right * unit)[..., None], factor)[..., 0] * unit
    good = (info == 0)[:, None] & solved.isfinite().all(1, keepdim=True)
    return torch.where(good, solved, torch.zeros_like(solved))
