"""One block: quantize and hand on; or quantize, tune against what the float block would have put out, hand on.

Tuning and asymmetric calibration take two streams of hidden states: what the quantized blocks so far put out (the
block's input) and what the float blocks put out (which gives the target). Calibration statistics come from the first
in sequential runs, from the second in parallel ones; asymmetric ones from both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import BlockCall
from lowbit.compiler.job.engine import BlockEngine, Group
from lowbit.compiler.job.tune import TuneResult, tune_block
from lowbit.compiler.job.twin import FloatTwin
from lowbit.quantizers.formats import WeightFormat
from lowbit.quantizers.scheme import Tuning
from lowbit.quantizers.weights import QWeight

__all__ = ["States", "run_tuned", "run_untuned"]


@dataclass(frozen=True, eq=False)
class States:
    """Hidden states between two blocks: behind the quantized blocks, and in tuned and in asymmetric runs behind the
    float ones too.

    Parallel runs that are not tuned have the float ones only, as `hidden`.
    """

    hidden: Activations
    reference: Activations | None = None

    @property
    def streams(self) -> dict[str, Activations]:
        """The streams by name."""
        return {"hidden": self.hidden, **({"reference": self.reference} if self.reference else {})}


def run_untuned(
    engine: BlockEngine,
    block: nn.Module,
    call: BlockCall,
    linears: Mapping[str, tuple[nn.Linear, WeightFormat]],
    inputs: States,
    outputs: States | None,
    done: Mapping[str, QWeight],
    twin: FloatTwin | None = None,
) -> None:
    """Quantize one block whose weights are loaded in float32, and write what the next one will see.

    outputs: None after the last block. twin: the float block, if the run is asymmetric.
    """
    engine.run(block, call, linears, inputs.hidden, outputs.hidden if outputs else None, done, twin)
    if twin is not None and outputs is not None and outputs.reference is not None:
        twin.forward(outputs.reference)


def run_tuned(
    engine: BlockEngine,
    block: nn.Module,
    call: BlockCall,
    linears: Mapping[str, tuple[nn.Linear, WeightFormat]],
    inputs: States,
    outputs: States,
    done: Mapping[str, QWeight],
    tuned: TuneResult | None,
    tuning: Tuning,
    twin: FloatTwin | None = None,
) -> TuneResult:
    """Quantize and tune one block whose weights are loaded in float32, and write what the next one will see.

    done: layers whose codes are known. tuned: the result of an earlier run that was interrupted after it, if any. twin:
    as in `run_untuned`. The block is left with its final weights.
    """
    weights: dict[str, QWeight] = dict(done)

    def note(group: Group) -> None:
        weights.update({path: q for path, (q, _) in group.items()})
        engine.finished(group)

    assert inputs.reference is not None
    assert outputs.reference is not None
    targets = outputs.reference
    noting = replace(engine, finished=note)
    if engine.sequential:
        _forward(block, call, inputs.reference, targets)
        noting.run(block, call, linears, inputs.hidden, None, done, twin)
    else:
        noting.run(block, call, linears, inputs.reference, targets, done)
    if tuned is None:
        quantized = {path: (layer, weights[path]) for path, (layer, _) in linears.items()}
        tuned = tune_block(block, call, quantized, inputs.hidden, targets, tuning)
    _use_result(block, {path: layer for path, (layer, _) in linears.items()}, tuned)
    _forward(block, call, inputs.hidden, outputs.hidden)
    return tuned


@torch.no_grad()
def _use_result(block: nn.Module, layers: Mapping[str, nn.Linear], result: TuneResult) -> None:
    """Give the block the dense form of its quantized weights and its tuned tensors."""
    for path, q in result.weights.items():
        layers[path].weight.data.copy_(q.dequantize())
    for name, value in result.plain.items():
        owner, _, leaf = name.rpartition(".")
        parameter: Tensor = getattr(block.get_submodule(owner), leaf)
        parameter.data.copy_(value)


@torch.no_grad()
def _forward(block: nn.Module, call: BlockCall, inputs: Activations, outputs: Activations) -> None:
    for samples, hidden in inputs:
        outputs.write(samples, call(block, hidden))
