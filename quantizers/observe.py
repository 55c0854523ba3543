"""What the inputs of linear layers look like, channel by channel: the ground for smoothing and permuting.

Kept per site (one tensor, several readers): the largest magnitude and the mean square of every channel over all
calibration tokens, and a few hundred of the tokens themselves, evenly spaced, on which choices can be tried. Where a
method will make up for the error of each column in the columns that follow, what is left of it can be kept as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType

import torch
from torch import Tensor, nn

from lowbit.compiler.errors import RunError
from lowbit.quantizers.calibration import HessianAccumulator, hook_inputs
from lowbit.quantizers.factor import prepare

__all__ = ["DAMPING", "SAMPLE_ROWS", "SiteObserver", "SiteStats"]

SAMPLE_ROWS = 256
"""Tokens that are kept of every site."""
DAMPING = 0.01
"""Share of the mean diagonal that costs are computed with: what `Gptq` damps with by default."""


@dataclass(frozen=True, eq=False)
class SiteStats:
    """absmax [K]: largest magnitude of every channel. moment [K]: mean square. rows [r, K]: some tokens. tokens: seen.
    cost [K]: what a squared error of one in a column of weights costs after others have made up for it, per token; None
    where that was not asked for.

    All float32.
    """

    absmax: Tensor
    moment: Tensor
    rows: Tensor
    tokens: int
    cost: Tensor | None = None

    def gathered(self, order: Tensor) -> SiteStats:
        """The same with channels in another order."""
        cost = self.cost[order] if self.cost is not None else None
        return replace(self, absmax=self.absmax[order], moment=self.moment[order], rows=self.rows[:, order], cost=cost)


@dataclass
class _Running:
    absmax: Tensor
    squares: Tensor
    products: HessianAccumulator | None
    rows: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def add(self, x: Tensor, stride: int) -> None:
        torch.maximum(self.absmax, x.abs().amax(0), out=self.absmax)
        self.squares += x.double().square().sum(0)
        first = -self.tokens % stride
        self.rows.append(x[first::stride].clone())
        if self.products is not None:
            self.products.add(x)
        self.tokens += x.shape[0]

    def stats(self) -> SiteStats:
        moment = (self.squares / max(self.tokens, 1)).float()
        return SiteStats(self.absmax, moment, torch.cat(self.rows), self.tokens, self._cost())

    def _cost(self) -> Tensor | None:
        prepared = prepare(self.products.stats(), DAMPING, act_order=True) if self.products is not None else None
        if prepared is None:
            return None
        mean = float(self.squares.mean()) / max(self.tokens, 1)
        return prepared.costs().masked_fill(prepared.dead, 0.0) * mean


class SiteObserver:
    """A context manager around forward passes: `with observer: block(x)`.

    modules: one reader of every site, by the site's name. tokens: how many will come, which spaces the sample. costs:
    keep those too, which takes a matrix [K, K] in float64 per site until `stats`. Raises RunError (LB0510) when an
    input is not finite.
    """

    def __init__(self, modules: Mapping[str, nn.Module], tokens: int, costs: bool = False) -> None:
        self._modules, self._stride, self._costs = modules, max(1, tokens // SAMPLE_ROWS), costs
        self._running: dict[str, _Running] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> SiteObserver:
        self._hooks = hook_inputs(self._modules, self._saw)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._hooks.close()

    def _saw(self, name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not bool(rows.isfinite().all()):
            raise RunError(
                "LB0510",
                "activations are not finite during calibration",
                where=name,
                hint="check the model in float32 on the same text",
            )
        if name not in self._running:
            k = rows.shape[-1]
            products = HessianAccumulator(k) if self._costs else None
            self._running[name] = _Running(torch.zeros(k), torch.zeros(k, dtype=torch.float64), products)
        self._running[name].add(rows, self._stride)

    def stats(self) -> dict[str, SiteStats]:
        """What was seen, by site; sites no token reached are missing."""
        return {name: running.stats() for name, running in self._running.items()}
