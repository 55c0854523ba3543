"""FMPQ: four-bit activations with a few groups of eight bits, where the outliers are.

"COMET: Towards Practical W4A4KV4 LLMs Serving" (Liu et al.) cuts the (permuted) input channels of a layer into groups
and keeps those with outliers at 8 bits. It does not say how many. Here every layer gets the same share, or the model's
budget goes where the gain is largest: the squared error of a layer's output on sampled tokens, relative to the output.
That sum of local errors is not the model's loss: on SmolLM2-135M equal shares gave the lower perplexity. Weights are
GPTQ's, on permuted columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.compiler.errors import RunError
from lowbit.quantizers.formats import ActivationFormat, parse_activation
from lowbit.quantizers.methods.gptq import Gptq
from lowbit.quantizers.observe import SiteStats

__all__ = ["Fmpq", "group_gains", "wide_groups"]

_BUDGETS = ("equal", "greedy")


@dataclass(frozen=True)
class Fmpq(Gptq):
    """GPTQ's options, and share: of the input channels that keep 8 bits. budget: `equal` gives every layer the same
    share (rounded to whole groups, at least one), `greedy` divides that of the whole model so that it helps most.
    aware: calibrate the weights on rounded inputs."""

    share: float = 0.3
    budget: str = "equal"
    aware: bool = False

    name: ClassVar[str] = "fmpq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1 or self.budget not in _BUDGETS:
            raise RunError(
                "LB0503", "share must be between 0 and 1, and budget one of " + ", ".join(_BUDGETS), where="fmpq"
            )

    def widths(self, gains: Mapping[str, Tensor], formats: Mapping[str, ActivationFormat]) -> dict[str, int]:
        """Wide groups by site. gains: see `group_gains`."""
        if self.budget == "equal":
            return {name: max(int(self.share > 0), round(self.share * len(gain))) for name, gain in gains.items()}
        return wide_groups(gains, {name: formats[name].group for name in gains}, self.share)


def group_gains(stats: SiteStats, fmt: ActivationFormat, weights: Sequence[Tensor]) -> Tensor:
    """float64 [groups]: by how much the squared error of a site's outputs falls when a group gets 8 bits.

    stats: channels in the order in which they are rounded; weights: every reader's [N, K], columns in that order. The
    error counts relative to each token's output, because what follows normalises tokens: a few have outputs so large
    that nothing else would count. Errors of different groups are taken as independent.
    """
    narrow = replace(fmt, wide=0, static=False)
    wide = replace(parse_activation("int8.g1"), group=fmt.group, clip=fmt.clip)
    size = torch.stack([(stats.rows @ w.T).square().sum(1) for w in weights]).sum(0)
    share = size.clamp(min=1e-30).rsqrt()[:, None] / len(size) ** 0.5
    errors = [(f.apply(stats.rows) - stats.rows) * share for f in (narrow, wide)]
    gains = []
    for start in range(0, stats.rows.shape[1], fmt.group):
        part = slice(start, start + fmt.group)
        # |E W^T|^2 = <E^T E, W^T W>, and the second is small and the same for both widths.
        seen = sum(w[:, part].T @ w[:, part] for w in weights)
        four, eight = (float((e[:, part].T @ e[:, part] * seen).double().sum()) for e in errors)
        gains.append(four - eight)
    return torch.tensor(gains, dtype=torch.float64)


def wide_groups(gains: Mapping[str, Tensor], sizes: Mapping[str, int], share: float) -> dict[str, int]:
    """Wide groups by site, the leading ones, so that about `share` of all channels are in one: groups are added one at
    a time, where the mean gain per channel of what comes next is largest."""
    chosen = dict.fromkeys(gains, 0)
    total = sum(len(gain) * sizes[name] for name, gain in gains.items())
    left = share * total
    while True:
        offers = {name: _offer(gain[chosen[name] :], sizes[name]) for name, gain in gains.items()}
        name = max(offers, key=lambda n: offers[n], default=None)
        if name is None or offers[name] <= 0 or sizes[name] > left + 1e-9:
            return chosen
        chosen[name] += 1
        left -= sizes[name]


def _offer(gains: Tensor, size: int) -> float:
    """The best mean gain per channel of one or more groups in a row: a poor group may stand before a good one."""
    if len(gains) == 0:
        return 0.0
    return float((gains.cumsum(0) / torch.arange(1, len(gains) + 1)).max()) / size
