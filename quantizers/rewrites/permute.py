"""Permutation: channels sorted by how large they get, so that those which share a scale are alike.

The largest come first ("COMET: Towards Practical W4A4KV4 LLMs Serving"), where formats such as `int4.g64.w2` have their
wide groups. Where rows of the layers before can be put in that order it costs nothing; elsewhere the matrix keeps its
columns in that order and the kernel gathers its inputs.

With a threshold, the channels beyond it are all that is wide: "LLM.int8(): 8-bit Matrix Multiplication for Transformers
at Scale" (Dettmers et al.) finds them in every batch, here calibration does, once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.sites import Rows, Site
from lowbit.quantizers.formats import K_ALIGN, ActivationFormat
from lowbit.quantizers.observe import SiteStats
from lowbit.quantizers.rewrites.base import Decisions, Outcome, Rewrite, Scene
from lowbit.quantizers.rewrites.edits import Gather

__all__ = ["Permute"]


@dataclass(frozen=True)
class Permute(Rewrite):
    """rank: what channels are sorted by, their largest magnitude (`max`) or mean square (`moment`, Atom's choice).
    fold: reorder the rows of earlier layers where that is all it takes. outliers: channels whose largest magnitude
    exceeds this, and no others, come into wide groups (0: the activation format says how many groups are wide)."""

    rank: str = "max"
    fold: bool = True
    outliers: float = 0.0

    name: ClassVar[str] = "permute"

    def __post_init__(self) -> None:
        if self.rank not in ("max", "moment"):
            raise FormatError("LB0245", f"permute cannot rank by {self.rank!r}", hint="write permute{rank=moment}")
        if self.outliers < 0 or (self.outliers and self.rank != "max"):
            raise FormatError(
                "LB0245",
                "outliers are channels with a large maximum",
                hint="write permute{outliers=6.0}, rank left out",
            )

    def wide(self, stats: SiteStats, fmt: ActivationFormat) -> int:
        """Wide groups of `fmt` (columns, where it has one scale per token) that hold all outliers of a site."""
        count = int((stats.absmax > self.outliers).sum())
        return math.ceil(count / fmt.group) if fmt.group else math.ceil(count / K_ALIGN) * K_ALIGN

    def decide(self, scene: Scene) -> Decisions:
        """int64 [K] by site: the channel at each place."""
        found: Decisions = {}
        for site in scene.rounded_sites():
            if site.name in scene.stats:
                stats = scene.stats[site.name]
                size = stats.absmax if self.rank == "max" else stats.moment
                found[site.name] = torch.argsort(size, descending=True, stable=True)
        return found

    def outcome(self, scene: Scene, decided: Decisions) -> Outcome:
        result = Outcome()
        for site in scene.rounded_sites():
            order = decided.get(site.name)
            if order is None:
                result.declined.append(f"{site.name} is not permuted: calibration did not reach it")
            elif self.fold and _foldable(scene, site):
                assert isinstance(site.producer, Rows)
                result.folded[site.name] = order
                for path in site.producer.layers:
                    result.edits.rows(path, scene.structure.weights, scene.structure.biases, Gather(0, order))
                for path in site.consumers:
                    result.edits.add(scene.structure.weights[path], Gather(1, order))
            else:
                result.orders.update(dict.fromkeys(site.consumers, order))
        return result


def _foldable(scene: Scene, site: Site) -> bool:
    """Rows can be reordered, and nothing at run time stands between them and the readers."""
    free = not any(scene.structure.shared(p) or p in scene.online for p in site.consumers)
    return isinstance(site.producer, Rows) and free
