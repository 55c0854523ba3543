"""assign: every linear layer gets the scheme's format or a reason why not."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit.compiler.errors import FormatError
from lowbit.compiler.frontend.formats import assign
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.scheme import Scheme

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 80}


def model(tied: bool = False) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))  # type: ignore[arg-type]


def test_overrides_and_ignored_layers_are_followed() -> None:
    scheme = Scheme(
        "mixed",
        parse_format("int4.g32.sym"),
        overrides=(("*.down_proj", parse_format("int8.ch.sym")), ("model.layers.0.mlp.up_proj", None)),
    )
    found = assign(model(), scheme)
    assert len(found.formats) == 13
    assert str(found.formats["model.layers.1.mlp.down_proj"]) == "int8.ch.sym"
    assert "model.layers.0.mlp.up_proj" not in found.formats
    assert found.reasons["lm_head"] == "kept: excluded by scheme mixed"


def test_a_tied_head_is_kept_even_when_asked_for() -> None:
    found = assign(model(tied=True), Scheme("all", parse_format("int4.g32.sym"), ignore=()))
    assert len(found.formats) == 14
    assert "shared" in found.reasons["model.embed_tokens"]


def test_a_group_that_does_not_fit_names_the_layer() -> None:
    with pytest.raises(FormatError, match=r"LB0213 model\.layers\.0\.self_attn"):
        assign(model(), Scheme("wide", parse_format("int4.g128.sym")))
