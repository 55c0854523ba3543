"""Activation-aware scaling: channels that carry large inputs get a larger share of the codes.

Column j of every reader of a site is multiplied by s_j = A_j^alpha / V_j^(1 - alpha), and channel j of the site is
divided by it. A_j is the root of what a squared error of one in column j costs: where the method rounds to nearest, the
root mean square of the calibrated inputs. V_j is the mean of the weights' magnitudes, each over the largest of its row.
A column that is multiplied by more is rounded finer, at the cost of those it shares scales with, so alpha is tried from
0 to 1 per site, s = 1 among them, and the one with the smallest error of layers rounded to nearest wins ("AWQ:
Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", Lin et al., who take the mean
magnitude of inputs for A). A method that makes up for the error of a column in those that follow leaves little of it
where inputs go together: there A and the error are those that are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.sites import Norm, Site, Values
from lowbit.quantizers.formats import Format
from lowbit.quantizers.observe import SiteStats
from lowbit.quantizers.rewrites.base import Decisions, Outcome, Rewrite, Scene
from lowbit.quantizers.rewrites.scaling import cannot_scale, divide, least_error, over_heads, readers_of

__all__ = ["Awq"]

_FLOOR = 1e-8
_ROWS = 512
"""Rows of a reader that are rounded in the search; the rest of a large matrix would say the same."""
_STEPS = 64
"""Steps of factors in an octave."""


@dataclass(frozen=True)
class Awq(Rewrite):
    """grid: how many alphas are tried. outputs: scale the inputs of down and o projections too, not only what norms
    give."""

    grid: int = 20
    outputs: bool = True

    name: ClassVar[str] = "awq"
    serves_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise FormatError("LB0245", "awq tries one alpha or more", hint="write awq{grid=20}")

    def decide(self, scene: Scene) -> Decisions:
        """float32 [K] by site: what channels are divided by."""
        found: Decisions = {}
        for site in scene.quantized_sites():
            stats = scene.stats.get(site.name)
            if stats is not None and not self._problem(scene, site):
                found[site.name] = self._search(scene, site, stats)
        return found

    def outcome(self, scene: Scene, decided: Decisions) -> Outcome:
        result = Outcome()
        for site in scene.quantized_sites():
            if site.name in decided:
                divide(scene.structure, site, decided[site.name].double(), result.edits)
            elif self.outputs or isinstance(site.producer, Norm):
                why = self._problem(scene, site) or "calibration did not reach it"
                result.declined.append(f"{site.name} is not scaled: {why}")
        return result

    def _problem(self, scene: Scene, site: Site) -> str:
        """Why a site cannot be scaled, or an empty text."""
        if problem := cannot_scale(scene.structure, site):
            return problem
        if not self.outputs and not isinstance(site.producer, Norm):
            return "only the inputs behind norms are"
        if any(path in scene.online for path in site.consumers):
            return "it is rotated when the model runs"
        formats = [fmt for p in site.consumers if (fmt := scene.weight(p)) is not None]
        slow = next((fmt for fmt in formats if not isinstance(fmt, Format) or fmt.element.window > 1), None)
        return f"weights in {slow} cannot be rounded one by one, to try factors" if slow is not None else ""

    def _search(self, scene: Scene, site: Site, stats: SiteStats) -> Tensor:
        readers = readers_of(scene, site, _ROWS)
        large = [reader.weight.abs() for reader in readers]
        v = torch.cat([w / w.amax(1, keepdim=True).clamp(min=_FLOOR) for w in large]).mean(0).double()
        a = (stats.moment if stats.cost is None else stats.cost).double().sqrt()
        if isinstance(site.producer, Values):
            a, v = (over_heads(t, site.producer) for t in (a, v))
        tried = [torch.ones_like(stats.moment)]
        for step in range(1, self.grid):
            tried.append(_factors(a, v, step / self.grid))
        return least_error(stats, readers, tried)


def _factors(a: Tensor, v: Tensor, alpha: float) -> Tensor:
    """float32 [K], as many octaves above one as below; one for channels that are always zero.

    In steps of 1/64 octave, so that the order in which inputs were added up is not seen in every weight.
    """
    seen = (a > 0) & (v > 0)
    s = alpha * a.clamp(min=_FLOOR).log2() - (1 - alpha) * v.clamp(min=_FLOOR).log2()
    s = s - (s[seen].max() + s[seen].min()) / 2 if bool(seen.any()) else s
    return torch.where(seen, torch.exp2((s * _STEPS).round() / _STEPS), torch.ones_like(s)).float()
