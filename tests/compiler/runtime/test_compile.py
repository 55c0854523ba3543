"""lowbit.compile: fused modules give the oracle's logits, the state dict keeps its names, frozen means frozen."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

import pytest
import torch
from _models import dequantized, swap_linears, tiny_llama
from torch import nn

from lowbit.compiler.errors import KernelError, RunError
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.compile import compile_model
from lowbit.compiler.runtime.fused import QuantGatedMLP, SiblingLinear
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear, make_invariant

IDS = torch.arange(24).reshape(2, 12)
ALL_BUT_DOWN = ("lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")


@pytest.fixture(autouse=True)
def _reference_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is tested here is independent of the backend; one case below uses the real one."""
    dispatch.reset()
    if "real_kernels" not in request.keywords:
        monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    yield
    dispatch.reset()


def kl(model: nn.Module, reference: nn.Module) -> float:
    with torch.no_grad():
        p, q = (torch.log_softmax(m(IDS).logits.double(), -1) for m in (reference, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.real_kernels
@pytest.mark.parametrize("fmt", ["int4.g32.sym", "int3.g48.asym", "vq.d4.k16.r4", "e2m3.ch"])
def test_compiled_model_agrees_with_the_oracle(fmt: str) -> None:
    model = swap_linears(tiny_llama(), fmt)
    oracle = dequantized(copy.deepcopy(model))
    compile_model(model, max_tokens=24)
    assert abs(kl(model, oracle)) < 1e-6
    assert sum(isinstance(m, QuantGatedMLP) for m in model.modules()) == 2
    assert sum(isinstance(m, SiblingLinear) for m in model.modules()) == 6
    assert len(model.lowbit_report.fused) == 4
    assert "lb.call" in model.lowbit_report.ir


def test_state_dict_is_the_checkpoints() -> None:
    model = swap_linears(tiny_llama(), "int4.g32.asym")
    before = model.state_dict()
    after = compile_model(model, max_tokens=8).state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_layers_with_bias_stay_separate_and_right() -> None:
    model = swap_linears(tiny_llama(attention_bias=True, mlp_bias=True), "int4.g32.sym")
    oracle = dequantized(copy.deepcopy(model))
    compile_model(model, max_tokens=8)
    assert not any(isinstance(m, (QuantGatedMLP, SiblingLinear)) for m in model.modules())
    assert abs(kl(model, oracle)) < 1e-6


def test_generation_works_and_matches_the_oracle() -> None:
    model = swap_linears(tiny_llama(), "int8.ch.sym")
    oracle = dequantized(copy.deepcopy(model))
    compile_model(model, max_tokens=16)
    want = oracle.generate(IDS[:1, :5], max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(IDS[:1, :5], max_new_tokens=8, do_sample=False), want)


def test_frozen_refuses_what_was_not_built() -> None:
    model = compile_model(swap_linears(tiny_llama(), "int5.g32.sym"), max_tokens=8, frozen=True)
    with torch.no_grad():
        model(IDS[:1, :8])
        with pytest.raises(KernelError, match="LB0409"):
            model(IDS)


def test_siblings_called_out_of_order_or_alone_are_right() -> None:
    model = swap_linears(tiny_llama(), "int4.g32.sym")
    attention = model.model.layers[0].self_attn
    q, k = copy.deepcopy(attention.q_proj), copy.deepcopy(attention.k_proj)
    compile_model(model, max_tokens=8)
    x, z = torch.randn(3, 64), torch.randn(3, 64)
    assert torch.equal(attention.k_proj(x), k(x))
    assert torch.equal(attention.k_proj(z), k(z))
    assert torch.equal(attention.q_proj(x), q(x))
    assert torch.equal(attention.q_proj(x), q(x))


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(RunError, match="LB0503"):
        compile_model(tiny_llama())


def test_an_untraceable_model_still_runs_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_layer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    with caplog.at_level(logging.WARNING, "lowbit"):
        model = compile_model(Odd(), max_tokens=4)
    assert "not fused" in caplog.text
    assert model(torch.randn(2, 64)).shape == (2, 32)


def tiny_layer() -> QuantLinear:
    from _models import random_qtensor

    return QuantLinear.from_qtensor(random_qtensor("int4.g32.sym", 32, 64))


@pytest.mark.real_kernels
def test_batch_invariant_logits_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set by argument or environment, for layers alone and fused; one kernel per layer serves every call."""
    layer = swap_linears(tiny_llama(num_hidden_layers=1), "int4.g32.sym", ALL_BUT_DOWN).model.layers[0].mlp.down_proj
    x = torch.randn(19, 96)
    make_invariant(layer)
    with torch.no_grad():
        whole = layer(x)
        assert all(torch.equal(layer(x[:m]), whole[:m]) for m in (1, 2, 5, 8, 9))
    assert len(dispatch.loaded_kernels()) == 1
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    model = compile_model(swap_linears(tiny_llama(), "int4.g32.sym"), max_tokens=8, batch_invariant=True)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert packed
    assert all(m.invariant and '"invariant":true' in m.key for m in packed)
    monkeypatch.setenv("LOWBIT_BATCH_INVARIANT", "1")
    assert all(m.invariant for m in swap_linears(tiny_llama(), "int4.g32.sym").modules() if isinstance(m, PackedLinear))
