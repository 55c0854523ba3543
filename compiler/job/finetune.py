"""Training all side values of a quantized model together, to predict what the float model predicts.

The loss is the Kullback-Leibler divergence of the quantized model's next-token distribution from the float model's on
the calibration tokens (knowledge distillation; the end-to-end stage that "VPTQ" reports and leaves open). Codes stay
frozen; scales, offsets, codebooks and norm weights are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowbit.compiler.job.tune import Optimizer, TuneResult, norm_parameters, standing_in
from lowbit.quantizers.scheme import Tuning
from lowbit.quantizers.tunable import Tunable, tunable
from lowbit.quantizers.weights import QWeight

__all__ = ["finetune"]

_PROBE = 8  # samples on which the model is measured before and after


def finetune(
    model: nn.Module,
    weights: Mapping[str, QWeight],
    plain: Mapping[str, Tensor],
    tokens: Tensor,
    tuning: Tuning,
    say: Callable[[str], None] = lambda text: None,
) -> TuneResult:
    """Train the side values of `weights` (module path -> matrix); `plain` are tensors that block tuning changed.

    model: the float model, in float32, whose own weights are the teacher's and stay as they are. tokens: int64
    [samples, length]. Returns the new values (those given when the divergence on the first samples did not fall); its
    `before` and `after` are nats per token.
    """
    parts = {path: tunable(q) for path, q in weights.items()}
    layers = {path: model.get_submodule(path) for path in weights}
    pairs = [(layer, parts[path]) for path, layer in layers.items() if isinstance(layer, nn.Linear)]
    owned = {id(layer) for layer in layers.values()}
    norms = norm_parameters(model, owned) if tuning.norms else {}
    # The student's norms are tensors of their own; the model keeps the teacher's.
    students = {name: nn.Parameter(plain.get(name, p.detach()).clone()) for name, p in norms.items()}
    frozen = {name: value for name, value in plain.items() if name not in students}
    for p in norms.values():
        p.requires_grad_(False)
    network = _Student(model, {**frozen, **students}, pairs)
    before = _divergence(model, network, tokens[:_PROBE])
    sides = [p for part in parts.values() for p in part.parameters()]
    batches = [tokens[i : i + tuning.batch] for i in range(0, len(tokens), tuning.batch)]
    optimizer = Optimizer([*sides, *students.values()], tuning, tuning.epochs * len(batches))
    for epoch in range(tuning.epochs):
        for index, batch in enumerate(batches):
            loss = optimizer.step(_loss(model, network, row) / len(batch) for row in batch)
            say(
                f"fine-tuning: pass {epoch + 1} of {tuning.epochs}, step {index + 1} of {len(batches)}: {loss:.4f} nats"
            )
    after = _divergence(model, network, tokens[:_PROBE])
    if not after < before:
        return TuneResult(weights, plain, before, before)
    changed = {**frozen, **{name: p.detach() for name, p in students.items()}}
    return TuneResult({path: part.result() for path, part in parts.items()}, changed, before, after)


class _Student:
    """The model's logits with quantized weights and the student's norms in place of the teacher's."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], pairs: Sequence[tuple[nn.Linear, Tunable]]):
        self._model, self._tensors, self._pairs = model, dict(tensors), pairs

    def __call__(self, tokens: Tensor) -> Tensor:
        inputs = {"input_ids": tokens, "use_cache": False}
        with standing_in(self._pairs):
            out: Tensor = torch.func.functional_call(self._model, self._tensors, (), inputs).logits
        return out


def _loss(model: nn.Module, student: _Student, row: Tensor) -> Tensor:
    """Mean divergence over the tokens of one sample, nats."""
    with torch.no_grad():
        teacher = model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)
    with torch.enable_grad():
        own = student(row[None])[0].float().log_softmax(-1)
        return nn.functional.kl_div(own, teacher, log_target=True, reduction="sum") / len(row)


@torch.no_grad()
def _divergence(model: nn.Module, student: _Student, tokens: Tensor) -> float:
    total = 0.0
    for row in tokens:
        teacher = model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)
        own = student(row[None])[0].float().log_softmax(-1)
        total += float(nn.functional.kl_div(own, teacher, log_target=True, reduction="sum")) / len(row)
    return total / len(tokens)
