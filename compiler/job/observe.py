"""Looking at a float model's activations before anything is decided: block by block from a checkpoint, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.compiler.errors import RunError
from lowbit.compiler.io.source import ModelSource
from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import BlockCall, Blocks, Trunk, find_blocks, materialize, outside_modules, release
from lowbit.compiler.job.layers import BATCH_TOKENS, ProgressSink
from lowbit.quantizers.inputs import LayerInput, input_hooks
from lowbit.quantizers.observe import SiteObserver, SiteStats

__all__ = ["observe_model", "observe_source"]

_MOST_PRODUCTS = 2 << 30
"""Bytes of matrices of inputs that are held at a time for a model in memory."""


@torch.no_grad()
def observe_source(
    source: ModelSource,
    tokens: Tensor,
    readers: Sequence[str],
    inputs: Mapping[str, LayerInput],
    sink: ProgressSink,
    folder: Path,
    costs: bool = False,
) -> dict[str, SiteStats]:
    """Statistics of what the layers `readers` read, by path, for those in the model's blocks.

    tokens: int64 [samples, length]. inputs: rotations that happen at run time. folder: where the hidden states live
    meanwhile. costs: see `SiteObserver`. One block is in memory at a time.
    """
    network = source.empty_model()
    names = frozenset(source.names())
    load = lambda name: source.tensor(name) if name in names else None  # noqa: E731
    blocks = find_blocks(network)
    if blocks is None:
        raise RunError("LB0505", "the model has no repeated blocks with linear layers", where=type(network).__name__)
    trunk = Trunk(network, blocks)
    head = getattr(network, "get_output_embeddings", lambda: None)()
    around = outside_modules(network, [*blocks.modules, *([head] if head is not None else [])])
    for name, module in around:
        materialize(module, name, load, recurse=False)
    calls = trunk.calls(tokens[:2])
    path = folder / "acts_observed.bin"
    hidden = _embedded(trunk, tokens, path)
    for _, module in around:
        release(module, recurse=False)
    found: dict[str, SiteStats] = {}
    try:
        for index, block in enumerate(blocks.modules):
            if index % 8 == 0:
                sink.message(f"looking at activations: block {index + 1} of {len(blocks.modules)}")
            materialize(block, blocks.name(index), load)
            found |= _observe_block(blocks, index, calls[index], hidden, tokens.numel(), readers, inputs, costs)
            release(block)
    finally:
        path.unlink(missing_ok=True)
    return found


def _embedded(trunk: Trunk, tokens: Tensor, path: Path) -> Activations:
    width = trunk.embed(tokens[:1]).shape[-1]
    samples, length = tokens.shape
    hidden = Activations((samples, length, width), max(1, BATCH_TOKENS // length), path, create=True)
    for part in hidden.batches:
        hidden.write(part, trunk.embed(tokens[part]))
    return hidden


def _observe_block(
    blocks: Blocks,
    index: int,
    call: BlockCall,
    hidden: Activations,
    tokens: int,
    readers: Sequence[str],
    inputs: Mapping[str, LayerInput],
    costs: bool,
) -> dict[str, SiteStats]:
    """One pass; the block's outputs replace its inputs."""
    block, prefix = blocks.modules[index], blocks.name(index) + "."
    modules = {p: block.get_submodule(p.removeprefix(prefix)) for p in (*inputs, *readers) if p.startswith(prefix)}
    observer = SiteObserver({p: modules[p] for p in readers if p in modules}, tokens, costs)
    with input_hooks(modules, inputs, rounding=False), observer:
        for part, states in hidden:
            hidden.write(part, call(block, states))
    return observer.stats()


@torch.no_grad()
def observe_model(
    model: nn.Module,
    tokens: Tensor,
    readers: Sequence[str],
    inputs: Mapping[str, LayerInput],
    costs: bool = False,
) -> dict[str, SiteStats]:
    """The same for a model in memory, which is run as a whole: once, or with `costs` as often as the memory for them
    asks for."""
    device = next(model.parameters()).device
    modules = {p: model.get_submodule(p) for p in (*inputs, *readers)}
    found: dict[str, SiteStats] = {}
    for part in _parts(modules, readers) if costs else [readers]:
        observer = SiteObserver({p: modules[p] for p in part}, tokens.numel(), costs)
        with input_hooks(modules, inputs, rounding=False), observer:
            for row in tokens:
                model(input_ids=row[None].to(device), use_cache=False)
        found |= observer.stats()
    return found


def _parts(modules: Mapping[str, nn.Module], readers: Sequence[str]) -> Iterator[list[str]]:
    """Readers in turn, so many at a time that the matrices of their inputs fit `_MOST_PRODUCTS`."""
    part: list[str] = []
    held = 0
    for path in readers:
        size = 8 * modules[path].get_parameter("weight").shape[1] ** 2
        if part and held + size > _MOST_PRODUCTS:
            yield part
            part, held = [], 0
        part.append(path)
        held += size
    if part:
        yield part
