"""Shared by tests of GGUF: small checkpoints with a tokenizer, and blocks of random bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _models import SIZES, round_to_nearest, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lowbit.compiler.io.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from lowbit.compiler.io.gguf_blocks import BLOCK_TYPES
from lowbit.compiler.io.source import open_model
from lowbit.quantizers.scheme import load_scheme

ROWS = 300
WIDE = {**SIZES, "vocab_size": ROWS}
TEXT = "Low bits, 12 of them; it's what the rain in Spain says. " * 3


def byte_level(split: Any = None, **model: Any) -> Tokenizer:
    """A small byte-level BPE tokenizer; split: what cuts text before ByteLevel does."""
    tokenizer = Tokenizer(models.BPE(**model))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not isinstance(split, pre_tokenizers.Split))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, last]) if split is not None else last
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, show_progress=False, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer | None = None, **names: str) -> Any:
    names = {"bos_token": "<s>", "eos_token": "</s>", **names}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer or byte_level(), **names)
    made.chat_template = "{{ messages }}"
    made.save_pretrained(folder)
    return made


def checkpoint(
    folder: Path,
    model: nn.Module | None = None,
    text: str = "int4.g32.sym",
    head: bool = False,
    make: Any = round_to_nearest,
    **given: Any,
) -> Checkpoint:
    """A quantized checkpoint of a small model, with a tokenizer. make: of a weight and a format, the matrix. given:
    options of `write_checkpoint`."""
    model = tiny_llama(vocab_size=ROWS) if model is None else model
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(bias)
    model.save_pretrained(folder / "base")  # type: ignore[operator]
    save_tokenizer(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\nbase_model: who/what\n---\n")
    source, scheme = open_model(folder / "base"), load_scheme("w4a16", format=text, method="rtn")
    kinds = ("proj.weight", "lm_head.weight") if head else ("proj.weight",)
    quantized = {
        name.removesuffix(".weight"): lambda name=name: make(source.tensor(name), scheme.weight)
        for name in source.names()
        if name.endswith(kinds)
    }
    write_checkpoint(folder / "quantized", source, quantized, scheme, report={}, **given)
    return read_checkpoint(folder / "quantized")


_FLOAT16 = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,)}
_FLOAT16 |= {"TQ2_0": (64,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
"""Bytes at which blocks have float16 numbers, where that is not the first one alone."""


def random_blocks(name: str, n: int, k: int, seed: int = 0) -> torch.Tensor:
    """uint8 [n, bytes of a row]: random codes and scales in blocks of a type, of numbers around 0.01 * 2**bits."""
    kind, rng = BLOCK_TYPES[name], torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (n * k // kind.columns, kind.nbytes), generator=rng, dtype=torch.uint8)
    if name == "TQ2_0":
        raw[:, :64] &= 0xAA  # codes 0 and 2; 3 stands for nothing
    if name == "MXFP4":
        raw[:, 0] = raw[:, 0] % 16 + 112
    else:
        for at in _FLOAT16.get(name, (0,)):
            size = (0.01 + 0.01 * torch.rand(len(raw), 1, generator=rng)).half()
            raw[:, at : at + 2] = size.view(torch.uint8)
    return raw.reshape(n, -1)
