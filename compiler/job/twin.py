"""The float block beside the one that is quantized: what its layers read, and what it puts out.

Asymmetric calibration ("GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", Li et al.) wants
both inputs of a layer: what it reads behind everything quantized so far, and what it would read in the float model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import BlockCall, linears_in
from lowbit.quantizers.calibration import hook_inputs
from lowbit.quantizers.inputs import LayerInput, input_hooks

__all__ = ["FloatTwin", "float_twin"]


class _Caught(Exception):
    """Raised out of a forward pass that has shown what it was made for."""


@dataclass(frozen=True, eq=False)
class FloatTwin:
    """A float block, its linear layers by path, and the hidden states that enter it in the float model."""

    block: nn.Module
    call: BlockCall
    layers: Mapping[str, nn.Module]
    inputs: Activations

    def reads(self, path: str, samples: slice) -> Tensor | None:
        """What the layer at `path` reads, one row per token of the samples; None for a layer that reads other rows
        (an expert: the quantized model may send it other tokens) or is not called."""
        hidden, caught = self.inputs.read(samples), list[Tensor]()

        def saw(_path: str, x: Tensor) -> None:
            caught.append(x)
            raise _Caught

        with hook_inputs({path: self.layers[path]}, saw), torch.no_grad():
            try:
                self.call(self.block, hidden)
            except _Caught:
                pass
        whole = bool(caught) and caught[0].shape[:-1].numel() == hidden.shape[:-1].numel()
        return caught[0] if whole else None

    @torch.no_grad()
    def forward(self, outputs: Activations) -> None:
        """Write what the block puts out: the inputs of the next one in the float model."""
        for samples, hidden in self.inputs:
            outputs.write(samples, self.call(self.block, hidden))


@contextmanager
def float_twin(
    block: nn.Module, name: str, call: BlockCall, inputs: Activations, layer_inputs: Mapping[str, LayerInput]
) -> Iterator[FloatTwin]:
    """A copy of a block that is still float and has no hooks, to keep while the block is quantized.

    layer_inputs: how layers see their inputs; the copy's are rotated, as its matrices are, but never rounded.
    """
    twin = copy.deepcopy(block)
    layers = linears_in(twin, name)
    with input_hooks(layers, layer_inputs, rounding=False):
        yield FloatTwin(twin, call, layers, inputs)
