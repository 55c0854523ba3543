"""Quantizing a torch model that is in memory: the same engine as a run, without files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.compiler.errors import RunError
from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import Trunk, linears_in
from lowbit.compiler.job.engine import BlockEngine, Group, LayerEntry
from lowbit.compiler.job.layers import BATCH_TOKENS, ProgressSink, Quiet, Selection, select_layers
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.calibration import InputGroups, LayerStats, calibration_tokens
from lowbit.quantizers.methods import Method, check_finite, make_method
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.scheme import Scheme

__all__ = ["choose_codes", "quantize_model"]


def quantize_model(
    model: nn.Module,
    scheme: Scheme,
    calibration: str | Path | Sequence[str] | Tensor | None = None,
    tokenizer: Any = None,
    *,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    sequential: bool = True,
    progress: ProgressSink | None = None,
) -> nn.Module:
    """Replace the linear layers of `model` by `QuantLinear`, in place, and return it.

    calibration: token ids [samples, length], or text as in `calibration_tokens` (needs `tokenizer`); None is enough
    for methods that need no statistics. The model is changed only after every layer was quantized. Raises FormatError,
    RunError (LB0524 without calibration where it is needed), CheckpointError (LB0107).
    """
    tokens = None
    if make_method(scheme.method, scheme.options).needs_hessian:
        if calibration is None:
            raise RunError(
                "LB0524",
                f"{scheme.method} needs calibration data",
                hint="pass calibration=token ids or text with a tokenizer, or method='rtn'",
            )
        tokens = calibration_tokens(tokenizer, calibration, samples, length, seed)
    found = choose_codes(model, scheme, tokens, sequential=sequential, progress=progress)
    for path, (qtensor, _) in found.items():
        old = model.get_submodule(path)
        bias = old.bias.detach() if isinstance(old.bias, Tensor) else None
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, QuantLinear.from_qtensor(qtensor, bias))
    return model


def choose_codes(
    model: nn.Module,
    scheme: Scheme,
    tokens: Tensor | None,
    *,
    sequential: bool = True,
    skip_first: int = 0,
    progress: ProgressSink | None = None,
) -> dict[str, tuple[QTensor, LayerEntry]]:
    """Codes and report entry of every layer the scheme covers; the model is left as it is.

    tokens: int64 [samples, length]; None only for methods that need no statistics.
    """
    method, sink = make_method(scheme.method, scheme.options), progress or Quiet()
    tied = _tied_weights(model)
    selection = select_layers(model, scheme, lambda path: path not in tied, need_blocks=method.needs_hessian)
    linears = linears_in(model, "")
    for path in selection.formats:
        check_finite(linears[path].weight.detach(), f"{path}.weight")
    names = list(selection.formats)
    found: dict[str, tuple[QTensor, LayerEntry]] = {}

    def keep(group: Group) -> None:
        for path, result in group.items():
            found[path] = result
            sink.layer(len(found), len(names), path, result[1].to_dict())

    sink.start(len(names), names)
    engine = BlockEngine(method, sequential, skip_first, finished=keep)
    try:
        with torch.no_grad():
            if tokens is None:
                engine.run_plain(_float_copies(linears, selection), {})
            else:
                _run_blocks(model, selection, engine, tokens)
                _run_outside(model, selection, method, tokens, engine, linears)
    finally:
        sink.finish()
    return found


def _tied_weights(model: nn.Module) -> set[str]:
    """Paths of linear layers whose weight another module has too."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(path)
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


def _float_copy(linear: nn.Linear) -> nn.Linear:
    return copy.deepcopy(linear).cpu().float()


def _float_copies(linears: dict[str, nn.Linear], selection: Selection) -> dict[str, tuple[nn.Linear, Any]]:
    return {path: (_float_copy(linears[path]), fmt) for path, fmt in selection.formats.items()}


def _run_blocks(model: nn.Module, selection: Selection, engine: BlockEngine, tokens: Tensor) -> None:
    blocks = selection.blocks
    assert blocks is not None
    trunk = Trunk(model, blocks)
    calls = trunk.calls(tokens[:2])
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    width = trunk.embed(tokens[:1]).shape[-1]
    shape = (tokens.shape[0], tokens.shape[1], width)
    hidden = Activations(shape, batch, create=True)
    for samples in hidden.batches:
        hidden.write(samples, trunk.embed(tokens[samples]))
    for index, module in enumerate(blocks.modules):
        block = copy.deepcopy(module).cpu().float()
        layers = linears_in(block, blocks.name(index))
        linears = {path: (layers[path], fmt) for path, fmt in selection.inside[index].items()}
        outputs = Activations(shape, batch, create=True) if index + 1 < len(blocks.modules) else None
        engine.run(block, calls[index], linears, hidden, outputs, {})
        hidden = outputs or hidden


def _run_outside(
    model: nn.Module,
    selection: Selection,
    method: Method,
    tokens: Tensor,
    engine: BlockEngine,
    linears: dict[str, nn.Linear],
) -> None:
    """Layers outside the blocks see what the model as it is feeds them."""
    if not selection.outside:
        return
    layers = {path: linears[path] for path in selection.outside}
    groups = InputGroups(layers, engine.skip_first, [[path] for path in layers], range(len(layers)), False)
    device = next(iter(layers.values())).weight.device
    with groups:
        for row in tokens:
            groups.start()
            model(input_ids=row[None].to(device), use_cache=False)
    index = {path: i for i, path in enumerate(layers)}
    for path, fmt in selection.outside.items():
        seen = groups.accumulators.get(index[path])
        stats: LayerStats | None = seen.stats() if seen is not None and seen.tokens else None
        engine.quantize_group([path], {path: (_float_copy(linears[path]), fmt)}, stats)
