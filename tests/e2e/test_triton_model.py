"""A whole model whose linear layers run as interpreted Triton kernels says what the oracle says."""

from __future__ import annotations

import copy

import pytest
import torch
from _models import dequantized, swap_linears, tiny_llama
from torch import nn

from lowbit.codegen import load_backend
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.weights import pack_weights, random_weight

pytest.importorskip("triton", reason="triton is not installed")


class Interpreted(nn.Module):
    """A linear layer that runs its Triton kernel in the interpreter."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        layout = LAYOUTS[load_backend("triton").layout_of(layer.fmt)]
        self.spec = KernelSpec((layer.out_features,), layer.in_features, str(layer.fmt), str(layout), "float")
        self.weight = pack_weights([layer.qtensor()], layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from lowbit.codegen.triton.interpret import Call, run_interpreted

        flat = x.reshape(-1, self.spec.k).contiguous()
        schedule = next(iter(load_backend("triton").schedules(self.spec, Target.parse("sm_90"), len(flat))))
        (y,) = run_interpreted([Call(self.spec, schedule, flat, self.weight)])
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)


def vector_llama(fmt: str) -> nn.Module:
    """One layer whose linear layers hold random vectors."""
    model: nn.Module = tiny_llama(num_hidden_layers=1)
    rng = torch.Generator().manual_seed(2)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not path.endswith("lm_head"):
            q = random_weight(parse_format(fmt), module.out_features, module.in_features, rng)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, QuantLinear.from_qtensor(q))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["int4.g32.sym", "vq.d4.k256.cn"])
def test_layers_agree_with_the_oracle(fmt: str) -> None:
    model = vector_llama(fmt) if fmt.startswith("vq") else swap_linears(tiny_llama(), fmt)
    oracle = dequantized(copy.deepcopy(model))
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Interpreted(module))
    ids = torch.arange(16)[None]
    with torch.no_grad():
        want, got = (m(ids).logits.double() for m in (oracle, model))
    p, q = torch.log_softmax(want, -1), torch.log_softmax(got, -1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert abs(kl) < 1e-6
    # A random model's distribution is flat and hides errors; its logits do not.
    assert float((got - want).norm() / want.norm()) < 1e-4
