"""Quantizing a torch model that is in memory: the same engine as a run, without files."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.compiler.errors import FormatError, RunError
from lowbit.compiler.io.rewritten import rewrite_module
from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import Trunk, linears_in
from lowbit.compiler.job.blockwise import States, run_tuned, run_untuned
from lowbit.compiler.job.engine import BlockEngine, Group, LayerEntry, known_entry
from lowbit.compiler.job.finetune import finetune
from lowbit.compiler.job.kept import kept_matrices
from lowbit.compiler.job.layers import BATCH_TOKENS, ProgressSink, Quiet, Selection, select_layers
from lowbit.compiler.job.prepare import calibrates, check_inputs, prepare_model
from lowbit.compiler.job.tune import TuneResult
from lowbit.compiler.job.twin import float_twin
from lowbit.compiler.job.workers import Workers
from lowbit.compiler.runtime.experts import unstacked
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.calibration import InputGroups, LayerStats, calibration_tokens
from lowbit.quantizers.inputs import LayerInput, input_hooks
from lowbit.quantizers.methods import Fmpq, Method, asymmetric, check_finite, in_mode, make_method
from lowbit.quantizers.rewrites import Edits
from lowbit.quantizers.scheme import Scheme, Tuning
from lowbit.quantizers.weights import QWeight

__all__ = ["Choice", "choose", "choose_codes", "quantize_model"]

_log = logging.getLogger("lowbit")
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


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
    workers: int = 1,
    progress: ProgressSink | None = None,
) -> nn.Module:
    """Replace the linear layers of `model` by `QuantLinear`, in place, and return it.

    calibration: token ids [samples, length], or text as in `calibration_tokens` (needs `tokenizer`); None is enough
    for methods that need no statistics. workers: processes that quantize independent matrices (more than one needs a
    `__main__` guard in scripts). The model is changed only after every layer was quantized. Experts that are stacked in
    parameters of three dimensions become layers of their own (`runtime.experts`). Raises FormatError, RunError (LB0524
    without calibration where it is needed), CheckpointError (LB0107).
    """
    settings = (samples, length, seed)
    with unstacked(model):
        tokens = _tokens(model, scheme, calibration, tokenizer, *settings)
        choice = choose(model, scheme, tokens, sequential=sequential, workers=workers, progress=progress)
        _put_in(model, choice)
    if scheme.kv is not None:
        model.kv_format = str(scheme.kv)  # type: ignore[assignment]
    return model


def _tokens(
    model: nn.Module,
    scheme: Scheme,
    calibration: str | Path | Sequence[str] | Tensor | None,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
) -> Tensor | None:
    """The calibration data, where the scheme looks at any."""
    for line in kept_matrices(model):
        _log.warning("%s", line)
    method = make_method(scheme.method, scheme.options)
    paths = [path for path in linears_in(model, "") if scheme.format_for(path) is not None]
    if method.needs_hessian or calibrates(scheme, method, paths):
        if calibration is None:
            raise RunError(
                "LB0524",
                f"{scheme.method if method.needs_hessian else scheme.name} needs calibration data",
                hint="pass calibration=token ids or text with a tokenizer, or method='rtn' without rewrites",
            )
        tokens = calibration_tokens(tokenizer, calibration, samples, length, seed)
        _check_vocabulary(model, tokens)
        return tokens
    return None


def _check_vocabulary(model: nn.Module, tokens: Tensor) -> None:
    table = getattr(model, "get_input_embeddings", lambda: None)()
    size, top = getattr(table, "num_embeddings", None), int(tokens.max())
    if size is not None and top >= size:
        why = f"token id {top} is outside the model's vocabulary of {size}"
        raise RunError("LB0523", why, hint="use the tokenizer that belongs to the model")


def _put_in(model: nn.Module, choice: Choice) -> None:
    """Change the model."""
    for edits in choice.edits:
        rewrite_module(model, edits)
    state = dict(model.named_parameters())
    for name, value in choice.plain.items():
        state[name].data.copy_(value)
    new: dict[int, QuantLinear] = {}
    for path, (qtensor, _) in choice.layers.items():
        old = model.get_submodule(path)
        bias = old.bias.detach() if isinstance(old.bias, Tensor) else None
        layer = new[id(old)] = _layer(qtensor, bias, choice.inputs.get(path)).train(old.training)
        for hooks in _HOOKS:  # of accelerate, adapters and users; they belong to the place, not to the weights
            setattr(layer, hooks, getattr(old, hooks))
    # A layer that the model uses in several places has several paths.
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in new:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new[id(module)])


def _layer(q: QWeight, bias: Tensor | None, what: LayerInput | None) -> QuantLinear:
    if what is None:
        return QuantLinear.from_qtensor(q, bias)
    rounding = str(what.format) if what.format is not None else ""
    return QuantLinear.from_qtensor(q, bias, activation=rounding, input_scale=what.scales, rotate=what.rotation)


@dataclass
class Choice:
    """What quantization decides: a quantized weight and report entry by layer, other tensors (tuned norms) by name, the
    edits the model gets before all that, what layers do with their inputs, and what was left alone."""

    layers: dict[str, tuple[QWeight, LayerEntry]] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    edits: list[Edits] = field(default_factory=list)
    inputs: Mapping[str, LayerInput] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def choose_codes(
    model: nn.Module,
    scheme: Scheme,
    tokens: Tensor | None,
    *,
    sequential: bool = True,
    skip_first: int = 0,
    progress: ProgressSink | None = None,
) -> dict[str, tuple[QWeight, LayerEntry]]:
    """The layers' part of `choose`."""
    return choose(model, scheme, tokens, sequential=sequential, skip_first=skip_first, progress=progress).layers


def choose(
    model: nn.Module,
    scheme: Scheme,
    tokens: Tensor | None,
    *,
    sequential: bool = True,
    skip_first: int = 0,
    workers: int = 1,
    known: Mapping[str, QWeight] | None = None,
    progress: ProgressSink | None = None,
) -> Choice:
    """Quantized weight and report entry of every layer the scheme covers; the model is left as it is.

    tokens: int64 [samples, length]; None only for methods that need no statistics, and then nothing is tuned. known:
    layers in blocks whose quantized weights are taken as they are (and may be tuned).
    """
    method, sink = in_mode(make_method(scheme.method, scheme.options), sequential), progress or Quiet()
    tied = _tied_weights(model)
    selection = select_layers(model, scheme, lambda path: path not in tied, need_blocks=method.needs_hessian)
    linears = linears_in(model, "")
    for path in selection.formats:
        if linears[path].weight.is_meta:
            raise FormatError(
                "LB0224", "the layer has no weights yet", where=path, hint="load the model's weights first"
            )
        check_finite(linears[path].weight.detach(), f"{path}.weight")
    check_inputs(scheme, method, selection.formats, selection.shapes)
    names = list(selection.formats)
    choice = Choice()
    if scheme.rewrites:  # the model itself is only changed at the end
        model = copy.deepcopy(model)
    prepared, choice.edits = prepare_model(model, tokens, selection, scheme, method)
    if choice.edits:
        tied = _tied_weights(model)
        selection = select_layers(model, scheme, lambda path: path not in tied, need_blocks=method.needs_hessian)
        linears = linears_in(model, "")
    choice.inputs, choice.notes = prepared.inputs, prepared.notes
    tokens = tokens if method.needs_hessian else None
    rounding = isinstance(method, Fmpq) and method.aware

    def keep(group: Group) -> None:
        for path, result in group.items():
            choice.layers[path] = result
            sink.layer(len(choice.layers), len(names), path, result[1].to_dict())

    sink.start(len(names), names)
    pool = Workers(workers)
    engine = BlockEngine(method, sequential, skip_first, finished=keep, workers=pool, inputs=prepared.inputs)
    try:
        with torch.no_grad(), pool:
            if tokens is None:
                engine.run_plain(_float_copies(linears, selection), {})
            else:
                _run_blocks(model, selection, engine, tokens, scheme.tune, choice, known or {}, rounding)
                _run_outside(model, selection, method, tokens, engine, linears)
        if tokens is not None and scheme.finetune is not None:
            teacher = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
            weights = {path: q for path, (q, _) in choice.layers.items()}
            with input_hooks(linears_in(teacher, ""), prepared.inputs, rounding=False):
                _keep(choice, finetune(teacher, weights, choice.plain, tokens, scheme.finetune, sink.message), "")
    finally:
        sink.finish()
    return choice


def _keep(choice: Choice, result: TuneResult, prefix: str) -> None:
    for path, q in result.weights.items():
        choice.layers[path] = (q, choice.layers[path][1] if path in choice.layers else known_entry(path, q))
    choice.plain.update({prefix + name: value for name, value in result.plain.items()})


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


def _run_blocks(
    model: nn.Module,
    selection: Selection,
    engine: BlockEngine,
    tokens: Tensor,
    tuning: Tuning | None,
    choice: Choice,
    known: Mapping[str, QWeight],
    rounding: bool,
) -> None:
    blocks = selection.blocks
    assert blocks is not None
    trunk = Trunk(model, blocks)
    calls = trunk.calls(tokens[:2])
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    width = trunk.embed(tokens[:1]).shape[-1]
    shape = (tokens.shape[0], tokens.shape[1], width)
    compared = asymmetric(engine.method) > 0
    two_streams = tuning is not None or compared

    def states() -> States:
        streams = [Activations(shape, batch, create=True) for _ in range(1 + two_streams)]
        return States(*streams)

    inputs = states()
    for samples in inputs.hidden.batches:
        embedded = trunk.embed(tokens[samples])
        for stream in inputs.streams.values():
            stream.write(samples, embedded)
    for index, module in enumerate(blocks.modules):
        block = copy.deepcopy(module).cpu().float()
        layers = linears_in(block, blocks.name(index))
        linears = {path: (layers[path], fmt) for path, fmt in selection.inside[index].items()}
        done = {path: known[path] for path in linears if path in known}
        last = index + 1 == len(blocks.modules)
        outputs = states() if tuning is not None or not last else None
        reference = inputs.reference if compared else None
        kept = float_twin(block, blocks.name(index), calls[index], reference, engine.inputs) if reference else None
        with kept or nullcontext() as twin, input_hooks(layers, engine.inputs, rounding=rounding and tuning is None):
            if tuning is not None and outputs is not None:
                result = run_tuned(engine, block, calls[index], linears, inputs, outputs, done, None, tuning, twin)
                _keep(choice, result, f"{blocks.name(index)}.")
            else:
                run_untuned(engine, block, calls[index], linears, inputs, outputs, done, twin)
        inputs = outputs or inputs


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
    with input_hooks(linears_in(model, ""), engine.inputs, rounding=False), groups:
        for row in tokens:
            groups.start()
            model(input_ids=row[None].to(device), use_cache=False)
    index = {path: i for i, path in enumerate(layers)}
    for path, fmt in selection.outside.items():
        seen = groups.accumulators.get(index[path])
        stats: LayerStats | None = seen.stats() if seen is not None and seen.tokens else None
        engine.quantize_group([path], {path: (_float_copy(linears[path]), fmt)}, stats)
