"""A run to trellises: what is written is what was found, by any number of workers, and runs as modules and compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _jobs import contents, quantize, save_tiny
from torch import nn
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.methods import trellis
from lowbit.quantizers.scheme import PRESETS

IDS = torch.arange(12)[None] % 80


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits.float()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("trellis")
    chosen = replace(PRESETS["w3-tcq"], weight=parse_format("tcq3.g32"))
    quantize(save_tiny(folder / "model"), folder / "out", chosen)
    return folder / "model", folder / "out"


def test_a_checkpoint_holds_what_was_found(folders: tuple[Path, Path]) -> None:
    model, out = folders
    float_, loaded = (logits(m) for m in (AutoModelForCausalLM.from_pretrained(model), lowbit.load(out)))
    assert 0.001 < float((loaded - float_).norm() / float_.norm()) < 0.4
    layer = lowbit.load(out).get_submodule("model.layers.0.mlp.up_proj")
    assert str(layer.fmt) == "tcq3.g32"
    again = logits(AutoModelForCausalLM.from_pretrained(out))  # transformers, with lowbit imported
    assert torch.equal(loaded, again)


def test_a_native_program_of_it(folders: tuple[Path, Path]) -> None:
    modules = lowbit.load(folders[1])
    want = logits(modules)
    program = lowbit.compile(lowbit.load(folders[1]), mode="program", max_tokens=16)
    assert float((logits(program) - want).norm() / want.norm()) < 1e-2


def test_torch_stands_in_for_the_compiled_search(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no compiler: its sums are rounded otherwise, so that paths of nearly the same cost may differ."""
    monkeypatch.setattr("lowbit.compiler.job.workers.prepare_search", lambda fmt: None)
    monkeypatch.setattr(trellis, "_search", [trellis.cheapest_paths])
    chosen = replace(PRESETS["w3-tcq"], weight=parse_format("tcq3.g32"))
    quantize(folders[0], tmp_path / "out", chosen)
    ours, theirs = (logits(lowbit.load(f)) for f in (folders[1], tmp_path / "out"))
    assert float((ours - theirs).norm() / ours.norm()) < 0.1
    assert contents(tmp_path / "out").keys() == contents(folders[1]).keys()
