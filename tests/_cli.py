"""A tiny random Llama on disk, and running `quantize` on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from _models import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lowbit.cli import app

__all__ = ["error_line", "invoke", "invoke_json", "save_tiny_llama", "tiny_tokenizer", "write_text"]

LETTERS = "abcdefghijklmnopqrstuvwxyz .,'\n"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; anything else is unknown."""
    vocabulary = {"<unk>": 0, **{c: i + 1 for i, c in enumerate(LETTERS)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def save_tiny_llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """A two-layer random Llama with tokenizer, as transformers saves it."""
    model = tiny_llama(**changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def write_text(path: Path, characters: int = 4000) -> Path:
    """Deterministic text in the tiny tokenizer's alphabet."""
    rng = torch.Generator().manual_seed(0)
    path.write_text("".join(LETTERS[i] for i in torch.randint(0, 28, (characters,), generator=rng)))
    return path


def invoke(*args: object) -> Any:
    """The result of `quantize ARGS`: exit_code, stdout, stderr."""
    return CliRunner().invoke(app, [str(a) for a in args])


def invoke_json(*args: object, exit_code: int = 0) -> Any:
    """The document `quantize ARGS --json` prints; fails when stdout holds anything else."""
    result = invoke(*args, "--json")
    assert result.exit_code == exit_code, result.stderr
    return json.loads(result.stdout)


def error_line(result: Any) -> str:
    """The one error line of a refused command."""
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]
