"""Perplexity and KL against independent computations on a tiny model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from _models import tiny_llama
from torch import nn

from lowbit.compiler.errors import LowbitError
from lowbit.compiler.job.evaluate import compare, cut_windows, evaluate, generate, perplexity, read_text


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 80, (count,), generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """Gives the same logits at every position, whatever comes in."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        batch, length = input_ids.shape
        return SimpleNamespace(logits=self.logits.expand(batch, length, -1))


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    assert perplexity(Fixed(torch.zeros(80)), ids(64), windows=4, length=16) == pytest.approx(80, rel=1e-6)


def test_perplexity_by_hand() -> None:
    p = torch.tensor([0.5, 0.25, 0.25])
    tokens = torch.tensor([2, 0, 0, 1, 1, 0])  # windows [2 0 0] and [1 1 0]; first tokens are not predicted
    want = math.exp(-(2 * math.log(0.5) + math.log(0.25) + math.log(0.5)) / 4)
    assert perplexity(Fixed(p.log()), tokens, windows=2, length=3) == pytest.approx(want, rel=1e-6)


def test_perplexity_agrees_with_transformers_own_loss() -> None:
    model = tiny_llama()
    windows = ids(3 * 40).view(3, 40)
    losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    assert perplexity(model, windows.flatten(), 3, 40) == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_windows_are_independent_and_consecutive() -> None:
    tokens = ids(100)
    assert torch.equal(cut_windows(tokens, 2, 30).flatten(), tokens[:60])
    assert cut_windows(tokens, 16, 30).shape == (3, 30)  # as many as there are


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, tokens = tiny_llama(), tiny_llama(seed=1), ids(90)
    whole = evaluate(model, tokens, 1, 90, reference=other)
    monkeypatch.setattr("lowbit.compiler.job.evaluate._CHUNK", 7)
    parts = evaluate(model, tokens, 1, 90, reference=other)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-6)
    assert parts.kl is not None
    assert whole.kl is not None
    assert parts.kl.mean == pytest.approx(whole.kl.mean, rel=1e-5)
    assert parts.kl.same_top1 == whole.kl.same_top1


def test_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    want = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    kl = compare(Fixed(q.log()), Fixed(p.log()), torch.zeros(20, dtype=torch.int64), windows=2, length=10)
    assert kl.mean == pytest.approx(want, rel=1e-5)
    assert kl.p99 == pytest.approx(want, rel=1e-5)
    reverse = compare(Fixed(p.log()), Fixed(q.log()), torch.zeros(20, dtype=torch.int64), windows=2, length=10)
    assert reverse.mean != pytest.approx(want, rel=1e-2)  # the reference is the first argument of KL


def test_a_model_does_not_differ_from_itself() -> None:
    model = tiny_llama()
    kl = compare(model, model, ids(60), 2, 30)
    assert abs(kl.mean) < 1e-6
    assert kl.same_top1 == 1.0


def test_progress_is_told_after_every_window() -> None:
    seen: list[tuple[int, int]] = []
    evaluate(Fixed(torch.zeros(80)), ids(64), 4, 16, progress=lambda done, of, _: seen.append((done, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_hopeless_models_have_no_infinite_json() -> None:
    logits = torch.full((80,), -1e4)
    logits[0] = 0.0
    figures = evaluate(Fixed(logits), torch.ones(32, dtype=torch.int64), 1, 32).to_dict()
    assert figures["perplexity"] is None
    assert figures["nll"] == pytest.approx(1e4, rel=1e-3)


@pytest.mark.parametrize(("windows", "length", "code"), [(1, 200, "LB0540"), (1, 1, "LB0541"), (0, 8, "LB0541")])
def test_refusals(windows: int, length: int, code: str) -> None:
    with pytest.raises(LowbitError) as e:
        cut_windows(ids(100), windows, length)
    assert e.value.code == code


def test_text_must_exist_and_be_text(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary"):
        with pytest.raises(LowbitError, match="LB0151"):
            read_text(tmp_path / name)


def test_generate_gives_exactly_the_tokens_asked_for() -> None:
    model = tiny_llama()
    speed, out = generate(model, ids(5)[None], 8)
    assert out.shape == (13,)
    assert speed > 0
    assert torch.equal(out[:5], ids(5))
