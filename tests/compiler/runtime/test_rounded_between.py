"""Gate and up that round for down: in modules, under torch.compile, and in compiled models. The reference runs both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from _models import round_to_nearest, tiny_llama
from torch import nn

from lowbit.codegen import select
from lowbit.codegen.backend import Backend
from lowbit.codegen.reference.backend import ReferenceBackend
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.frontend import dynamo
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.job.export import _rounded_between, layer_kernels
from lowbit.compiler.job.kernels import needed_kernels
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.compile import compile_model
from lowbit.compiler.runtime.fused import QuantGatedMLP
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.passes.canonicalize import Canonicalize
from lowbit.passes.fuse_epilogue import FuseEpilogue
from lowbit.passes.fuse_requantize import FuseRequantize
from lowbit.passes.fuse_siblings import FuseSiblings
from lowbit.quantizers.formats import scalar_format


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The reference stands for a backend that has kernels of both sides."""

    def supporting(spec: KernelSpec, target: Target) -> Iterator[Backend]:
        yield ReferenceBackend()

    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    monkeypatch.setattr(select, "supporting", supporting)
    dispatch.reset()
    torch._dynamo.reset()
    dynamo.reset_reports()
    with torch.no_grad():
        yield
    dispatch.reset()


def rounded_llama(activation: str) -> nn.Module:
    model = tiny_llama(num_hidden_layers=1)
    for path, old in list(model.named_modules()):
        if isinstance(old, nn.Linear) and path != "lm_head":
            scale = torch.full((1,), 0.02) if activation.endswith("static") else None
            q = round_to_nearest(old.weight, scalar_format("int4.g32.sym"))
            model.set_submodule(path, QuantLinear.from_qtensor(q, activation=activation, input_scale=scale))
    return model


def ids(count: int) -> torch.Tensor:
    return torch.randint(0, 80, (1, count), generator=torch.Generator().manual_seed(count))


def called(monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """Specs of the kernels that calls ask for from now on."""
    from lowbit.compiler.runtime import ops

    found, original = [], ops.kernel_for

    def note(key: str, dtype: torch.dtype, device: torch.device, m: int) -> object:
        found.append(dispatch.parse_spec(key))
        return original(key, dtype, device, m)

    monkeypatch.setattr(ops, "kernel_for", note)
    return found


@pytest.mark.parametrize("activation", ["int8.g32", "int8.token.static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_models_round_where_outputs_are_made(
    activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = compile_model(rounded_llama(activation).to(dtype), max_tokens=8)
    for mlp in (m for m in apart.modules() if isinstance(m, QuantGatedMLP)):
        mlp._between = None
    model = compile_model(rounded_llama(activation).to(dtype), max_tokens=8)
    assert ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj") in (
        model.lowbit_report.fused
    )
    want, seen = apart(ids(5)).logits, called(monkeypatch)
    assert torch.equal(model(ids(5)).logits, want)
    write, read = (s for s in seen if s.uses_rows)
    assert write.out_activation == read.activation == activation
    assert read.reads_rows


def test_checkpoints_and_tuning_know_these_kernels() -> None:
    model, host = rounded_llama("int8.g32").bfloat16(), host_target()
    needs = {need.spec for need in needed_kernels(model, host)}
    layer_kernels(model)  # fuses
    rows = set(_rounded_between(model, host, "bf16"))
    compiled = compile_model(rounded_llama("int8.g32").bfloat16(), max_tokens=1)
    (mlp,) = (m for m in compiled.modules() if isinstance(m, QuantGatedMLP))
    called = {dispatch.parse_spec(key).typed("bf16") for key in mlp.row_keys(torch.bfloat16)}
    assert rows == {spec for spec in needs if spec.uses_rows} == called
    assert len(rows) == 2


def test_a_scale_a_token_stays_with_the_reader() -> None:
    model = compile_model(rounded_llama("int8.token"), max_tokens=8)
    (mlp,) = (m for m in model.modules() if isinstance(m, QuantGatedMLP))
    assert mlp._between is None


def test_what_watches_the_reader_sees_its_call() -> None:
    model = compile_model(rounded_llama("int8.g32"), max_tokens=8)
    want, seen = model(ids(5)).logits, []
    (mlp,) = (m for m in model.modules() if isinstance(m, QuantGatedMLP))
    mlp.reader.register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    assert torch.equal(model(ids(5)).logits, want)
    assert seen == [torch.float32]


@pytest.mark.parametrize("activation", ["int8.g32", "int8.token.static"])
def test_graphs_of_dynamo_round_where_outputs_are_made(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rounded_llama(activation)
    want = model(ids(5), use_cache=False).logits
    steps = [Canonicalize(dead=False), FuseSiblings(), FuseEpilogue(), FuseRequantize()]
    monkeypatch.setattr(dynamo, "passes", lambda device="cpu": steps)
    seen = called(monkeypatch)
    graph = torch.compile(model, backend="lowbit", fullgraph=True, options={"rest": "eager"})
    assert torch.allclose(graph(ids(5), use_cache=False).logits, want, atol=1e-5)
    assert [s.uses_rows for s in seen].count(True) == 2
    assert "rounded" in dynamo.reports()[0].ir


def test_fused_modules_are_traced() -> None:
    model = compile_model(rounded_llama("int8.g32"), max_tokens=8)
    want = model(ids(5), use_cache=False).logits
    for backend in ("eager", "lowbit"):
        torch._dynamo.reset()
        options = {"options": {"rest": "eager"}} if backend == "lowbit" else {}
        graph = torch.compile(model, backend=backend, fullgraph=True, **options)
        assert torch.allclose(graph(ids(5), use_cache=False).logits, want, atol=1e-5)
