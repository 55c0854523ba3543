"""`torch.compile(backend="lowbit")`: what is fused, that it is the same model, one graph, and no surprises later."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
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
from lowbit.compiler.runtime.kvcache import IMPLEMENTATION, QuantizedCache
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
    assert sum("norm in the kernel (predicted gain" in line for line in report.fused) == 4
    assert not report.kept
    assert report.text() in capsys.readouterr().out
    # Fused weights are not held twice, and the modules still work.
    q, k = (model.model.layers[0].self_attn.get_submodule(n).inner.plane0 for n in ("q_proj", "k_proj"))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert torch.allclose(model(_ids(7), use_cache=False).logits, want, atol=1e-6)


KV_SIZES = {"hidden_size": 96, "head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 1}
COUNTS = (2, 3, 4, 7, 8, 9, 16, 17, 64, 65, 1, 513, 2048)
"""Token counts on both sides of where kernels change."""


def _no_more_graphs(run: Callable[[int], None], warm_up: Sequence[int], counts: Sequence[int] = COUNTS) -> int:
    """Call with the counts of the warm-up, then with `counts`, which must not compile; returns how many graphs."""
    for count in warm_up:
        run(count)
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in counts:
            run(count)
    assert counters["stats"]["unique_graphs"] == graphs == len(dynamo.reports())
    assert not counters["graph_break"]
    return graphs


def test_token_counts_share_one_graph() -> None:
    model = swap_linears(tiny_llama(num_hidden_layers=1, max_position_embeddings=2048), "int4.g32.sym")
    oracle = dequantized(copy.deepcopy(model))
    f = _compiled(model)

    def run(count: int) -> None:
        got, want = (m(_ids(count), use_cache=False).logits for m in (f, oracle))
        assert torch.allclose(got, want, atol=1e-3)

    assert _no_more_graphs(run, (5, 9, 1)) == 3  # warm-up: one length, any length, one token


def test_static_cache_serves_prompts_and_steps_from_the_same_graphs() -> None:
    model = swap_linears(tiny_llama(num_hidden_layers=1, max_position_embeddings=2048), "int4.g32.sym")
    f, cache = _compiled(model), transformers.StaticCache(config=model.config, max_cache_len=2048)

    def run(count: int) -> None:
        cache.reset()
        free = transformers.DynamicCache(config=model.config)
        for ids in (_ids(count), _ids(1), _ids(1))[: 1 if count == 2048 else 3]:
            got, want = f(ids, past_key_values=cache).logits, model(ids, past_key_values=free).logits
            assert torch.allclose(got, want, atol=1e-4)

    assert _no_more_graphs(run, (5, 9, 1), (2, 17, 64, 1, 2048)) == 3


def test_packed_cache_is_one_graph_for_all_steps() -> None:
    """The cache's operators take part in the graph at any position. The prompt, which allocates, is not compiled."""
    sizes = {
        "hidden_size": 96,
        "head_dim": 64,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
    }
    model = swap_linears(tiny_llama(**sizes), "int4.g32.sym")
    model.set_attn_implementation(IMPLEMENTATION)
    f = _compiled(model)
    free, cache = (QuantizedCache(model, "kv4.kc32.vt32.w32", max_tokens=96) for _ in "ab")
    for held in (free, cache):
        model(_ids(37), past_key_values=held)
    for _ in range(40):
        got, want = f(_ids(1), past_key_values=cache).logits, model(_ids(1), past_key_values=free).logits
        assert torch.allclose(got, want, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
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


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 2048}),
    "Mistral": ("MistralForCausalLM", {"head_dim": 16, "sliding_window": 128}),
    "Qwen2": ("Qwen2ForCausalLM", {}),
    "Qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "Gemma": ("GemmaForCausalLM", {"head_dim": 16}),
    "Gemma2": ("Gemma2ForCausalLM", {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": 128}),
    "Gemma3Text": ("Gemma3ForCausalLM", {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": 128}),
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3Moe": (
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
}


def _family(name: str, **more: Any) -> Any:
    """A random quantized model of one block; of two where blocks differ."""
    torch.manual_seed(0)
    cls, changes = FAMILIES[name]
    sizes = {**SIZES, "num_hidden_layers": 1, "max_position_embeddings": 2048, **changes, **more}
    model = getattr(transformers, cls)(getattr(transformers, f"{name}Config")(**sizes)).eval()
    return swap_linears(model, "int4.g32.sym", skip=())


@pytest.mark.parametrize("name", ["OPT", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n != "OPT")])
def test_one_graph_for_any_token_count_whatever_the_architecture(name: str) -> None:
    model = _family(name)
    f = _compiled(model)

    def run(count: int) -> None:
        got, want = (m(_ids(count), use_cache=False).logits for m in (f, model))
        assert torch.allclose(got, want, atol=1e-4)

    assert _no_more_graphs(run, (5, 9, 1)) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma2", "Mistral", "Qwen3Moe"])
def test_static_caches_of_other_architectures(name: str) -> None:
    """Sliding windows: prompts and steps below and beyond the window are graphs of their own, seen in the warm-up."""
    model = _family(name)
    f, cache = _compiled(model), transformers.StaticCache(config=model.config, max_cache_len=512)

    def run(count: int) -> None:
        cache.reset()
        free = transformers.DynamicCache(config=model.config)
        for ids in (_ids(count), _ids(1), _ids(1), _ids(1)):
            got, want = f(ids, past_key_values=cache).logits, model(ids, past_key_values=free).logits
            assert torch.allclose(got, want, atol=1e-4)

    with torch._dynamo.config.patch(recompile_limit=32):
        _no_more_graphs(run, (5, 9, 1, 2, 126, 200, 127), (17, 100, 300, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mistral", "Gemma2"])
def test_growing_caches_with_windows_need_dynamic_shapes(name: str) -> None:
    """transformers' cache and masks compare lengths with the window, and each answer is a graph: as many with torch's
    own backend. With `dynamic=True`, which leaves out graphs of single lengths, they are fewer than torch's limit."""
    model = _family(name, sliding_window=16)
    graphs = {}
    for backend in ("lowbit", "eager"):
        torch._dynamo.reset()
        counters.clear()
        options: dict[str, Any] = {"options": {"rest": "eager"}} if backend == "lowbit" else {}
        f = torch.compile(model, backend=backend, fullgraph=True, dynamic=True, **options)
        for prompt, steps in ((6, 14), (20, 3), (9, 9)):
            caches = [transformers.DynamicCache(config=model.config) for _ in "ab"]
            for ids in (_ids(prompt), *[_ids(1)] * steps):
                got, want = (m(ids, past_key_values=c).logits for m, c in zip((f, model), caches, strict=True))
                assert torch.allclose(got, want, atol=1e-4)
        graphs[backend] = counters["stats"]["unique_graphs"]
    assert graphs["lowbit"] == graphs["eager"] <= 6 < torch._dynamo.config.recompile_limit


def test_experts_are_one_operator_a_projection() -> None:
    """No graph break, and no recompilation whatever expert a token goes to; float experts are named as torch's."""
    model = _family("Mixtral")
    f = _compiled(model)

    def run(count: int) -> None:
        got, want = (m(_ids(count), use_cache=False).logits for m in (f, model))
        assert torch.allclose(got, want, atol=1e-4)

    assert _no_more_graphs(run, (5, 9, 1), (2, 17, 1)) == 3
    report = dynamo.reports()[0]
    assert report.kernels == 2 + 1 + 3  # q, k, v; o; the head; projections of experts
    assert "3 projections of model.layers.0.mlp.experts (formats: int4.g32.sym): all experts in one operator" in (
        report.fused
    )
    assert not any("experts" in line for line in report.left)


def test_experts_that_are_not_quantized_are_named() -> None:
    sizes = {**SIZES, "num_hidden_layers": 1, **FAMILIES["Mixtral"][1]}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    _compiled(model, scheme="w8a16")(_ids(6), use_cache=False)
    (report,) = dynamo.reports()
    assert any("mlp" in line and "4 x 192 x 64 float32" in line for line in report.left)
    assert not any("self_attn" in line and "float32" in line for line in report.left)


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
