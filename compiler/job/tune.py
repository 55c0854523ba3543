"""Training what quantization left continuous: scales, offsets, codebooks and norm weights, with all codes frozen.

`tune_block` lowers the difference between a quantized block's output and the float model's (the layer-wise fine-tuning
of "VPTQ", the block-wise minimisation of "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling
Parameters into Integer and Floating Points"): its input comes from the quantized blocks before it, its target from the
float blocks, so that it also makes up for what those got wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import BlockCall
from lowbit.quantizers.scheme import Tuning
from lowbit.quantizers.tunable import Tunable, tunable
from lowbit.quantizers.weights import QWeight

__all__ = ["Optimizer", "TuneResult", "norm_parameters", "standing_in", "tune_block"]

_PROBE = 16  # samples on which a block is measured before and after
_TINY = 1e-12


@dataclass(frozen=True)
class TuneResult:
    """What tuning changed: weights by module path, other tensors by name in the block; `before` and `after`: mean
    squared error relative to the target, per token. What was given comes back when training would not have helped."""

    weights: Mapping[str, QWeight]
    plain: Mapping[str, Tensor]
    before: float
    after: float


def tune_block(
    block: nn.Module,
    call: BlockCall,
    linears: Mapping[str, tuple[nn.Linear, QWeight]],
    inputs: Activations,
    targets: Activations,
    tuning: Tuning,
) -> TuneResult:
    """Tune the side values of `linears` (path -> layer, its quantized weight) and, if asked, the block's norms.

    The block is left with its weights as they were. Deterministic for a number of threads: samples are taken in order.
    """
    parts = {path: tunable(q) for path, (_, q) in linears.items()}
    norms = norm_parameters(block, {id(m) for m, _ in linears.values()}) if tuning.norms else {}
    kept = {name: p.detach().clone() for name, p in norms.items()}
    pairs = [(layer, parts[path]) for path, (layer, _) in linears.items()]
    with standing_in(pairs), torch.enable_grad():
        probe = slice(0, min(_PROBE, inputs.shape[0]))
        before = _probe(block, call, inputs, targets, probe)
        optimizer = Optimizer([*_sides(parts.values()), *norms.values()], tuning, _steps(inputs, tuning))
        for _ in range(tuning.epochs):
            for samples in _batches(inputs.shape[0], tuning.batch):
                optimizer.step([_loss(call(block, inputs.read(samples)), targets.read(samples))])
        after = _probe(block, call, inputs, targets, probe)
    plain = {name: p.detach().clone() for name, p in norms.items()}
    for name, p in norms.items():
        p.requires_grad_(False).copy_(kept[name])
    if not after < before:
        return TuneResult({path: q for path, (_, q) in linears.items()}, {}, before, before)
    return TuneResult({path: part.result() for path, part in parts.items()}, plain, before, after)


class Optimizer:
    """Adam whose step is a share of each tensor's own size, decaying along a cosine to zero.

    Scales of 0.01 and centroids of 0.5 so move alike, relative to themselves, whatever the model.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], tuning: Tuning, steps: int) -> None:
        self._rates = [tuning.rate * max(_rms(p), 1e-8) for p in parameters]
        self._adam = torch.optim.Adam([{"params": [p]} for p in parameters], betas=(0.9, 0.99), eps=1e-12)
        self._done, self._steps = 0, steps

    def step(self, losses: Iterable[Tensor]) -> float:
        """One update against the sum of `losses`, which is returned. They are computed and differentiated one after
        the other, so that one graph exists at a time. A step with a loss or gradient that is not finite is skipped."""
        self._adam.zero_grad(set_to_none=True)
        total = 0.0
        for loss in losses:
            loss.backward()
            total += float(loss.detach())
        grads = [p.grad for group in self._adam.param_groups for p in group["params"] if p.grad is not None]
        decay = 0.5 * (1 + math.cos(math.pi * self._done / self._steps))
        self._done += 1
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * decay
        if math.isfinite(total) and all(bool(g.isfinite().all()) for g in grads):
            self._adam.step()
        return total


def _rms(parameter: Tensor) -> float:
    return float(parameter.detach().float().square().mean().sqrt())


def _sides(parts: Iterable[Tunable]) -> list[nn.Parameter]:
    return [p for part in parts for p in part.parameters()]


def _batches(count: int, batch: int) -> list[slice]:
    return [slice(i, min(i + batch, count)) for i in range(0, count, batch)]


def _steps(inputs: Activations, tuning: Tuning) -> int:
    return max(1, tuning.epochs * len(_batches(inputs.shape[0], tuning.batch)))


def _loss(out: Tensor, target: Tensor) -> Tensor:
    """Squared error of each token relative to its target's size, averaged: what follows normalises tokens, so a token
    with huge activations must not count more than others."""
    size = target.square().mean(-1).clamp(min=_TINY)
    return ((out - target).square().mean(-1) / size).mean()


@torch.no_grad()
def _probe(block: nn.Module, call: BlockCall, inputs: Activations, targets: Activations, samples: slice) -> float:
    total, count = 0.0, int(samples.stop)
    for at in _batches(count, 4):
        total += float(_loss(call(block, inputs.read(at)), targets.read(at))) * (at.stop - at.start)
    return total / count


def norm_parameters(module: nn.Module, linears: set[int]) -> dict[str, nn.Parameter]:
    """One-dimensional parameters (norm weights and biases), except the biases of the layers in `linears` (by id)."""
    found: dict[str, nn.Parameter] = {}
    for path, owner in module.named_modules():
        for name, p in owner.named_parameters(recurse=False):
            if p.dim() == 1 and p.device.type != "meta" and id(owner) not in linears:
                found[f"{path}.{name}" if path else name] = p.requires_grad_(True)
    return found


@contextmanager
def standing_in(pairs: Sequence[tuple[nn.Linear, Tunable]]) -> Iterator[None]:
    """While it lasts, the layers multiply with their tunables' weights."""
    for layer, part in pairs:

        def forward(x: Tensor, layer: nn.Linear = layer, part: Tunable = part) -> Tensor:
            return nn.functional.linear(x, part.weight(), layer.bias)

        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer, _ in pairs:
            layer.__dict__.pop("forward", None)
