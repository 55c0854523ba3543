"""QuantLinear and its operator: right numbers, one copy of the weights, and everything torch does to modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _models import random_qtensor, swap_linears, tiny_llama
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit.compiler.errors import FormatError, KernelError, RunError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.qtensor import pack


@pytest.fixture(autouse=True)
def _reference_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Most cases are independent of the backend; `test_forward_is_x_times_the_oracle` uses the real one."""
    dispatch.reset()
    if "real_kernels" not in request.keywords:
        monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    yield
    dispatch.reset()


RTOL = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.real_kernels
@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        ("int4.g64.sym", torch.float32),
        ("int4.g64.sym", torch.bfloat16),
        ("int3.g48.asym", torch.float16),
        ("int1.ch.sym", torch.float32),
        ("int8.t.sym", torch.float32),
        ("int2.g32.asym.bf16", torch.bfloat16),
    ],
)
def test_forward_is_x_times_the_oracle(fmt: str, dtype: torch.dtype) -> None:
    q = random_qtensor(fmt, 40, 100)
    layer = QuantLinear.from_qtensor(q)
    x = torch.randn(2, 3, 100, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert relative(y, x.float() @ q.dequantize().T) < RTOL[dtype]


def test_bias_empty_input_and_wrong_width() -> None:
    q, bias = random_qtensor("int4.g32.sym", 24, 64), torch.randn(24)
    layer = QuantLinear.from_qtensor(q, bias)
    x = torch.randn(5, 64)
    assert relative(layer(x), x @ q.dequantize().T + bias) < 1e-3
    assert layer(x[:0]).shape == (0, 24)
    for shape in [(5, 63), (2, 128), (2, 2, 32), (0, 32), (128,), ()]:
        with pytest.raises(KernelError, match=r"LB0417.*64"):
            layer(torch.randn(shape))
    for dtype in (torch.float64, torch.int64, torch.bool):
        with pytest.raises(KernelError, match=f"LB0401.*{dtype}"):
            layer(x.to(dtype))


@pytest.mark.filterwarnings("ignore:lowbit..linear. an autograd kernel was not registered")
def test_gradients_are_refused_where_they_would_be_lost() -> None:
    layer = QuantLinear.from_qtensor(random_qtensor("int4.g32.sym", 24, 64))
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)  # allowed: parameters of an embedding need gradients unless somebody says otherwise
    with pytest.raises(RunError, match="LB0571"):
        y.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize(
    "fmt", ["int4.g64.sym", "int3.g48.asym", "int5.t.asym", "int1.g32.sym", "bcq2.g64", "tcq3.g32"]
)
def test_state_dict_round_trips_before_and_after_preparing(fmt: str) -> None:
    q = random_qtensor(fmt, 21, 100)
    layer = QuantLinear.from_qtensor(q, torch.randn(21))
    saved = layer.state_dict()
    other = QuantLinear(100, 21, parse_format(fmt), bias=True)
    assert {k: (v.shape, v.dtype) for k, v in other.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in saved.items()
    }
    other.load_state_dict(saved)
    assert not other.prepared
    again = other.prepare().state_dict()
    assert all(torch.equal(saved[k], again[k]) for k in saved)
    x = torch.randn(3, 100)
    assert torch.equal(other(x), layer(x))


@torch.no_grad()
@pytest.mark.parametrize("fmt", ["int4.g32.asym", "int8.ch.sym"])
def test_state_dicts_load_into_prepared_and_fused_layers(fmt: str) -> None:
    ids = torch.arange(12)[None]
    source, other = (swap_linears(tiny_llama(seed), fmt) for seed in (0, 1))
    fused = lowbit.compile(swap_linears(tiny_llama(2), fmt), max_tokens=16)
    want = source(ids).logits
    for model in (other, fused):
        held = [b.data_ptr() for b in model.buffers()]
        assert not torch.allclose(model(ids).logits, want)
        model.load_state_dict(source.state_dict())
        assert torch.equal(model(ids).logits, want)
        assert held == [b.data_ptr() for b in model.buffers()]  # experts read the same memory
    part = fused.state_dict()
    part.pop("model.layers.1.mlp.up_proj.weight_scale")
    missing, unexpected = other.load_state_dict({**part, "x": want}, strict=False)
    assert (missing, unexpected) == (["model.layers.1.mlp.up_proj.weight_scale"], ["x"])
    wider = swap_linears(tiny_llama(hidden_size=128), fmt)
    with pytest.raises((FormatError, RuntimeError), match=r"LB0227|size mismatch"):
        wider.load_state_dict(source.state_dict())


@torch.no_grad()
def test_watched_layers_are_not_fused_away() -> None:
    model, calls = swap_linears(tiny_llama(), "int4.g32.sym"), []
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        model.model.layers[0].get_submodule(name).register_forward_hook(lambda *call: calls.append(call))
    lowbit.compile(model, max_tokens=4)
    calls.clear()  # of the copy that was traced
    model(torch.arange(4)[None])
    assert len(calls) == 2
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    assert isinstance(first, QuantLinear)
    assert not isinstance(second, QuantLinear)


def test_weights_are_held_once() -> None:
    layer = QuantLinear(256, 64, parse_format("int4.g64.sym"))
    layer.prepare()
    held = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert held == 64 * 256 // 2 + 64 * 4 * 2


def test_changing_the_models_dtype_keeps_the_scales() -> None:
    q = random_qtensor("int4.g32.sym", 32, 64)
    layer = nn.Sequential(QuantLinear.from_qtensor(q, torch.randn(32)))
    layer.to(torch.bfloat16)
    assert torch.equal(layer[0].qtensor().scale, q.scale)
    assert layer[0].bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_layer_without_weights_says_so() -> None:
    with pytest.raises(FormatError, match="LB0224"):
        QuantLinear(64, 32, parse_format("int4.g32.sym"), device="meta").prepare()
    with pytest.raises(FormatError, match="LB0213"):
        QuantLinear(16, 32, parse_format("int4.g32.sym"))


def test_deepcopy_gives_an_equal_layer() -> None:
    layer = QuantLinear.from_qtensor(random_qtensor("int4.g32.asym", 32, 64))
    x = torch.randn(2, 64)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_operator_passes_torchs_own_checks() -> None:
    q = random_qtensor("int4.g32.asym", 32, 64)
    inner = PackedLinear(pack([q], LAYOUTS["panel16"]), "float", ("bias", "residual"))
    p = inner.packed()
    args = (torch.randn(2, 3, 64), list(p.tensors.values()), torch.randn(32), torch.randn(2, 3, 32), inner.key)
    torch.library.opcheck(torch.ops.lowbit.linear, args)


def test_whoever_watches_sees_the_operator() -> None:
    """A plain call goes to the kernel without torch's dispatcher; what would notice gets the operator."""
    layer = QuantLinear.from_qtensor(random_qtensor("int4.g32.asym", 32, 64), torch.randn(32))
    inner = layer.inner
    assert inner is not None
    for x in (torch.randn(2, 3, 64), torch.randn(64, 3).T, torch.randn(0, 64), torch.randn(64)):
        want = torch.ops.lowbit.linear(x, inner.operands(), layer.bias, None, inner.key)
        assert torch.equal(layer(x), want)
        assert layer(x).shape == want.shape
    x = torch.randn(3, 64)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Seen():
        layer(x)
    assert "lowbit.linear.default" in names
    with torch.profiler.profile() as profile:
        layer(x)
    assert "lowbit::linear" in [event.key for event in profile.key_averages()]
    assert "lowbit.linear" in make_fx(layer)(x).code
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        assert "lowbit::linear" in str(torch.jit.trace(layer, x, check_trace=False).inlined_graph)
    assert layer(torch.randn(2, 64, device="meta")).device.type == "meta"


def test_hooks_of_the_packed_weights_are_called() -> None:
    layer = QuantLinear.from_qtensor(random_qtensor("int4.g32.asym", 32, 64))
    seen: list[Any] = []
    for register in (layer.inner.register_forward_pre_hook, layer.inner.register_forward_hook):
        handle = register(lambda *call: seen.append(call))
        layer(torch.randn(2, 64))
        handle.remove()
    layer(torch.randn(2, 64))
    assert [len(call) for call in seen] == [2, 3]


def test_survives_compile_and_export() -> None:
    model = nn.Sequential(
        QuantLinear.from_qtensor(random_qtensor("int4.g32.sym", 48, 64)),
        nn.SiLU(),
        QuantLinear.from_qtensor(random_qtensor("int3.g48.asym", 16, 48), torch.randn(16)),
    )
    x = torch.randn(4, 64)
    want = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), want)
    assert torch.equal(compiled(x[:3]), model(x[:3]))
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},))
    assert torch.equal(program.module()(torch.cat([x, x])), model(torch.cat([x, x])))
