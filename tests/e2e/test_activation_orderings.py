"""What rounding activations costs on a real model, as orderings of perplexities over 2k tokens.

The model's weights came from 4-bit blocks, so only activations are rounded here; figures are in `bench/results`.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from _data import data_path, real_model
from torch import Tensor, nn

from lowbit.compiler.io.source import open_model
from lowbit.compiler.job.models import load_dense
from lowbit.quantizers.calibration import calibration_tokens

pytestmark = pytest.mark.slow


@cache
def bench() -> ModuleType:
    """bench/activations.py as a module."""
    path = Path(__file__).parents[2] / "bench" / "activations.py"
    spec = importlib.util.spec_from_file_location("bench_activations", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def setting() -> tuple[nn.Module, Tensor, Tensor]:
    """The model, calibration tokens [8, 512] and six windows of 1024 test tokens."""
    source = open_model(real_model())
    tokenizer = source.tokenizer()
    text = data_path("wikitext2-test.txt").read_text(encoding="utf-8")[:120_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = calibration_tokens(tokenizer, data_path("wikitext2-valid-tokens.txt"), 8, 512)
    return load_dense(source), tokens, ids[:6144].reshape(6, 1024)


@cache
def perplexity(row: str, windows: int = 2) -> float:
    """The perplexity of one row of the benchmark on the first windows."""
    model, tokens, test = setting()
    value: float = bench().row(row, model, tokens, test[:windows], bench().Chosen())["perplexity"]
    return value


def test_eight_bits_cost_little_and_less_with_smoothing_or_groups() -> None:
    base = perplexity("float")
    assert base < perplexity("a8") < 1.05 * base
    assert perplexity("a8-smooth", 6) < perplexity("a8", 6)  # a percent, less than two windows tell
    assert perplexity("a8-g64") < perplexity("a8")


def test_four_bits_need_groups_and_a_few_wide_ones() -> None:
    base = perplexity("float")
    assert perplexity("a4") > 10 * base
    assert perplexity("fmpq20") < 1.3 * base < perplexity("a4-g64")
    assert perplexity("fmpq20") < perplexity("fmpq20-no-permutation")
    assert perplexity("fmpq20") < 0.9 * perplexity("fmpq20-static")
    assert perplexity("fmpq30") < 1.01 * perplexity("fmpq20")


def test_rotation_tames_four_bits() -> None:
    assert perplexity("rotate-g64") < 1.6 * perplexity("float")
    assert perplexity("rotate-g64") < 0.9 * perplexity("a4-g64")


def test_keys_by_channel_or_rotated() -> None:
    base = perplexity("float")
    assert perplexity("kv4-values") < 1.01 * base
    assert perplexity("kv4") < 1.06 * base
    assert perplexity("kv4-token-rot") - base < (perplexity("kv4-token") - base) / 2
