"""A real model as a native program: the same text, and logits within rounding of the quantized model's own."""

from __future__ import annotations

import copy

import pytest
import torch
from _data import real_model
from _models import dequantized, swap_linears

import lowbit
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.compiler.job.models import find_model

PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a small village")


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
@torch.no_grad()
def test_text_and_logits_are_the_quantized_models() -> None:
    found = find_model(str(real_model()))
    tokenizer = found.tokenizer()
    model = swap_linears(found.load(), "int4.g64.sym")
    oracle = dequantized(copy.deepcopy(model))
    lowbit.compile(model, max_tokens=64, mode="program", context=256)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        want = oracle.generate(ids, max_new_tokens=32, do_sample=False)
        assert model.generate(ids, max_new_tokens=32, do_sample=False).tolist() == want.tolist()
        p = oracle(want).logits[0].log_softmax(-1)
        q = model(want).logits[0].log_softmax(-1)
        assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-4
