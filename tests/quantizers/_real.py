"""Real matrices and the Hessians of their inputs, for tests of the orderings that only real layers show."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from _data import data_path, real_model
from torch import Tensor, nn

from lowbit.compiler.job.models import find_model
from lowbit.quantizers.calibration import HessianAccumulator, LayerStats, calibration_tokens

__all__ = ["REAL_LAYERS", "real_cases"]

REAL_LAYERS = {"3.q": "3.self_attn.q_proj", "14.o": "14.self_attn.o_proj", "20.gate": "20.mlp.gate_proj"}
"""Short name -> module path below the list of blocks; in the order in which a forward pass meets them."""

_SAMPLES, _LENGTH, _BATCH = 16, 512, 4


class _Done(Exception):
    """Raised out of a forward pass when the last layer was seen."""


def real_cases() -> dict[str, tuple[Tensor, LayerStats]]:
    """Weight float32 [N, K] and input statistics of the layers in `REAL_LAYERS`; skips where the data is absent.

    Calibration is 16 x 512 tokens of WikiText-2's validation split through the unquantized model.
    """
    source, text = find_model(str(real_model())), data_path("wikitext2-valid-tokens.txt")
    tokens = calibration_tokens(source.tokenizer(), str(text), _SAMPLES, _LENGTH)
    model: Any = source.load()
    linears: dict[str, nn.Linear] = {name: model.get_submodule(f"model.layers.{p}") for name, p in REAL_LAYERS.items()}
    sums = {name: HessianAccumulator(linear.in_features) for name, linear in linears.items()}
    last = list(REAL_LAYERS)[-1]
    handles = [m.register_forward_pre_hook(_hook(sums[name], name == last)) for name, m in linears.items()]
    with torch.inference_mode():
        for batch in tokens.split(_BATCH):
            with suppress(_Done):
                model.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (m.weight.detach().float().clone(), sums[name].stats()) for name, m in linears.items()}


def _hook(accumulator: HessianAccumulator, last: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        accumulator.add(args[0])
        if last:
            raise _Done

    return see
