"""Which layers a run will quantize, and the report about them. Everything that can be refused is refused here."""

from __future__ import annotations

import importlib.metadata
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from lowbit.compiler.errors import CheckpointError, IRError, RunError
from lowbit.compiler.frontend.formats import assign
from lowbit.compiler.job.blocks import Blocks, find_blocks, linears_in
from lowbit.compiler.job.kept import kept_matrices
from lowbit.compiler.runtime.modules import PackedLinear
from lowbit.quantizers.formats import WeightFormat
from lowbit.quantizers.scheme import Scheme

__all__ = [
    "BATCH_TOKENS",
    "ProgressSink",
    "Quiet",
    "Selection",
    "layer_totals",
    "peak_rss",
    "select_layers",
    "versions",
]


BATCH_TOKENS = 2048
"""Calibration tokens that go through a block at a time."""


class ProgressSink(Protocol):
    """Where a run says how far it is."""

    def start(self, total_layers: int, names: Sequence[str]) -> None:
        """A run over these layers begins."""

    def layer(self, i: int, n: int, path: str, info: dict[str, Any]) -> None:
        """Layer `i` (from 1) of `n` is done; `info` is its report entry."""

    def message(self, text: str) -> None:
        """Something worth saying."""

    def finish(self) -> None:
        """The run is over, one way or another."""


class Quiet:
    """A sink that says nothing."""

    def start(self, total_layers: int, names: Sequence[str]) -> None:
        """Nothing."""

    def layer(self, i: int, n: int, path: str, info: dict[str, Any]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Selection:
    """The layers to quantize: those of each block, those outside the blocks, and remarks about others."""

    blocks: Blocks | None
    inside: tuple[Mapping[str, WeightFormat], ...]
    outside: Mapping[str, WeightFormat]
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """Format by module path, in the order in which the run does them."""
        return {path: fmt for group in (*self.inside, self.outside) for path, fmt in group.items()}


def select_layers(
    model: nn.Module, scheme: Scheme, owns_weight: Callable[[str], bool], *, need_blocks: bool
) -> Selection:
    """The linear layers of `model` that `scheme` has a format for.

    owns_weight: whether a module's weight is stored in the checkpoint under its own name; a tied one is kept as it is.
    Raises RunError: LB0504 when nothing is left to quantize, LB0505 when `need_blocks` and the model has none;
    FormatError (LB0213) when a format does not fit a layer.
    """
    linears, kept = linears_in(model, ""), kept_matrices(model)
    if "" in linears:  # there is no module to put another layer into
        raise RunError("LB0504", "is itself a linear layer", where="the model", hint="wrap it: nn.Sequential(layer)")
    if not linears:
        _refuse_quantized(model)
        what = "; ".join(kept[:1])
        raise RunError("LB0504", "the model has no linear layers", where=type(model).__name__, hint=what)
    chosen: dict[str, WeightFormat] = {}
    wanted, notes = _wanted(model, scheme, linears)
    notes += kept
    for path, fmt in wanted.items():
        if not owns_weight(path):
            notes.append(f"{path} shares its weight with another module and was kept as it is")
        else:
            fmt.check(linears[path].out_features, linears[path].in_features, path)
            chosen[path] = fmt
    if not chosen:
        _refuse_quantized(model)
        hint = "; ".join(["change `ignore`", *kept[:1]])
        raise RunError("LB0504", f"the scheme {scheme.name!r} leaves every linear layer as it is", hint=hint)
    shapes = {path: (linears[path].out_features, linears[path].in_features) for path in chosen}
    blocks = find_blocks(model)
    if blocks is None and need_blocks:
        raise RunError("LB0505", "the model has no repeated blocks with linear layers", where=type(model).__name__)
    prefixes = [blocks.name(i) + "." for i in range(len(blocks.modules))] if blocks else []
    inside = tuple({p: f for p, f in chosen.items() if p.startswith(prefix)} for prefix in prefixes)
    outside = {p: f for p, f in chosen.items() if not any(p in group for group in inside)}
    return Selection(blocks, inside, outside, shapes, tuple(notes))


def _refuse_quantized(model: nn.Module) -> None:
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        hint = "start from the original model"
        raise CheckpointError("LB0116", "the model is already quantized", where=type(model).__name__, hint=hint)


def _wanted(
    model: nn.Module, scheme: Scheme, linears: Mapping[str, nn.Linear]
) -> tuple[dict[str, WeightFormat], list[str]]:
    """Formats by the pass pipeline (import, canonicalize, assign-formats), in the model's order of modules.

    Layers the traced graph does not show (experts no token reached, or a model that cannot be traced, which is noted)
    get the scheme's format directly: the same rule without the graph's knowledge of shared weights.
    """
    notes: list[str] = []
    try:
        assignment = assign(model, scheme)
    except IRError as e:
        notes.append(f"formats were assigned without the graph: {e.message}")
        assignment = None
    found: dict[str, WeightFormat] = {}
    for path in linears:
        kept = assignment is not None and path in assignment.reasons and path not in assignment.formats
        fmt = assignment.formats.get(path) if assignment is not None else None
        if not kept and (fmt := fmt or scheme.format_for(path)) is not None:
            found[path] = fmt
    return found, notes


def layer_totals(layers: Sequence[Mapping[str, Any]], other_bits: float, other_weights: int) -> dict[str, float | int]:
    """Sizes and mean errors over report entries; `other_*` count the tensors that were kept."""
    weights = sum(entry["shape"][0] * entry["shape"][1] for entry in layers)
    bits = sum(entry["bits_per_weight"] * entry["shape"][0] * entry["shape"][1] for entry in layers)
    count = max(1, len(layers))
    return {
        "layers": len(layers),
        "parameters": weights + other_weights,
        "quantized_parameters": weights,
        "bits_per_quantized_weight": bits / max(1, weights),
        "bits_per_weight": (bits + other_bits) / max(1, weights + other_weights),
        "mean_proxy_error": sum(entry["proxy_error"] for entry in layers) / count,
        "mean_rtn_error": sum(entry["rtn_error"] for entry in layers) / count,
        "method_seconds": round(sum(entry["seconds"] for entry in layers), 3),
    }


def peak_rss() -> int:
    """Most memory this process ever held, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    return {"lowbit": importlib.metadata.version("lowbit"), "torch": str(torch.__version__)}
