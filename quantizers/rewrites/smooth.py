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
from lowbit.compiler.ir.sites import Norm, Rows, Site, Structure, Values
from lowbit.quantizers.formats import Format
from lowbit.quantizers.methods.rtn import Rtn
from lowbit.quantizers.observe import SiteStats
from lowbit.quantizers.rewrites.base import Decisions, Outcome, Rewrite, Scene
from lowbit.quantizers.rewrites.edits import Edits, Scale

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
                found[site.name] = min(tried, key=lambda s: _error(scene, site, stats.rows, s))
            else:
                found[site.name] = self._scales(scene, site, stats, self.alpha)
        return found

    def outcome(self, scene: Scene, decided: Decisions) -> Outcome:
        result = Outcome()
        for site in scene.rounded_sites():
            if site.name in decided:
                _divide(scene.structure, site, decided[site.name].double(), result.edits)
            elif self.inputs if isinstance(site.producer, Norm) else self.outputs:
                why = self._problem(scene.structure, site) or "calibration did not reach it"
                result.declined.append(f"{site.name} is not smoothed: {why}")
        return result

    def _problem(self, structure: Structure, site: Site) -> str:
        """Why a site cannot be smoothed, or an empty text."""
        producer = site.producer
        if producer is None:
            return site.problem
        shared = [p for p in site.consumers if structure.shared(p)]
        if shared:
            return f"{shared[0]} shares its weight"
        if isinstance(producer, Norm):
            return "" if self.inputs else "only the inputs behind other layers are"
        if not self.outputs:
            return "only the inputs behind norms are"
        source = producer.value if isinstance(producer, Values) else producer.scaled
        return "no factor passes through what makes it" if source is None else ""

    def _scales(self, scene: Scene, site: Site, stats: SiteStats, alpha: float) -> Tensor:
        largest = torch.stack([w.abs().amax(0) for w in scene.consumer_weights(site)]).amax(0)
        seen = stats.absmax
        if isinstance(site.producer, Values):
            seen, largest = (_over_heads(t, site.producer) for t in (seen, largest))
        s = seen.clamp(min=_FLOOR).double() ** alpha / largest.clamp(min=_FLOOR).double() ** (1 - alpha)
        return torch.where(seen > 0, s.clamp(min=_FLOOR), torch.ones_like(s)).float()


def _over_heads(t: Tensor, values: Values) -> Tensor:
    """[K] -> [K]: the largest over the heads that share a value head."""
    per_head = t.reshape(values.kv_heads, values.heads // values.kv_heads, values.dim)
    return per_head.amax(1, keepdim=True).expand_as(per_head).reshape(-1)


def _divide(structure: Structure, site: Site, s: Tensor, edits: Edits) -> None:
    producer = site.producer
    if isinstance(producer, Norm):
        edits.add(producer.weight, Scale(0, 1 / s), offset=producer.offset)
        if producer.bias is not None:
            edits.add(producer.bias, Scale(0, 1 / s))
    elif isinstance(producer, Rows):
        assert producer.scaled is not None
        edits.rows(producer.scaled, structure.weights, structure.biases, Scale(0, 1 / s))
    elif isinstance(producer, Values):
        per_value = s.reshape(producer.kv_heads, -1, producer.dim)[:, 0].reshape(-1)
        edits.rows(producer.value, structure.weights, structure.biases, Scale(0, 1 / per_value))
    for path in site.consumers:
        edits.add(structure.weights[path], Scale(1, s))


def _error(scene: Scene, site: Site, rows: Tensor, s: Tensor) -> float:
    """Squared error of the readers' outputs on sampled tokens, inputs and weights rounded after smoothing by `s`."""
    total = 0.0
    for path, weight in zip(site.consumers, scene.consumer_weights(site), strict=True):
        fmt, rounding = scene.weight(path), scene.activation(path)
        assert isinstance(fmt, Format)
        x = rows / s if rounding is None or rounding.static else rounding.apply(rows / s)
        w = Rtn(clip_search=False).round(weight * s, fmt).dequantize()
        total += float((x @ w.T - rows @ weight.T).square().sum())
    return total
