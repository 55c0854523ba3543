"""What a rewrite is: a change of weights that leaves the model's function as it is, chosen to make rounding cheaper.

A rewrite works in two steps. `decide` looks at calibration statistics and gives tensors (scales, orders), which a run
keeps in its journal; `outcome` turns them into edits of the checkpoint's tensors, and is a pure function, so that an
interrupted run continues with the same bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lowbit.compiler.ir.sites import Site, Structure
from lowbit.quantizers.formats import ActivationFormat, WeightFormat
from lowbit.quantizers.observe import SiteStats
from lowbit.quantizers.rewrites.edits import Edits

__all__ = ["Decisions", "Outcome", "Rewrite", "Scene"]

Decisions = dict[str, Tensor]
"""What a rewrite found out, by the name of the site."""


@dataclass(frozen=True)
class Scene:
    """What a rewrite sees: the model's structure, its tensors by name (read when asked for), the formats that inputs
    and weights of a layer get (None: kept), calibration statistics by site (empty where none were asked for), and the
    blocks in which inputs are rotated at run time by earlier rewrites."""

    structure: Structure
    tensor: Callable[[str], Tensor]
    activation: Callable[[str], ActivationFormat | None]
    weight: Callable[[str], WeightFormat | None]
    stats: Mapping[str, SiteStats] = field(default_factory=dict)
    online: Mapping[str, int] = field(default_factory=dict)

    def rounded_sites(self) -> list[Site]:
        """Sites with a reader whose inputs get rounded."""
        return [s for s in self.structure.sites if any(self.activation(p) is not None for p in s.consumers)]

    def quantized_sites(self) -> list[Site]:
        """Sites with a reader whose weight gets quantized."""
        return [s for s in self.structure.sites if any(self.weight(p) is not None for p in s.consumers)]

    def consumer_weights(self, site: Site) -> list[Tensor]:
        """float32 [N, K] of every reader of a site."""
        return [self.tensor(self.structure.weights[p]).float() for p in site.consumers]


@dataclass
class Outcome:
    """What a rewrite does. edits: of tensors. orders: the order of columns in which layers keep their matrix and round
    their inputs, by path. folded: the order the channels of a site come in from now on, by site. online: width of the
    blocks in which a layer's inputs are rotated at run time, by path. declined: sites that were left alone, and why."""

    edits: Edits = field(default_factory=Edits)
    orders: dict[str, Tensor] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    online: dict[str, int] = field(default_factory=dict)
    declined: list[str] = field(default_factory=list)


class Rewrite(ABC):
    """A function-preserving change. Subclasses are frozen dataclasses; their fields are the rewrite's options."""

    name: ClassVar[str]
    observes: ClassVar[bool] = True
    """Whether `decide` needs calibration statistics."""
    serves_weights: ClassVar[bool] = False
    """Whether it helps where only weights are rounded."""

    def decide(self, scene: Scene) -> Decisions:
        """What to remember; called once per run. By default nothing."""
        return {}

    @abstractmethod
    def outcome(self, scene: Scene, decided: Decisions) -> Outcome:
        """The changes that follow from what was decided; `scene` comes without statistics."""
