"""Orderings of cache formats on a real model, whose keys have outlier channels."""

from __future__ import annotations

import pytest
from _data import data_path, real_model

from lowbit.compiler.job.evaluate import perplexity, tokenize
from lowbit.compiler.job.models import find_model
from lowbit.compiler.runtime.kvsim import simulated

pytestmark = pytest.mark.slow

WINDOWS = 2


def test_perplexity_of_cache_formats() -> None:
    """Four bits cost little where keys share scales by channel, a lot where they do so by token, unless rotated."""
    source = find_model(real_model())
    model = source.load()
    text = data_path("wikitext2-test.txt").read_text(encoding="utf-8")[: WINDOWS * 1024 * 16]
    ids = tokenize(source.tokenizer(), text)
    base = perplexity(model, ids, WINDOWS)
    cost: dict[str, float] = {}
    for name in ("k16v4.vt", "kv4", "kv4.kt.vt", "kv4.kt.vt.rot", "kv2", "kv2.kt.vt"):
        with simulated(model, name):
            cost[name] = perplexity(model, ids, WINDOWS) / base - 1
    assert abs(cost["k16v4.vt"]) < 0.01
    assert cost["kv4"] < 0.04
    assert cost["kv4.kt.vt.rot"] < 0.5 * cost["kv4.kt.vt"]
    assert cost["kv4"] < cost["kv4.kt.vt"]
    assert cost["kv4"] < cost["kv2"] < 0.2 * cost["kv2.kt.vt"]
