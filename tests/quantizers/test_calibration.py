"""Calibration text becomes tokens, inputs become second moments, and shared inputs share them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit.compiler.errors import CheckpointError, RunError
from lowbit.quantizers.calibration import (
    Coverage,
    HessianAccumulator,
    InputGroups,
    calibration_text,
    calibration_tokens,
)


class Words:
    """A tokenizer: one id per word, its number."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def numbers(count: int) -> str:
    return " ".join(map(str, range(count)))


def test_windows_do_not_overlap_and_follow_the_seed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(numbers(1000))
    first = calibration_tokens(Words(), tmp_path / "text.txt", 20, 40, seed=0)
    assert first.shape == (20, 40)
    assert first.dtype == torch.int64
    assert len(set(first.flatten().tolist())) == 800, "no token twice"
    assert bool((first.diff(dim=1) == 1).all()), "windows are consecutive text"
    assert torch.equal(first, calibration_tokens(Words(), str(tmp_path / "text.txt"), 20, 40, seed=0))
    assert not torch.equal(first, calibration_tokens(Words(), tmp_path / "text.txt", 20, 40, seed=1))


def test_every_kind_of_source(tmp_path: Path) -> None:
    lines = [json.dumps({"text": t}) for t in ("one", "two")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert calibration_text(tmp_path / "a.jsonl") == "one\n\ntwo"
    assert calibration_text(["x", "y"]) == "x\n\ny"
    assert len(calibration_text("pydoc")) > 100_000
    ids = torch.arange(12).reshape(3, 4)
    assert torch.equal(calibration_tokens(None, ids, 2, 4), ids[:2])


@pytest.mark.parametrize(
    ("source", "options", "code"),
    [
        ("text", {"samples": 30, "length": 40}, "LB0522"),
        ("text", {"samples": 0, "length": 40}, "LB0520"),
        ("text", {"samples": 1, "length": 1}, "LB0520"),
        (torch.zeros(3), {}, "LB0523"),
        (torch.zeros(3, 4), {}, "LB0523"),
        (-torch.ones(3, 4, dtype=torch.int64), {}, "LB0523"),
        ("no/such/file.txt", {}, "LB0101"),
        ("nosuchfile", {}, "LB0101"),
        ("binary", {}, "LB0101"),
        ("bad.jsonl", {}, "LB0101"),
    ],
)
def test_what_cannot_be_used_is_refused(source: Any, options: dict[str, Any], code: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(numbers(1000))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.jsonl").write_text('{"body": 1}')
    place = tmp_path / source if isinstance(source, str) and (tmp_path / source).exists() else source
    with pytest.raises((RunError, CheckpointError), match=code):
        calibration_tokens(Words(), place, **options)


def test_a_data_set_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(RunError, match=r"LB0521.*datasets.*pydoc"):
        calibration_text("owner/name")


def test_text_without_tokenizer_is_refused() -> None:
    with pytest.raises(RunError, match="LB0522"):
        calibration_tokens(None, ["some text"], 1, 2)


def test_second_moments_are_exact_sums() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 12)
    accumulator = HessianAccumulator(12)
    for part in x:
        accumulator.add(part)
    stats = accumulator.stats()
    rows = x.reshape(-1, 12).double()
    assert stats.tokens == 35
    assert torch.allclose(stats.hessian, rows.T @ rows / 35, rtol=1e-5)
    assert torch.equal(stats.hessian, stats.hessian.T)


def test_the_first_positions_can_be_left_out() -> None:
    x = torch.randn(3, 7, 4)
    accumulator = HessianAccumulator(4, skip_first=2)
    accumulator.add(x)
    rows = x[:, 2:].reshape(-1, 4).double()
    assert accumulator.tokens == 15
    assert torch.allclose(accumulator.stats().hessian, rows.T @ rows / 15, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_are_refused(value: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = value
    with pytest.raises(RunError, match="LB0510"):
        HessianAccumulator(4).add(x)


def test_coverage_counts_dead_channels_and_few_tokens() -> None:
    accumulator = HessianAccumulator(4)
    accumulator.add(torch.tensor([[1.0, 0, 2, 0]] * 6))
    coverage = Coverage.of(accumulator.stats())
    assert coverage == Coverage(tokens=6, dead=2, channels=4)
    assert "2 of 4" in (coverage.warning() or "")
    assert "3 calibration tokens for 4" in (Coverage(3, 0, 4).warning() or "")
    assert Coverage(6, 0, 4).warning() is None


class Block(nn.Module):
    """Two layers on the input, one on their sum, one that is only called for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.b, self.a, self.rare = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x) + self.b(x)
        if float(x.abs().max()) > 100:
            y = self.rare(y.clone())
        return self.last(y)


def test_layers_are_grouped_by_the_tensor_they_read() -> None:
    block = Block()
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    groups = InputGroups(linears)
    with groups:
        block(torch.randn(2, 4))
    assert groups.order == [["a", "b"], ["last"]]
    assert not block.a._forward_pre_hooks


def test_each_group_is_summed_once_and_passes_end_early() -> None:
    block = Block()
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    order = [["a", "b"], ["last"], ["rare"]]
    groups = InputGroups(linears, order=order, collect=[0], stop_early=True)
    x = torch.randn(6, 4)
    with groups:
        for _ in range(2):
            groups.start()
            with pytest.raises(InputGroups.Done):
                block(x)
    assert set(groups.accumulators) == {0}
    assert groups.accumulators[0].tokens == 12
    everything = InputGroups(linears, order=[list(g) for g in order], collect=[0, 1, 2])
    with everything:
        block(x)
        block(x * 1000)
    assert {i: a.tokens for i, a in everything.accumulators.items()} == {0: 12, 1: 12, 2: 6}
