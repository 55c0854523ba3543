"""Factors on channels: what goes into layers is divided by them, and the columns that read it are multiplied.

The division costs nothing when the model runs: it goes into the norm before the site, into the rows of the layer that
makes it, or into the value rows of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lowbit.compiler.ir.sites import Norm, Rows, Site, Structure, Values
from lowbit.quantizers.formats import ActivationFormat, Format
from lowbit.quantizers.methods.rtn import Rtn
from lowbit.quantizers.observe import SiteStats
from lowbit.quantizers.rewrites.base import Scene
from lowbit.quantizers.rewrites.edits import Edits, Scale

__all__ = ["Reader", "cannot_scale", "divide", "least_error", "over_heads", "readers_of", "rounding_error"]


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads a site. weight: float32 [N, K], its format, and how its inputs are rounded (None: kept)."""

    weight: Tensor
    fmt: Format
    inputs: ActivationFormat | None


def readers_of(scene: Scene, site: Site, rows: int = 0) -> list[Reader]:
    """The readers of a site whose weights have one code each. rows: about as many of a matrix, evenly spaced, are
    enough (0: all)."""
    found = []
    for path, weight in zip(site.consumers, scene.consumer_weights(site), strict=True):
        fmt = scene.weight(path)
        if isinstance(fmt, Format):
            stride = max(1, weight.shape[0] // rows) if rows else 1
            found.append(Reader(weight[::stride].contiguous(), fmt, scene.activation(path)))
    return found


def cannot_scale(structure: Structure, site: Site) -> str:
    """Why channels of a site cannot be scaled, or an empty text."""
    producer = site.producer
    if producer is None:
        return site.problem
    shared = [p for p in site.consumers if structure.shared(p)]
    if shared:
        return f"{shared[0]} shares its weight"
    scaled = isinstance(producer, Norm | Values) or producer.scaled is not None
    return "" if scaled else "no factor passes through what makes it"


def over_heads(t: Tensor, values: Values) -> Tensor:
    """[K] -> [K]: the largest over the heads that share a value head."""
    per_head = t.reshape(values.kv_heads, values.heads // values.kv_heads, values.dim)
    return per_head.amax(1, keepdim=True).expand_as(per_head).reshape(-1)


def divide(structure: Structure, site: Site, s: Tensor, edits: Edits) -> None:
    """Divide the channels of a site by s [K], and multiply the columns of its readers. See `cannot_scale`."""
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


def least_error(stats: SiteStats, readers: Sequence[Reader], tried: Sequence[Tensor]) -> Tensor:
    """The first of the tried factors [K] that gives the smallest `rounding_error`."""
    return min(tried, key=lambda s: rounding_error(stats, readers, s))


def rounding_error(stats: SiteStats, readers: Sequence[Reader], s: Tensor) -> float:
    """Mean over sampled tokens of the squared error of what readers give, when weights and inputs are rounded to
    nearest after scaling by s [K]. Where columns' costs are known, weights' errors count with these instead."""
    return sum(_error(stats, reader, s) for reader in readers)


def _error(stats: SiteStats, reader: Reader, s: Tensor) -> float:
    x, weight = stats.rows, reader.weight
    scaled = weight * s
    rounded = Rtn(clip_search=False).round(scaled, reader.fmt).dequantize()
    kept = reader.inputs is None or reader.inputs.static
    if stats.cost is not None:
        total = float((rounded / s - weight).square().sum(0) @ stats.cost)
        rounded = scaled
        if kept:
            return total
    else:
        total = 0.0
    inputs = x / s if reader.inputs is None or kept else reader.inputs.apply(x / s)
    return total + float((inputs @ rounded.T - x @ weight.T).square().sum()) / len(x)
