"""What a quantized layer does with its inputs at run time: rotate, reorder, round. And that, done with hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.quantizers.calibration import hook_inputs
from lowbit.quantizers.formats import ActivationFormat
from lowbit.quantizers.hadamard import rotate
from lowbit.quantizers.observe import SiteStats

__all__ = ["LayerInput", "input_hooks", "static_scales", "wide_share"]


@dataclass(frozen=True, eq=False)
class LayerInput:
    """rotation: blocks of so many channels are rotated first (0: none). order: int64 [K], the channel at each place
    when rounding (None: as they come). format: what is rounded to, None for nothing. scales: float32 [groups], those of
    a static format."""

    format: ActivationFormat | None = None
    order: Tensor | None = None
    scales: Tensor | None = None
    rotation: int = 0

    def rotated(self, x: Tensor) -> Tensor:
        """x [..., K] in the basis of the layer's matrix."""
        return rotate(x, self.rotation) if self.rotation else x

    def rounded(self, x: Tensor) -> Tensor:
        """x [..., K], rotated already, rounded, with its channels where they were: what the kernel multiplies."""
        if self.format is None:
            return x
        if self.order is None:
            return self.format.apply(x, self.scales)
        out = torch.empty_like(x)
        out[..., self.order] = self.format.apply(x[..., self.order], self.scales)
        return out

    def apply(self, x: Tensor) -> Tensor:
        """Both."""
        return self.rounded(self.rotated(x))


@contextmanager
def input_hooks(
    modules: Mapping[str, nn.Module], inputs: Mapping[str, LayerInput], *, rounding: bool
) -> Iterator[None]:
    """Float layers see the inputs that quantized ones would: rotated, and rounded where `rounding` is set.

    Layers that read one tensor in the same way get one tensor again, so that they are still recognised as siblings.
    """
    last: list[tuple[Tensor, LayerInput, Tensor]] = []

    def changed(x: Tensor, what: LayerInput) -> Tensor:
        for seen, how, result in last:
            if seen is x and how is what:
                return result
        result = what.apply(x) if rounding else what.rotated(x)
        last[:] = [*last[-3:], (x, what, result)]
        return result

    chosen = {
        path: module
        for path, module in modules.items()
        if (what := inputs.get(path)) is not None and (what.rotation or (rounding and what.format is not None))
    }
    with hook_inputs(chosen, lambda path, x: changed(x, inputs[path])):
        yield


def static_scales(stats: SiteStats, fmt: ActivationFormat) -> Tensor:
    """float32 [groups]: the scales with which nothing that calibration saw saturates (beyond the format's clip).

    stats: of the channels in the order in which they are rounded.
    """
    return fmt.scales(stats.absmax[None])[0]


def wide_share(inputs: Mapping[str, LayerInput], widths: Mapping[str, int]) -> float:
    """The share of rounded channels that have 8 bits or more. Layers with one LayerInput read one tensor: it counts
    once."""
    channels = {id(what): (what.format, widths[p]) for p, what in inputs.items() if what.format is not None}
    wide = total = 0
    for fmt, k in channels.values():
        total += k
        wide += k if fmt.element.bits >= 8 else fmt.wide_columns(k)
    return wide / max(1, total)
