"""Importing torch models: complete graphs, module paths, no weights needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lowbit.compiler.errors import IRError
from lowbit.compiler.frontend.trace import import_model
from lowbit.compiler.ir import graph as lb
from lowbit.compiler.ir.text import parse_module, print_module
from lowbit.compiler.ir.types import QType
from lowbit.compiler.pipeline import run_pipeline

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
}


def llama(**changes: object) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))  # type: ignore[arg-type]


def ops(module: object, cls: type) -> list:
    return [op for op in module.walk() if isinstance(op, cls)]  # type: ignore[attr-defined]


def test_llama_graph_has_every_linear_with_its_path() -> None:
    model = llama()
    module = import_model(model)
    linears = {lb.path_of(op) for op in ops(module, lb.Linear)}
    assert linears == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert len(ops(module, lb.RmsNorm)) == 5
    assert len(ops(module, lb.Attention)) == 2
    text = print_module(module)
    assert print_module(parse_module(text)) == text


def test_siblings_and_epilogues_fuse_across_the_model() -> None:
    module = import_model(llama())
    passes = 'canonicalize,assign-formats{scheme="w4a16" format="int4.g32.sym"},fuse-siblings,fuse-epilogue'
    run_pipeline(module, passes)
    fused = [op for op in ops(module, lb.Linear) if op.segments]
    assert len(fused) == 4  # qkv and gate/up in two layers
    assert [op.steps() for op in ops(module, lb.Linear)].count(("silu_mul",)) == 2
    assert [op.steps() for op in ops(module, lb.Linear)].count(("residual",)) == 4


def test_tied_head_is_kept_with_the_reason() -> None:
    module = import_model(llama(tie_word_embeddings=True))
    run_pipeline(module, 'assign-formats{scheme="w4a16" format="int4.g32.sym"}')
    (kept,) = [w for w in ops(module, lb.Weight) if w.reason and "shared" in w.reason.data]
    assert kept.names.data[0].data == "model.embed_tokens.weight"
    assert not isinstance(kept.outs[0].type, QType)


def test_biases_become_operands() -> None:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    linears = {lb.path_of(op): op for op in ops(import_model(model), lb.Linear)}
    assert linears["model.layers.0.self_attn.q_proj"].steps() == ("bias",)
    assert linears["model.layers.0.self_attn.o_proj"].steps() == ()


def test_other_architectures_are_traced_too() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    module = import_model(model)
    assert {lb.path_of(op) for op in ops(module, lb.Linear)} == {"lm_head"}  # its other matrices are Conv1D
    assert len(ops(module, lb.LayerNorm)) == 3


def test_the_model_is_left_alone() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    import_model(model)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_model_that_looks_at_values_is_one_error() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) if x.sum().item() > 0 else x

    with pytest.raises(IRError, match="LB0320"):
        import_model(Peeks(), probe={"x": torch.zeros(2, 4, device="meta")})
