"""Smoothing: outliers move from the inputs of a layer into its weights.

Channel j of a site is divided by s_j = A_j^alpha / V_j^(1 - alpha), and column j of every reader multiplied by it,
where A_j is the largest calibrated input and V_j the largest weight ("SmoothQuant: Accurate and Efficient
Post-Training Quantization for Large Language Models", Xiao et al.). The division costs nothing: it goes into the norm
before the site, or (`outputs`) into the rows of the layer that makes it, as in "QServe: W4A8KV4 Quantization and
System Co-design for Efficient LLM Serving".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.sites import Norm, Site, Structure, Values
from lowbit.quantizers.formats import Format
from lowbit.quantizers.observe import SiteStats
from lowbit.quantizers.rewrites.base import Decisions, Outcome, Rewrite, Scene
from lowbit.quantizers.rewrites.scaling import cannot_scale, divide, least_error, over_heads, readers_of

__all__ = ["Smooth"]

_FLOOR = 1e-5
_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Smooth(Rewrite):
    """alpha: how far outliers move, from 0 (not at all) to 1. search: choose alpha per site by the error of the
    rounded layers on sampled tokens, `alpha` being the one that is used where nothing can be tried. outputs: smooth
    the inputs of down and o projections too, with this alpha (0: leave them). inputs: smooth what norms give."""

    alpha: float = 0.5
    search: bool = False
    outputs: float = 0.0
    inputs: bool = True

    name: ClassVar[str] = "smooth"

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and 0 <= self.outputs <= 1):
            raise FormatError("LB0245", "smooth takes alphas between 0 and 1", hint="write smooth{alpha=0.5}")

    def decide(self, scene: Scene) -> Decisions:
        """float32 [K] by site: what channels are divided by."""
        found: Decisions = {}
        for site in scene.rounded_sites():
            stats = scene.stats.get(site.name)
            if stats is None or self._problem(scene.structure, site):
                continue
            if not isinstance(site.producer, Norm):
                found[site.name] = self._scales(scene, site, stats, self.outputs)
            elif self.search and all(isinstance(scene.weight(p), Format) for p in site.consumers):
                tried = [self._scales(scene, site, stats, a) for a in (self.alpha, *_ALPHAS)]
                found[site.name] = least_error(stats, readers_of(scene, site), tried)
            else:
                found[site.name] = self._scales(scene, site, stats, self.alpha)
        return found

    def outcome(self, scene: Scene, decided: Decisions) -> Outcome:
        result = Outcome()
        for site in scene.rounded_sites():
            if site.name in decided:
                divide(scene.structure, site, decided[site.name].double(), result.edits)
            elif self.inputs if isinstance(site.producer, Norm) else self.outputs:
                why = self._problem(scene.structure, site) or "calibration did not reach it"
                result.declined.append(f"{site.name} is not smoothed: {why}")
        return result

    def _problem(self, structure: Structure, site: Site) -> str:
        """Why a site cannot be smoothed, or an empty text."""
        problem = cannot_scale(structure, site)
        if problem or site.producer is None:
            return problem
        if isinstance(site.producer, Norm):
            return "" if self.inputs else "only the inputs behind other layers are"
        return "" if self.outputs else "only the inputs behind norms are"

    def _scales(self, scene: Scene, site: Site, stats: SiteStats, alpha: float) -> Tensor:
        largest = torch.stack([w.abs().amax(0) for w in scene.consumer_weights(site)]).amax(0)
        seen = stats.absmax
        if isinstance(site.producer, Values):
            seen, largest = (over_heads(t, site.producer) for t in (seen, largest))
        s = seen.clamp(min=_FLOOR).double() ** alpha / largest.clamp(min=_FLOOR).double() ** (1 - alpha)
        return torch.where(seen > 0, s.clamp(min=_FLOOR), torch.ones_like(s)).float()
