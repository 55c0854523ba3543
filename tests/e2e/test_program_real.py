"""A real model as a native program: the same text, and logits within rounding of the quantized model's own."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from _data import real_model
from _models import dequantized, swap_linears

import lowbit
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.compiler.job.models import find_model

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village",
    "Water boils at",
    "Dear Sir or Madam,",
    "The three laws of thermodynamics are",
    "Translate to Spanish: good morning.",
    "1, 1, 2, 3, 5, 8,",
    "To bake bread, first",
    "SELECT name FROM users WHERE",
)
DRIFT = 2000
"""Tokens decoded one by one, as text that goes on: errors of the cache would add up over them."""


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
@torch.no_grad()
def test_text_and_logits_are_the_quantized_models() -> None:
    found = find_model(str(real_model()))
    tokenizer = found.tokenizer()
    model = swap_linears(found.load(), "int4.g64.sym")
    oracle = dequantized(copy.deepcopy(model))
    lowbit.compile(model, max_tokens=64, mode="program", context=DRIFT + 1)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        want = oracle.generate(ids, max_new_tokens=32, do_sample=False)
        assert model.generate(ids, max_new_tokens=32, do_sample=False).tolist() == want.tolist()
    ids = tokenizer(inspect.getdoc(copy) + inspect.getsource(copy), return_tensors="pt").input_ids[0, :DRIFT]
    assert ids.numel() == DRIFT
    cache = model.lowbit_program.new_cache(DRIFT)
    steps = [model.lowbit_program.run(ids[i : i + 1], cache) for i in range(DRIFT)]
    p, q = oracle(ids[None]).logits[0].log_softmax(-1), torch.cat(steps).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    assert float(divergence.mean()) < 1e-4
    assert float(divergence[-500:].mean()) < 2 * float(divergence[:500].mean()) + 1e-5  # and it does not grow
