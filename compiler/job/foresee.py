"""What rewrites will do to a model, as far as its structure tells: for plans, which read no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowbit.compiler.errors import LowbitError
from lowbit.quantizers.rewrites import Rotate, rewrite_text
from lowbit.quantizers.scheme import Scheme

if TYPE_CHECKING:
    from lowbit.compiler.io.source import ModelSource

__all__ = ["Foreseen", "foresee"]


@dataclass(frozen=True)
class Foreseen:
    """line: the rewrites, and what of the model they leave alone. untied: tables by the path of the layer that shares
    one now and will have a tensor of its own."""

    line: str = ""
    untied: dict[str, str] = field(default_factory=dict)

    def bytes_more(self, source: ModelSource) -> int:
        """What these tensors add to the checkpoint."""
        from lowbit.compiler.io.checkpoint import stored_dtype

        return sum(math.prod(source.shape(t)) * stored_dtype(source, t).itemsize for t in self.untied.values())


def foresee(source: ModelSource, scheme: Scheme) -> Foreseen:
    """Of the scheme's rewrites, on the model's structure."""
    from lowbit.compiler.frontend.structure import model_structure

    if not scheme.rewrites:
        return Foreseen()
    line = ", ".join(rewrite_text(r) for r in scheme.rewrites)
    try:
        structure = model_structure(source.empty_model())
    except LowbitError as e:
        return Foreseen(f"{line}; none can be done: {e.message}")
    weights = any(r.observes and r.serves_weights for r in scheme.rewrites)
    served = [scheme.activation_for, scheme.format_for] if weights else [scheme.activation_for]
    sites = [s for s in structure.sites if any(has(s.name) is not None for has in served)]
    unknown = [s for s in sites if s.producer is None]
    if unknown:
        line += f"; {len(unknown)} of {len(sites)} inputs are left alone: {unknown[0].problem}"
    rotations = [r for r in scheme.rewrites if isinstance(r, Rotate)]
    if rotations and structure.problem:
        line += f"; the residual stream is not rotated: {structure.problem}"
    return Foreseen(line, rotations[0].unties(structure) if rotations else {})
