"""`torch.compile(backend="lowbit")`: what is fused, that it is the same model, one graph, and no surprises later."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from _models import SIZES, dequantized, swap_linears, tiny_llama
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from lowbit.compiler.frontend import dynamo
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.modules import QuantLinear


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are what is tested here: the reference runs the kernels, nothing is compiled by C++."""
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    dispatch.reset()
    torch._dynamo.reset()
    counters.clear()
    dynamo.reset_reports()
    with torch.no_grad():
        yield
    dispatch.reset()


def _compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="lowbit", fullgraph=True, options={"rest": "eager", **options})


def _ids(count: int) -> torch.Tensor:
    return torch.randint(0, 80, (1, count), generator=torch.Generator().manual_seed(count))


def test_torch_knows_the_backend_by_name() -> None:
    assert "lowbit" in torch._dynamo.list_backends()


def test_blocks_become_four_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    model = swap_linears(tiny_llama(), "int4.g32.sym")
    want = model(_ids(7), use_cache=False).logits
    got = _compiled(model, explain=True)(_ids(7), use_cache=False).logits
    assert torch.allclose(got, want, atol=1e-6)
    (report,) = dynamo.reports()
    assert report.kernels == 4 * 2
    paths = "model.layers.1.mlp.gate_proj + model.layers.1.mlp.up_proj"
    assert f"{paths}: silu_mul in the kernel" in report.fused
    assert "model.layers.0.mlp.down_proj: residual in the kernel" in report.fused
    assert sum("one kernel" in line for line in report.fused) == 4
    # Norms stay outside, and it is said what that costs.
    assert sum(line.startswith("norm before") and " us " in line for line in report.kept) == 4
    assert report.text() in capsys.readouterr().out
    # Fused weights are not held twice, and the modules still work.
    q, k = (model.model.layers[0].self_attn.get_submodule(n).inner.plane0 for n in ("q_proj", "k_proj"))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert torch.allclose(model(_ids(7), use_cache=False).logits, want, atol=1e-6)


def test_token_counts_share_one_graph() -> None:
    model = swap_linears(tiny_llama(num_hidden_layers=1, max_position_embeddings=2048), "int4.g32.sym")
    oracle = dequantized(copy.deepcopy(model))
    f = _compiled(model)
    for count in (5, 9, 1):  # warm-up: one length, any length, one token
        f(_ids(count), use_cache=False)
    before = counters["stats"]["unique_graphs"]
    for count in (2, 3, 17, 64, 1, 513):
        got = f(_ids(count), use_cache=False).logits
        want = oracle(_ids(count), use_cache=False).logits
        assert torch.allclose(got, want, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == before
    assert not counters["graph_break"]


def test_growing_cache_needs_no_recompilation_per_step() -> None:
    model = swap_linears(tiny_llama(num_hidden_layers=1), "int4.g32.sym")
    want = model.generate(_ids(6), max_new_tokens=12, do_sample=False, eos_token_id=None)
    f = _compiled(model)
    cache = transformers.DynamicCache(config=model.config)
    step, out, graphs = _ids(6), _ids(6)[0].tolist(), []
    for _ in range(12):
        step = f(step, past_key_values=cache).logits[:, -1:].argmax(-1)
        out.append(int(step))
        graphs.append(len(dynamo.reports()))
    assert out == want[0].tolist()
    assert graphs[-1] == graphs[3]  # prompt, first step, any step
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "name",
    [
        "OPT",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("Mistral", "Qwen2", "Qwen3", "Gemma", "GPT2", "Mixtral")),
    ],
)
def test_one_graph_whatever_the_architecture(name: str) -> None:
    torch.manual_seed(0)
    other: dict[str, dict[str, Any]] = {
        "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
        "GPT2": {"n_embd": 64, "n_layer": 1, "n_head": 4},
        "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }
    sizes = {**SIZES, "num_hidden_layers": 1, "head_dim": 16, **other.get(name, {})}
    if name in ("OPT", "GPT2"):
        del sizes["head_dim"]
    model = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, f"{name}Config")(**sizes)
    ).eval()
    swap_linears(model, "int4.g32.sym", skip=())
    want = model(_ids(6), use_cache=False).logits
    got = _compiled(model)(_ids(6), use_cache=False).logits
    assert torch.allclose(got, want, atol=1e-5)
    assert len(dynamo.reports()) == 1
    assert not counters["graph_break"]


def test_dense_models_are_quantized_by_a_scheme() -> None:
    model = tiny_llama(num_hidden_layers=1)
    quantized = copy.deepcopy(model)
    f = _compiled(model, scheme="w8a16")
    got = f(_ids(6), use_cache=False).logits
    assert dynamo.reports()[0].kernels == 4
    for path, module in list(quantized.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            from lowbit.quantizers.methods import make_method
            from lowbit.quantizers.scheme import load_scheme

            q = make_method("rtn", {}).quantize(module.weight.float(), load_scheme("w8a16").weight, None).qtensor
            parent, _, leaf = path.rpartition(".")
            setattr(quantized.get_submodule(parent), leaf, QuantLinear.from_qtensor(q))
    assert torch.allclose(got, quantized(_ids(6), use_cache=False).logits, atol=1e-5)


def test_bad_input_is_one_clear_error() -> None:
    model = swap_linears(tiny_llama(num_hidden_layers=1), "int4.g32.sym")

    def fails(match: str, f: Any, *args: Any, **kwargs: Any) -> None:
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match=match):
            f(*args, use_cache=False, **kwargs)

    fails(r"LB0570.*'speed'", _compiled(model, speed=1), _ids(4))
    fails("LB0570", _compiled(model, rest="magic"), _ids(4))
    fails(r"LB0572.*vptq", _compiled(tiny_llama(num_hidden_layers=1), scheme="w2-vptq"), _ids(4))
    with torch.enable_grad():
        fails("LB0571", _compiled(model), _ids(4))
    fails(r"LB0401.*float64", _compiled(model.double()), _ids(4))


def test_models_without_quantized_layers_go_on_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(num_hidden_layers=1)
    want = model(_ids(5), use_cache=False).logits
    assert torch.equal(_compiled(model)(_ids(5), use_cache=False).logits, want)
    assert dynamo.reports()[0].kernels == 0


def test_writes_in_place_keep_their_order() -> None:
    layer = swap_linears(nn.Sequential(nn.Linear(32, 32, bias=False)), "int4.g32.sym")

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            x.mul_(2.0)
            return x + y

    want = Writes()(torch.ones(3, 32))
    got = _compiled(Writes())(torch.ones(3, 32))
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_inductor_compiles_the_rest() -> None:
    model = swap_linears(tiny_llama(), "int4.g32.sym")
    want = model(_ids(9), use_cache=False).logits
    f = torch.compile(model, backend="lowbit", fullgraph=True)
    assert torch.allclose(f(_ids(9), use_cache=False).logits, want, atol=1e-5)
    assert dynamo.reports()[0].rest == "inductor"
