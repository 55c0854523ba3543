"""Linear layers outside the repeated blocks, such as an output layer with weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import Trunk, linears_in, materialize, release
from lowbit.compiler.job.engine import Group, entry
from lowbit.compiler.job.layers import Selection
from lowbit.compiler.job.workers import Workers
from lowbit.quantizers.calibration import InputGroups, LayerStats
from lowbit.quantizers.inputs import LayerInput
from lowbit.quantizers.methods import Method

__all__ = ["quantize_outside"]


def quantize_outside(
    network: nn.Module,
    selection: Selection,
    method: Method,
    tokens: Tensor | None,
    hidden: Activations | None,
    load: Callable[[str], Tensor | None],
    save: Callable[[Group], None],
    skip_first: int = 0,
    inputs: Mapping[str, LayerInput] | None = None,
) -> None:
    """Quantize the layers outside the blocks, one at a time.

    A layer that runs after the last block has statistics from `hidden`, the last block's outputs; one that does not
    (before the first block, or in another part of the model) has none, and the method says what it does then.
    """
    stats: dict[str, LayerStats] = {}
    layers = {path: linear for path, linear in linears_in(network, "").items() if path in selection.outside}
    if method.needs_hessian and tokens is not None and hidden is not None:
        stats = _tail_stats(network, selection, layers, tokens, hidden, load, skip_first)
    for path, fmt in selection.outside.items():
        materialize(layers[path], path, load)
        quantized, seconds = Workers().submit(method, layers[path].weight.detach(), fmt, stats.get(path))()
        release(layers[path])
        save({path: (quantized.qtensor, entry(path, quantized, stats.get(path), seconds, (inputs or {}).get(path)))})


def _tail_stats(
    network: nn.Module,
    selection: Selection,
    layers: dict[str, nn.Linear],
    tokens: Tensor,
    hidden: Activations,
    load: Callable[[str], Tensor | None],
    skip_first: int,
) -> dict[str, LayerStats]:
    assert selection.blocks is not None
    inside = {id(m) for block in selection.blocks.modules for m in block.modules()}
    around = [(n, m) for n, m in network.named_modules() if id(m) not in inside and m not in layers.values()]
    head = getattr(network, "get_output_embeddings", lambda: None)()
    unused = [m for m in (*layers.values(), head) if isinstance(m, nn.Linear)]
    around = [(n, m) for n, m in around if m is not head]
    for name, module in around:
        materialize(module, name, load, recurse=False)
    trunk = Trunk(network, selection.blocks)
    groups = InputGroups(layers, skip_first, [[path] for path in layers], range(len(layers)), False)
    try:
        for layer in unused:
            layer.forward = partial(_no_output, layer)  # type: ignore[method-assign]
        trunk.calls(tokens[:2])
        with groups, torch.no_grad():
            for samples, states in hidden:
                groups.start()
                trunk.tail(tokens[samples], states)
    finally:
        for layer in unused:
            layer.__dict__.pop("forward", None)
        for _, module in around:
            release(module, recurse=False)
    paths = list(layers)
    return {paths[index]: a.stats() for index, a in groups.accumulators.items() if a.tokens}


def _no_output(layer: nn.Linear, x: Tensor) -> Tensor:
    """Something of the shape of the layer's output that takes no memory: only its input is of interest."""
    return x.new_zeros(1).expand(*x.shape[:-1], layer.out_features)
