"""`lowbit.quantize` of models in memory: what people hand over, and what stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _models import tiny_llama
from torch import nn

import lowbit
from lowbit.compiler.errors import CheckpointError, FormatError, RunError
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.modules import QuantLinear


@pytest.fixture(autouse=True)
def _reference_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dispatch.reset()
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    yield
    dispatch.reset()


def _rounded(model: nn.Module, fmt: str = "int8.ch.sym") -> nn.Module:
    return lowbit.quantize(model, "w4a16", format=fmt, method="rtn")


class _Twice(nn.Module):
    """One layer under two names, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.other = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.other(self.again(self.first(x)))
        return out


@torch.no_grad()
def test_a_layer_with_two_names_is_quantized_under_both() -> None:
    model, x = _Twice(), torch.randn(3, 64)
    want = model(x)
    _rounded(model)
    assert isinstance(model.first, QuantLinear)
    assert model.first is model.again
    assert float((model(x) - want).norm() / want.norm()) < 0.02


@torch.no_grad()
def test_hooks_stay_with_their_place() -> None:
    model, x, seen = nn.Sequential(nn.Linear(64, 24)), torch.randn(3, 64), []
    handle = model[0].register_forward_hook(lambda *call: seen.append(call[2]))
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    want = model(x)
    got = _rounded(model)(x)
    assert float((got - want).norm() / want.norm()) < 0.02
    assert len(seen) == 2
    handle.remove()
    model(x)
    assert len(seen) == 2


def test_what_cannot_be_quantized_is_refused_by_what_is_wrong_with_it() -> None:
    with pytest.raises(RunError, match=r"LB0504.*itself a linear layer"):
        _rounded(nn.Linear(64, 64))
    with pytest.raises(FormatError, match=r"LB0213.*0: .*5x0"), pytest.warns(UserWarning, match="zero-element"):
        _rounded(nn.Sequential(nn.Linear(0, 5)))
    with pytest.raises(FormatError, match=r"LB0224.*0: "):
        _rounded(nn.Sequential(nn.Linear(64, 64, device="meta")))
    with pytest.raises(CheckpointError, match="LB0116"):
        _rounded(_rounded(nn.Sequential(nn.Linear(64, 64))))
    for wrong in ("a-folder", None, [nn.Linear(64, 64)]):
        with pytest.raises(RunError, match=rf"LB0504.*{type(wrong).__name__}"):
            lowbit.quantize(wrong)  # type: ignore[arg-type]


def test_only_models_with_a_config_become_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"LB0105.*Sequential.*state_dict"):
        lowbit.save(_rounded(nn.Sequential(nn.Linear(64, 64))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    ids = torch.tensor([[1, 2, 80, 3]])
    with pytest.raises(RunError, match=r"LB0523.*80.*vocabulary of 80"):
        lowbit.quantize(tiny_llama(), format="int4.g32.sym", calibration=ids)


def test_models_in_float64_are_quantized_and_then_need_another_type() -> None:
    model = lowbit.quantize(tiny_llama().double(), format="int4.g32.sym", calibration=torch.arange(40).view(4, 10))
    assert model.float()(torch.arange(4)[None]).logits.dtype == torch.float32
