"""Where two models part ways, and which pass is to blame."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from _models import swap_linears, tiny_llama
from torch import nn
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

import lowbit
from lowbit.compiler.errors import RunError
from lowbit.compiler.frontend.bisect import bisect_passes
from lowbit.compiler.frontend.dynamo import passes
from lowbit.compiler.ir.graph import Mul, SiluMul
from lowbit.compiler.runtime import dispatch


def test_first_divergence_is_the_changed_module() -> None:
    reference = tiny_llama()
    model = copy.deepcopy(reference)
    same = lowbit.locate(model, reference, torch.arange(6))
    assert same.first is None
    assert same.kl == pytest.approx(0.0, abs=1e-7)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(3.0)
    found = lowbit.locate(model, reference, torch.arange(6))
    assert found.first == "model.layers.1.mlp.up_proj"
    assert found.kl is not None
    assert found.kl > 1e-9
    worst = next(m for m in found.modules if m.path == found.first)
    assert worst.relative == pytest.approx(2.0, rel=1e-4)
    assert f"first divergence: {found.first}" in found.text()
    with pytest.raises(RunError, match="LB0573"):
        lowbit.locate(nn.Flatten(), nn.Flatten(), torch.zeros(1, 2))


@dataclass(frozen=True)
class DropSilu(ModulePass):
    """A wrong pass: gate * up without silu."""

    name = "drop-silu"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for found in list(op.walk()):
            if isinstance(found, SiluMul):
                Rewriter.replace_op(found, Mul(list(found.args_), [found.outs[0].type]))


class Gated(nn.Module):
    """A gated feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((32, 48), (32, 48), (48, 32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_bisection_names_the_wrong_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    dispatch.reset()
    model = swap_linears(Gated(), "int4.g32.sym")
    first, *rest = passes()
    found = bisect_passes(model, {"x": torch.ones(5, 32)}, 1e-5, [first, DropSilu(), *rest])
    assert found.first == "drop-silu"
    assert [name for name, _ in found.errors] == [
        "import",
        "canonicalize",
        "drop-silu",
        "fuse-siblings",
        "fuse-epilogue",
        "fuse-norm",
    ]
    assert found.errors[1][1] < 1e-6
    assert bisect_passes(model, {"x": torch.ones(5, 32)}, 1e-5).first is None
    dispatch.reset()
