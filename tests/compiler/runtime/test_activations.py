"""Layers with rounded activations: modules, siblings, gated MLPs, and their state."""

from __future__ import annotations

import pytest
import torch
from _models import round_to_nearest, tiny_llama
from torch import nn

from lowbit.compiler.errors import FormatError
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.compile import compile_model
from lowbit.compiler.runtime.fused import QuantGatedMLP, SiblingLinear, fuse_gated_mlp, fuse_siblings
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear
from lowbit.quantizers.formats import parse_activation, parse_format, scalar_format
from lowbit.quantizers.hadamard import rotate
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.weights import random_weight


def weight(fmt: str, n: int, k: int, seed: int = 0) -> QTensor:
    q = random_weight(parse_format(fmt), n, k, torch.Generator().manual_seed(seed))
    assert isinstance(q, QTensor)
    return q


def expected(q: QTensor, x: torch.Tensor, activation: str, scale: torch.Tensor | None = None) -> torch.Tensor:
    dense = q.dequantize()
    if q.perm is not None:
        x, dense = x[..., q.perm.long()], dense[:, q.perm.long()]
    return parse_activation(activation).apply(x, scale) @ dense.T


def test_a_layer_computes_with_rounded_inputs_and_keeps_them_in_its_state() -> None:
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    q, scale = weight("int4.g64.sym.perm", 24, 128), torch.tensor([0.02, 0.3])
    layer = QuantLinear.from_qtensor(q, torch.randn(24), activation="int4.g64.w1.static", input_scale=scale)
    want = expected(q, x, "int4.g64.w1.static", scale) + layer.bias
    assert torch.allclose(layer(x), want, atol=2e-5)
    assert not torch.allclose(want, x @ q.dequantize().T + layer.bias, atol=1e-2)
    other = QuantLinear(128, 24, q.fmt, bias=True, activation="int4.g64.w1.static")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.state_dict()["input_scale"], scale)
    assert "int4.g64.w1.static" in repr(layer)
    low = layer.to(torch.bfloat16)(x.bfloat16())
    assert torch.allclose(
        low.float(), expected(q, x.bfloat16().float(), "int4.g64.w1.static", scale) + layer.bias.float(), atol=0.1
    )


@pytest.mark.parametrize("n", [32, 36])
def test_a_layer_rotates_its_input_as_its_weight_was(n: int) -> None:
    """Powers of two in the kernel, other orders before it."""
    k = 4 * n
    q = weight("int8.ch.sym", 16, k)
    layer = QuantLinear.from_qtensor(q, activation="int8.token", rotate=n)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(2))
    want = expected(q, rotate(x, n), "int8.token")
    assert torch.allclose(layer(x), want, rtol=1e-4, atol=2e-4)


def test_what_does_not_fit_is_refused() -> None:
    q = weight("int4.g48.sym", 16, 192)
    with pytest.raises(FormatError, match="LB0243") as refused:
        QuantLinear.from_qtensor(q, activation="int8.g64")
    assert "groups of 48 weights" in str(refused.value)
    x = torch.randn(2, 192)
    layer = QuantLinear.from_qtensor(q, activation="int8.g64", compute="float")
    assert torch.allclose(layer(x), expected(q, x, "int8.g64"), atol=2e-5)
    with pytest.raises(FormatError, match="LB0241"):
        QuantLinear.from_qtensor(q, activation="int8.token.static")
    with pytest.raises(FormatError, match="LB0241"):
        QuantLinear.from_qtensor(q, activation="int8.token", input_scale=torch.ones(1))
    with pytest.raises(FormatError, match="LB0243"):
        QuantLinear(64, 32, parse_format("vq.d4.k256"), activation="int8.token")


class Block(nn.Module):
    """Three siblings and a gated MLP."""

    def __init__(self, activation: str, **extra: torch.Tensor) -> None:
        super().__init__()
        perm = torch.randperm(64, generator=torch.Generator().manual_seed(3))

        def layer(n: int, k: int, seed: int, **more: torch.Tensor) -> QuantLinear:
            q = weight("int4.g32.sym", n, k, seed)
            return QuantLinear.from_qtensor(q.in_order(perm) if k == 64 else q, activation=activation, **more)

        self.q, self.k, self.v = layer(24, 64, 1, **extra), layer(16, 64, 2, **extra), layer(16, 64, 3, **extra)
        self.mlp = nn.Module()
        self.mlp.gate, self.mlp.up = layer(32, 64, 4, **extra), layer(32, 64, 5, **extra)
        self.mlp.down_proj = layer(64, 32, 6, **({"input_scale": torch.ones(1)} if extra else {}))
        self.mlp.forward = lambda x: self.mlp.down_proj(nn.functional.silu(self.mlp.gate(x)) * self.mlp.up(x))


@pytest.mark.parametrize("static", [False, True])
def test_siblings_and_gated_mlps_share_one_rounding(static: bool) -> None:
    extra = {"input_scale": torch.tensor([0.1, 0.2])} if static else {}
    block = Block("int4.g32.static" if static else "int8.g32", **extra)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    before = [block.q(x), block.k(x), block.v(x), block.mlp.forward(x)]
    state = block.state_dict()
    assert fuse_siblings(block, ("q", "k", "v"))
    assert fuse_gated_mlp(block, "mlp.gate", "mlp.up")
    assert isinstance(block.q, SiblingLinear)
    assert isinstance(block.mlp, QuantGatedMLP)
    assert block.q.shared.activation == block.mlp.gate_up.activation != ""
    after = [block.q(x), block.k(x), block.v(x), block.mlp(x)]
    for a, b in zip(before, after, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4)
    assert state.keys() == block.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    assert len([m for m in block.modules() if isinstance(m, PackedLinear)]) == 3


def test_layers_that_round_differently_stay_apart() -> None:
    block = Block("int8.g32")
    block.k = QuantLinear.from_qtensor(block.k.qtensor(), activation="int8.token")
    assert not fuse_siblings(block, ("q", "k", "v"))
    block.mlp.up = QuantLinear.from_qtensor(weight("int4.g32.sym.perm", 32, 64, 9), activation="int8.g32")
    assert not fuse_gated_mlp(block, "mlp.gate", "mlp.up")


def test_compiled_models_round_once_for_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    dispatch.reset()
    model = tiny_llama(num_hidden_layers=1)
    for path, old in list(model.named_modules()):
        if isinstance(old, nn.Linear) and path != "lm_head":
            q, n = round_to_nearest(old.weight, scalar_format("int4.g32.sym")), 32 if path.endswith("down_proj") else 0
            parent, _, name = path.rpartition(".")
            layer = QuantLinear.from_qtensor(q, activation="int8.g32", rotate=n)
            setattr(model.get_submodule(parent), name, layer)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        want = model(ids).logits
        model = compile_model(model, max_tokens=16)
        assert torch.allclose(model(ids).logits, want, atol=1e-4)
    assert [len(paths) for paths in model.lowbit_report.fused] == [3, 2]
    ir = model.lowbit_report.ir
    assert ir.count("lbk.kernel") == ir.count('activation = "int8.g32"') == 4
    assert "lb.quantize" not in ir
