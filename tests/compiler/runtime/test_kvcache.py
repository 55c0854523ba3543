"""The quantized cache inside transformers: generation, masks, beams, compiled steps, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _models import tiny_llama
from transformers import LlamaForCausalLM, MistralConfig

from lowbit.codegen.reference.kvstate import KVState
from lowbit.compiler.errors import FormatError, KernelError
from lowbit.compiler.runtime.kvcache import IMPLEMENTATION, QuantizedCache
from lowbit.compiler.runtime.kvsim import simulated

FORMAT = "kv4.kc32.vt32.w32"
GEAR = "kv2.kc32.vt32.w32.gear4r2"
SIZES = {"hidden_size": 96, "head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 1,
         "max_position_embeddings": 256}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A random model whose attention is far from uniform, so that errors in it change what comes out."""
    model = tiny_llama(**SIZES)
    with torch.no_grad():
        for weight in (w for w in model.parameters() if w.dim() == 2):
            weight.mul_(4)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 80, (2, 37), generator=torch.Generator().manual_seed(0))


def generate(model: Any, ids: torch.Tensor, kind: str, format: str, tokens: int | None, **options: Any) -> torch.Tensor:
    """Greedy tokens after `ids` with attention implementation `kind`; `ids` has as many places as `tokens` allows."""
    model.set_attn_implementation(kind)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False,
               "pad_token_id": 0, **options}  # fmt: skip
    return model.generate(ids, past_key_values=QuantizedCache(model, format, max_tokens=tokens, chunk=64), **options)


@torch.no_grad()
def stepwise(model: Any, ids: torch.Tensor, cache: QuantizedCache, prompt: int) -> torch.Tensor:
    """Logits [batch, tokens - prompt + 1, vocabulary]: a prompt, then one token at a time."""
    out = [model(ids[:, :prompt], past_key_values=cache).logits[:, -1:]]
    out += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, ids.shape[1])]
    return torch.cat(out, 1)


@pytest.mark.parametrize("format", [FORMAT + ".rot", GEAR])
def test_generation_equals_attention_over_dequantized_caches(
    model: LlamaForCausalLM, ids: torch.Tensor, format: str
) -> None:
    """The kernel on packed bytes, allocated at once or growing, and stock attention over what they stand for."""
    want = generate(model, ids, "sdpa", format, 77)
    assert len(set(want[0, 37:].tolist())) > 5  # the model does not just repeat itself
    for kind, tokens in ((IMPLEMENTATION, 77), (IMPLEMENTATION, None)):
        assert torch.equal(generate(model, ids, kind, format, tokens), want), (kind, tokens)


def test_padding_and_beams(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for options in ({"attention_mask": mask}, {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 30}):
        want = generate(model, ids, "sdpa", FORMAT, 120, **options)
        for tokens in (120, None):
            assert torch.equal(generate(model, ids, IMPLEMENTATION, FORMAT, tokens, **options), want)
    unpadded = generate(model, ids[:1, 9:], IMPLEMENTATION, FORMAT, 120)
    alone = generate(model, ids[:1], IMPLEMENTATION, FORMAT, 120, attention_mask=mask[:1])
    assert torch.equal(unpadded[:, 28:38], alone[:, 37:47])  # later tokens leave the window at other places


@pytest.mark.parametrize("tokens", [96, None])
def test_prompts_in_parts(model: LlamaForCausalLM, ids: torch.Tensor, tokens: int | None) -> None:
    """A long call behind earlier tokens sees these dequantized, and its own as they are; short calls see the cache."""
    results = []
    for kind in (IMPLEMENTATION, "sdpa"):
        model.set_attn_implementation(kind)
        cache, parts = QuantizedCache(model, FORMAT, max_tokens=tokens), torch.cat([ids, ids], 1).split([40, 26, 8], 1)
        with torch.no_grad():
            results.append(torch.cat([model(part, past_key_values=cache).logits for part in parts], 1))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-3 * float(results[1].abs().max()))


@pytest.mark.parametrize("format", [FORMAT, FORMAT + ".rot", "kv4.kt.vt", GEAR])
def test_simulation_is_decoding(model: LlamaForCausalLM, ids: torch.Tensor, format: str) -> None:
    """One pass over a text gives what feeding it to the cache token by token gives."""
    ids = torch.cat([ids, ids + 1], 1) % 80
    model.set_attn_implementation(IMPLEMENTATION)
    want = stepwise(model, ids, QuantizedCache(model, format), 1)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), simulated(model, format):
        got = model(ids, use_cache=False).logits
        plain = model.config._attn_implementation
    assert plain != "sdpa"
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
    # Float rounding moves a number over the edge between two codes now and then.
    assert float((got - want).norm()) < 0.06 * float((exact - want).norm()) + 1e-4 * float(want.norm())


def test_after_a_prompt_the_window_holds_what_kivi_keeps(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    model.set_attn_implementation(IMPLEMENTATION)
    cache = QuantizedCache(model, FORMAT)
    with torch.no_grad():
        model(torch.cat([ids, ids], 1), past_key_values=cache)
        hidden = model.model.embed_tokens(torch.cat([ids, ids], 1))
        layer = model.model.layers[0]
        want = layer.self_attn.v_proj(layer.input_layernorm(hidden)).view(2, 74, 1, 64).transpose(1, 2)
    first = cache.layers[0]
    _, values = KVState(first.spec, first.state).read(74)
    assert torch.equal(values[:, :, 42:], want[:, :, 42:].half().float())
    assert not torch.allclose(values[:, :, :42], want[:, :, :42], atol=1e-3)
    torch.testing.assert_close(first.state["v_window"][:, :, 42 % 32], want[:, :, 42].half())


def test_compiled_steps_do_not_compile_again(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """One full graph serves 20 steps, across the end of two windows."""
    model.set_attn_implementation(IMPLEMENTATION)
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager", dynamic=False)
    logits: dict[str, torch.Tensor] = {}
    for name, run in (("eager", model), ("compiled", step)):
        cache = QuantizedCache(model, FORMAT, max_tokens=96)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            model(torch.cat([ids, ids[:, :20]], 1), past_key_values=cache)
            found = [run(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20)]
        assert int(cache.get_seq_length()) == 77
        logits[name] = torch.cat(found, 1)
    torch._dynamo.reset()
    torch.testing.assert_close(logits["compiled"], logits["eager"], rtol=0, atol=1e-4)


def test_sequences_are_selected_repeated_and_forgotten(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    model.set_attn_implementation(IMPLEMENTATION)
    cache, last = QuantizedCache(model, FORMAT, max_tokens=64), ids[:, -1:]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = {name: tensor.clone() for name, tensor in cache.layers[1].state.items()}
        addresses = [tensor.data_ptr() for tensor in cache.layers[1].state.values()]
        cache.reorder_cache(torch.tensor([1, 1]))
        for name, tensor in cache.layers[1].state.items():
            assert torch.equal(tensor, before[name][[1, 1]])
        assert addresses == [tensor.data_ptr() for tensor in cache.layers[1].state.values()]
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 1]))
        assert cache.layers[0].batch_size == 3
        logits = model(last[[1, 1, 1]], past_key_values=cache).logits
        fresh = QuantizedCache(model, FORMAT, max_tokens=64)
        model(ids[[1]], past_key_values=fresh)
        want = model(last[[1]], past_key_values=fresh).logits
        torch.testing.assert_close(logits, want.expand_as(logits), rtol=0, atol=1e-3)
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        assert all(not tensor.any() for tensor in cache.layers[0].state.values())


def test_bytes(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Two layers, one head of 64, two sequences, 128 tokens: codes, scales and minima, and two windows of 32."""
    cache = QuantizedCache(model, FORMAT, max_tokens=128)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    keys = 128 * 64 // 2 + 128 // 32 * 64 * 4
    values = 128 * 64 // 2 + 128 * 2 * 4
    assert cache.nbytes() == 2 * 2 * (keys + values + 2 * 32 * 64 * 2)


def test_refusals(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    model.set_attn_implementation(IMPLEMENTATION)
    cache = QuantizedCache(model, FORMAT, max_tokens=38)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(KernelError) as full:
            model(ids[:, :2], past_key_values=cache)
    with pytest.raises(KernelError) as crop:
        cache.crop(-1)
    sliding = MistralConfig(**{**SIZES, "num_hidden_layers": 2}, sliding_window=16)
    with pytest.raises(KernelError) as layers:
        QuantizedCache(sliding, FORMAT)
    with pytest.raises(FormatError) as dims:
        QuantizedCache(tiny_llama(head_dim=24).config, FORMAT)
    assert [e.value.code for e in (full, crop, layers, dims)] == ["LB0426", "LB0427", "LB0427", "LB0254"]
