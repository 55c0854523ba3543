"""Choosing the codes of trellises: the cheapest path through a row's states, and error feedback between parts of it.

A code decides on its column's value and on what the next columns' values can be, so codes are chosen by the Viterbi
algorithm: of all paths that end in one state only the cheapest is kept. Columns are decided a few at a time, with a
look at some that follow; what they leave is made up for by later columns, as in block LDLQ ("QTIP: Quantization with
Trellises and Incoherence Processing", Tseng et al.).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.quantizers.factor import Prepared
from lowbit.quantizers.formats import Element, Format
from lowbit.quantizers.formats.trellis import state_of
from lowbit.quantizers.methods.fit import refit_scales
from lowbit.quantizers.methods.grid import Grid
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.scales import stored_scale

__all__ = ["Paths", "cheapest_paths", "feedback_trellis", "round_trellis", "use_search", "value_table"]

Paths = Callable[[Element, Tensor, Tensor, Tensor], Tensor]
"""(element, targets float32 [N, T], importance of their squared errors [N, T], the registers before them int32 [N])
-> uint8 codes [N, T] of the cheapest path. A register has the last `window` codes of a row, the last one highest."""

_ROWS = 16  # paths of so many rows and 4096 states stay in the second-level cache
_STRETCH, _AHEAD = 96, 32
_DECIDED, _SEEN = 32, 32
_NOISE = {1: 0.29, 2: 0.075, 3: 0.0195, 4: 0.005}
_REACH = {1: 0.6, 2: 1.5, 3: 2.0, 4: 2.35}
"""By bits: the squared error of normal numbers, of which size 1 is the root mean square, and how far from 0 it stays
that: what lies further out is missed by as much more. Of normal numbers and of such with heavy tails, scales of the
lowest sum of both are within a few percent of the best of a dozen that were tried."""
_SPREADS = torch.linspace(0.8, 2.0, 13)


@cache
def value_table(element: Element) -> Tensor:
    """float32 [2**state_bits]: the value of every register."""
    bits, window = element.bits, element.window
    registers = torch.arange(2**element.state_bits)
    states = torch.zeros_like(registers)
    for back in range(window):
        states |= state_of(registers >> bits * (window - 1 - back) & 2**bits - 1, bits, back)
    return element.levels()[states]


def cheapest_paths(element: Element, target: Tensor, importance: Tensor, register: Tensor) -> Tensor:
    """`Paths` by torch, on the device of its arguments."""
    step = _ROWS if target.device.type == "cpu" else 4096
    parts = zip(target.split(step), importance.split(step), register.split(step), strict=True)
    return torch.cat([_paths(element, *part) for part in parts])


def _paths(element: Element, target: Tensor, importance: Tensor, register: Tensor) -> Tensor:
    n, columns = target.shape
    q, states = 2**element.bits, 2**element.state_bits
    values = value_table(element).to(target.device)[:, None]
    costs = torch.full((columns + 1, states, n), torch.inf, device=target.device)
    costs[0].scatter_(0, register[None].long(), 0.0)
    for t in range(columns):
        before = costs[t].view(states // q, q, n)
        least = torch.minimum(before[:, 0], before[:, 1])
        for code in range(2, q):
            torch.minimum(least, before[:, code], out=least)
        branch = (values - target[:, t]).square_().mul_(importance[:, t])
        torch.add(branch.view(q, states // q, n), least, out=costs[t + 1].view(q, states // q, n))
    found, rows = costs[columns].argmin(0), torch.arange(n, device=target.device)
    codes = torch.empty(n, columns, dtype=torch.uint8, device=target.device)
    for t in range(columns - 1, -1, -1):
        codes[:, t] = found // (states // q)
        first = found % (states // q)
        found = first * q + costs[t].view(states // q, q, n)[first, :, rows].argmin(1)
    return codes


_search: list[Paths] = [cheapest_paths]


def use_search(search: Paths) -> None:
    """Have paths searched by `search`, a faster one, in this process."""
    _search[0] = search


@dataclass(eq=False)
class _Rows:
    """Rows [N, K] on their way to codes. scale: [N, groups]."""

    fmt: Format
    scale: Tensor
    codes: Tensor
    register: Tensor

    @staticmethod
    def of(fmt: Format, scale: Tensor, shape: torch.Size) -> _Rows:
        n, _ = shape
        return _Rows(fmt, scale, torch.empty(shape, dtype=torch.uint8), torch.zeros(n, dtype=torch.int32))

    def wide(self, columns: slice) -> Tensor:
        """The scales of some columns."""
        size = self.fmt.granularity.group_size(self.codes.shape[1])
        return self.scale[:, torch.arange(columns.start, columns.stop) // size].expand(len(self.codes), -1)

    def decide(self, target: Tensor, importance: Tensor, start: int, count: int) -> Tensor:
        """Codes of `count` columns from `start` on, of target [N, T] and importance [N, T], T at least as large;
        returns their values [N, count]."""
        element, columns = self.fmt.element, target.shape[1]
        scale = self.wide(slice(start, start + columns))
        safe = torch.where(scale == 0, 1.0, scale)
        found = _search[0](element, target / safe, importance * safe.square(), self.register)[:, :count]
        self.codes[:, start : start + count] = found
        values = torch.empty(len(target), count)
        for t in range(count):
            newest = found[:, t].to(torch.int32) << (element.state_bits - element.bits)
            self.register = (self.register >> element.bits) | newest
            values[:, t] = value_table(element)[self.register.long()]
        return values * scale[:, :count]


def _first_scales(weight: Tensor, fmt: Format) -> Tensor:
    """float32 [rows, groups], as they are stored: of some multiples of a group's root mean square that of the lowest
    error to be expected."""
    n, k = weight.shape
    size, groups, bits = fmt.granularity.group_size(k), fmt.granularity.groups(k), fmt.bits
    rows = torch.nn.functional.pad(weight, (0, groups * size - k)).view(n, groups, size)
    count = torch.nn.functional.pad(torch.ones(k), (0, groups * size - k)).view(groups, size).sum(-1)
    if fmt.granularity.kind == "t":
        rows, count = rows.reshape(1, 1, -1), count * n
    rms = (rows.square().sum(-1) / count).sqrt()
    best, least = rms, torch.full_like(rms, torch.inf)
    for spread in _SPREADS:
        missed = (rows.abs() - _REACH[bits] * spread * rms[..., None]).clamp_(min=0).square_().sum(-1) / count
        error = _NOISE[bits] * (spread * rms).square() + missed
        best, least = torch.where(error < least, spread * rms, best), torch.minimum(error, least)
    return stored_scale(best / float(fmt.element.levels().square().mean().sqrt()), fmt)


def round_trellis(weight: Tensor, fmt: Format) -> QTensor:
    """A weight float32 [N, K]: the paths of the lowest squared error for scales from the weights' sizes, then the best
    scales for them."""
    k = weight.shape[1]
    rows = _Rows.of(fmt, _first_scales(weight, fmt), weight.shape)
    ones = torch.ones(k).expand(weight.shape)
    for start in range(0, k, _STRETCH):
        seen = slice(start, min(start + _STRETCH + _AHEAD, k))
        rows.decide(weight[:, seen], ones[:, seen], start, min(_STRETCH, k - start))
    return refit_scales(weight, Grid(fmt, rows.scale, None), rows.codes, torch.eye(k)).qtensor(rows.codes)


def feedback_trellis(weight: Tensor, fmt: Format, prepared: Prepared, rounds: int) -> QTensor:
    """A weight float32 [N, K]: paths with error feedback under a Hessian whose columns are in their order, `rounds`
    times, each but the first with the scales that fit the paths found before."""
    upper = prepared.upper
    grid = Grid(fmt, _first_scales(weight, fmt), None)
    for _ in range(rounds):
        codes = _feedback(weight, fmt, grid.scale, upper)
        grid = refit_scales(weight, grid, codes, prepared.damped)
    return grid.qtensor(codes)


def _feedback(weight: Tensor, fmt: Format, scale: Tensor, upper: Tensor) -> Tensor:
    """uint8 codes [N, K], each few columns' errors spread over those that follow."""
    n, k = weight.shape
    left, rows = weight.clone(), _Rows.of(fmt, scale, weight.shape)
    cost = upper.diagonal().square().reciprocal()
    importance = (cost / cost.mean()).expand(n, -1)
    for start in range(0, k, _DECIDED):
        stop = min(start + _DECIDED, k)
        seen = slice(start, min(stop + _SEEN, k))
        values = rows.decide(left[:, seen], importance[:, seen], start, stop - start)
        errors = torch.linalg.solve_triangular(
            upper[start:stop, start:stop], left[:, start:stop] - values, upper=True, left=False
        )
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return rows.codes
