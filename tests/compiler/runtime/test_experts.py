"""Experts as linear layers: the same model, packed weights held once, one operator a projection."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _experts import MIXTURES, mixture
from _models import dequantized, swap_linears
from torch import nn

import lowbit
from lowbit.compiler.errors import FormatError
from lowbit.compiler.job.kept import kept_matrices
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.experts import (
    Experts,
    expert_layers,
    prepare_experts,
    restore_experts,
    unstack_experts,
)
from lowbit.compiler.runtime.modules import make_invariant

IDS = torch.randint(0, 80, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    dispatch.reset()
    with torch.no_grad():
        yield
    dispatch.reset()


def _logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS, use_cache=False).logits
    return out


def _experts(model: nn.Module) -> Experts:
    return next(m for m in model.modules() if isinstance(m, Experts))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_layers_are_the_same_model(name: str) -> None:
    model = mixture(name)
    want, memory = _logits(model), {p.untyped_storage().data_ptr() for p in model.parameters()}
    originals = unstack_experts(model)
    assert torch.allclose(_logits(model), want, atol=1e-6)  # one by one
    prepare_experts(model)
    assert torch.allclose(_logits(model), want, atol=1e-5)  # in one operator
    layers = expert_layers(model)
    assert "model.layers.0.mlp.experts.3.down_proj" in layers
    assert {m.weight.untyped_storage().data_ptr() for m in layers.values()} <= memory
    restore_experts(model, originals)
    assert not expert_layers(model)
    assert torch.equal(_logits(model), want)


@pytest.mark.parametrize("name", MIXTURES)
def test_quantized_experts_give_what_their_numbers_give(name: str) -> None:
    model = swap_linears(mixture(name), "int4.g32.asym")
    experts, got = _experts(model), _logits(model)
    assert torch.allclose(got, _logits(dequantized(copy.deepcopy(model))), atol=1e-4)
    # The layers' tensors are views of what the operator reads, in a copy of the model too.
    for m in (experts, _experts(copy.deepcopy(model))):
        held = m._stacks["up_proj"].operands[0]
        assert m.layer(2, "up_proj").inner.plane0.data_ptr() == held[2].data_ptr()  # type: ignore[union-attr]
    # Whoever hooks a layer sees what it reads, and the result stays the same.
    seen: list[torch.Tensor] = []
    hook = experts.layer(1, "down_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert torch.allclose(_logits(model), got, atol=1e-5)
    hook.remove()
    assert len(seen) == 1
    assert torch.allclose(_logits(model.bfloat16()).float(), got, atol=0.2)


def test_formats_may_differ_and_float_layers_stay() -> None:
    model = mixture("Qwen3Moe")
    unstack_experts(model)
    experts = _experts(model)
    swap_linears(experts.get_submodule("0"), "int8.ch.sym")
    swap_linears(experts.get_submodule("2"), "int4.g32.sym", skip=("up_proj",))
    prepare_experts(model)
    assert len(set(experts._stacks["up_proj"].specs)) == 2
    assert torch.allclose(_logits(model), _logits(dequantized(copy.deepcopy(model))), atol=1e-4)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = mixture("Mixtral")
    names = set(model.state_dict())
    with pytest.raises(FormatError, match="LB0213"):  # rows of 64 columns have no groups of 128
        lowbit.quantize(model, "w4a16", format="int4.g128.sym", method="rtn")
    assert set(model.state_dict()) == names


def test_settings_of_the_layers_reach_the_operator() -> None:
    model = swap_linears(mixture("Mixtral"), "int4.g32.sym")
    make_invariant(model)
    stack = _experts(model)._stacks["down_proj"]
    assert [dispatch.parse_spec(spec).invariant for spec in stack.specs] == [True]


def test_what_is_not_understood_is_left_and_named() -> None:
    """A norm behind every expert is not known here, so such experts stay in one parameter, and every report says so."""
    model = mixture("Mixtral")
    model.model.layers[0].mlp.experts.has_post_expert_norm = True  # type: ignore[union-attr,index]
    assert not unstack_experts(model)
    line = kept_matrices(model)[0]
    assert line.startswith("49,152 weights kept as stored: model.layers.0.mlp.experts.gate_up_proj (4 x 192 x 64")
    assert "experts in one parameter" in line
