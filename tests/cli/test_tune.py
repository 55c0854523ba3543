"""`quantize tune`: what a checkpoint needs, measuring it, and that loading it afterwards uses what was found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _cli import error_line, invoke, invoke_json
from _models import swap_linears, tiny_llama
from _tune_backend import GOOD, SLOW, WRONG, schedule, use_fake

import lowbit
from lowbit.codegen import load_backend
from lowbit.codegen.select import stale
from lowbit.compiler.io.load import load_quantized, save_quantized
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.job.kernels import needed_kernels, open_skeleton
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.compile import compile_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune") / "checkpoint"
    return save_quantized(swap_linears(tiny_llama(), "int4.g32.sym"), folder)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LOWBIT_FAKE_SPACE", f"{SLOW},{GOOD},{WRONG}")
    dispatch.reset()
    stale.cache_clear()
    yield use_fake(monkeypatch, tmp_path)
    dispatch.reset()
    load_backend.cache_clear()
    stale.cache_clear()


def test_a_dry_run_lists_every_kernel_and_measures_nothing(checkpoint: Path, fake: Path) -> None:
    found = invoke_json("tune", checkpoint, "--dry-run", "--tokens", "1,16", "--explain")
    kernels = found["kernels"]
    compiled = {(tuple(k["segments"]), k["k"], *k["epilogue"]) for k in kernels if k["fused"]}
    assert compiled == {((64, 32, 32), 64), ((64,), 64), ((96, 96), 64, "silu_mul"), ((64,), 96)}
    assert {tuple(k["segments"]) for k in kernels if not k["fused"]} == {(32,), (96,)}
    assert [k["fused"] for k in kernels] == sorted((k["fused"] for k in kernels), reverse=True)
    assert {k["tokens"] for k in kernels} == {1, 16}
    assert all(k["status"] == "predicted" and len(k["candidates"]) == 3 for k in kernels)
    assert fake.read_text() == ""
    program = invoke_json("tune", checkpoint, "--dry-run", "--tokens", "1", "--mode", "program")["kernels"]
    assert sum(k["epilogue"] == ["residual"] for k in program) == 2


def test_a_tuned_checkpoint_runs_on_what_was_found(checkpoint: Path, fake: Path, tmp_path: Path) -> None:
    shipped = tmp_path / "export.json"
    result = invoke("tune", checkpoint, "--budget", "10m", "--tokens", "1", "--export", shipped)
    assert result.exit_code == 0, result.stderr
    assert "6 of 6 tuned" in result.stdout
    assert "left out: tile_m=3 does=2: wrong" in result.stderr
    assert len(json.loads(shipped.read_text())["entries"]) == 6
    assert invoke_json("tune", checkpoint, "--tokens", "1")["complete"]

    model = load_quantized(checkpoint)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64))
    alone = {kernel.spec for _, kernel in dispatch.loaded_kernels()}
    compile_model(model, max_tokens=2)
    built = dispatch.loaded_kernels()
    assert {kernel.schedule for m, kernel in built if m == 1} == {schedule(GOOD)}
    assert {kernel.schedule for m, kernel in built if m == 2} == {schedule(SLOW)}
    # The kernels that were enumerated without weights are those that a loaded and a compiled model ask for.
    needs = needed_kernels(open_skeleton(checkpoint), host_target())
    assert {n.spec for n in needs} == {kernel.spec for _, kernel in built}
    assert alone == {n.spec for n in needs if not n.fused} | {n.spec for n in needs if len(n.spec.segments) == 1}


def test_a_model_in_memory(fake: Path) -> None:
    model = swap_linears(tiny_llama(num_hidden_layers=1), "int4.g32.sym")
    report = lowbit.tune(model, budget=600, tokens=(1,), mode="program")
    assert report.complete
    assert {k.entry.schedule for k in report.kernels if k.entry} == {schedule(GOOD)}
    assert all(k.gain is not None and k.gain > 1 for k in report.kernels)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--budget", "soon"), "LB0477"),
        (("--budget", "0s"), "LB0477"),
        (("--tokens", "1,x"), "LB0477"),
        (("--tokens", "0"), "LB0477"),
        (("--device", "toaster"), "LB0477"),
        (("--mode", "sideways"), "LB0568"),
    ],
)
def test_bad_options_are_refused(options: tuple[str, str], code: str, checkpoint: Path, fake: Path) -> None:
    assert code in error_line(invoke("tune", checkpoint, *options))


def test_what_is_no_quantized_checkpoint_is_refused(tiny: Path) -> None:
    assert "LB0114" in error_line(invoke("tune", tiny))
