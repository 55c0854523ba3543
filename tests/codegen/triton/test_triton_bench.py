"""The GPU benchmark's own logic, without a GPU: the dry run, the oracle, tuning, resuming, running out of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.tune.database import Entry
from lowbit.codegen.tune.tuner import Job, Outcome
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.qtensor import unpack
from lowbit.quantizers.weights import unpack_weights

BENCH = Path(__file__).resolve().parents[3] / "bench"
FMT = "int3.g64.asym"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`bench/kernels.py` set up for two small matrices on the CPU; nothing is compiled or timed."""
    monkeypatch.syspath_prepend(str(BENCH))
    import kernel_cases  # type: ignore[import-not-found]
    import kernels  # type: ignore[import-not-found]

    monkeypatch.setattr(kernel_cases, "DEVICE", "cpu")
    grid = [kernels.Problem(FMT, 64, 128), kernels.Problem("int4.g128.sym", 64, 128)]
    monkeypatch.setattr(kernels, "problems", lambda: iter(grid))
    monkeypatch.setattr(kernels, "M_CLASSES", (1, 2, 16))
    monkeypatch.setattr(kernels, "_device_target", lambda: Target.parse("sm_90"))
    monkeypatch.setattr(kernels, "device_name", lambda target: "sm_90; fake; 1 multiprocessors")
    monkeypatch.setattr(kernels, "export", lambda target, path: 0)
    yield kernels
    for name in ("kernels", "kernel_cases", "kernel_peers"):
        sys.modules.pop(name, None)


def outcome(job: Job, complete: bool = True) -> Outcome:
    """What the tuner would say."""
    best, default = Schedule(tile_m=2), Schedule()
    entry = Entry("triton", job.spec.key(), job.tokens, best, "c", 1e-5, 1e-3, default, 2e-5, 9, "t", (), complete)
    return Outcome(job, "triton", entry, failures=["tile_m=4: wrong: relative error 1 > 0.01"])


def test_oracle_agrees_with_the_layout(bench: ModuleType) -> None:
    weight = bench.random_weight(bench.Problem(FMT, 48, 192))
    (q,) = unpack(weight)
    torch.testing.assert_close(bench.dequantize(weight), q.dequantize())
    copies = bench.copies_of(weight, 4 * weight.nbytes())
    assert len(copies) == 4
    assert len({c.planes[0].data_ptr() for c in copies}) == 4


@pytest.mark.parametrize("fmt", ["int2.g64.fz", "vq.d4.k256", "vq.d8.k256.r256"])
def test_oracle_of_offsets_and_vectors(fmt: str, bench: ModuleType) -> None:
    problem = bench.Problem(fmt, 48, 192)
    weight = bench.random_weight(problem)
    (q,) = unpack_weights(weight)
    torch.testing.assert_close(bench.dequantize(weight), q.dequantize())
    assert problem.nbytes == weight.nbytes()
    assert len({next(iter(c.tensors.values())).data_ptr() for c in bench.copies_of(weight, 1)}) == 4


def test_tuning_asks_for_what_tells_most_first_and_reports_what_came_back(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    folders: list[str | None] = []

    def tuned(jobs: list[Job], target: Target, options: object, settled: Any, adopt: object) -> list[Outcome]:
        folders.append(os.environ.get("LOWBIT_TUNING"))
        asked.extend((job.spec.format, job.tokens) for job in jobs)
        for i, job in enumerate(jobs):
            settled(i + 1, len(jobs), outcome(job))
        return [outcome(job) for job in jobs]

    monkeypatch.setattr(bench, "tune_kernels", tuned)
    run = bench.Run(tmp_path, 1000)
    assert bench.run_stage(run, "tune", bench.tune)
    assert asked == [(fmt, m) for part in ((1, 16), (2,)) for fmt in (FMT, "int4.g128.sym") for m in part]
    assert folders == [str(tmp_path / "tuning")]
    stored = json.loads((tmp_path / "tune.json").read_text())
    assert stored["complete"]
    assert stored["wrong"] == len(asked)
    for found in stored["problems"].values():
        assert sorted(row["m"] for row in found["rows"]) == [1, 2, 16]
        assert all(row["schedule"]["tile_m"] == 2 for row in found["rows"])
    assert bench.run_stage(bench.Run(tmp_path, 1000), "tune", pytest.fail)


def test_a_run_out_of_time_goes_on_later(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "tune_kernels", lambda jobs, *rest: [outcome(job, complete=False) for job in jobs])
    assert not bench.run_stage(bench.Run(tmp_path, 1000), "tune", bench.tune)
    assert "out of time" in capsys.readouterr().out
    assert not bench.Run(tmp_path, 1000).read("tune")["complete"]
    assert not bench.run_stage(bench.Run(tmp_path, 5), "tune", pytest.fail)


def test_a_matrix_is_compared_again_when_more_of_it_is_tuned(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    monkeypatch.setattr(bench, "_time_ours", lambda run, problem, *rest: timed.append(str(problem)) or [])
    monkeypatch.setattr(bench, "PEERS", {})
    names = [f"{FMT}-64x128", "int4.g128.sym-64x128"]
    run = bench.Run(tmp_path, 1000)
    for rows, complete in (((1, 0), False), ((1, 0), False), ((2, 1), False), ((2, 1), True)):
        found = {name: {"rows": [{}] * n} for name, n in zip(names, rows, strict=True)}
        run.write("tune", {"stage": "tune", "problems": found, "complete": complete})
        assert bench.run_stage(run, "compare", bench.compare) == complete
    assert timed == [names[0], *names]
    assert run.read("compare")["complete"]


def test_tuning_leaves_time_for_comparing(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[float] = []

    def tuned(jobs: list[Job], target: Target, options: Any, *rest: object) -> list[Outcome]:
        budgets.append(options.budget)
        return [outcome(job, complete=False) for job in jobs]

    monkeypatch.setattr(bench, "tune_kernels", tuned)
    for share in (1.0, bench.SHARE):
        bench.run_stage(bench.Run(tmp_path, 1000, share=share), "tune", bench.tune)
    assert 900 < budgets[0] < 1000
    assert 500 < budgets[1] < 600


def test_shortlist_spreads_over_kinds(bench: ModuleType) -> None:
    spec = bench.Problem("int4.g128.sym", 8192, 8192).spec
    chosen = bench.ranked(spec, Target.parse("sm_90"), 1)
    assert len(chosen) == len(set(chosen)) == bench.SHORTLIST
    assert {s.get("gemv", 0) for s in chosen} == {0, 1}
    assert len({s.tile_n for s in chosen}) >= 3


def test_peers_say_why_they_are_left_out(bench: ModuleType) -> None:
    import kernel_peers

    problem = bench.Problem("int2.g64.asym", 64, 128)
    dense = torch.randn(64, 128)
    assert kernel_peers.prepare("torch-int4pack", problem, dense) == (None, "int4 with groups of 32 to 256 only")
    vector = bench.Problem("vq.d4.k256", 64, 128)
    assert kernel_peers.prepare("torch-int4pack", vector, dense) == (None, "has no vector formats")
    product, why = kernel_peers.prepare("torch-bf16", problem, dense)
    assert why == ""
    assert product is not None
    assert product(torch.randn(2, 128).bfloat16()).shape == (2, 64)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_dry_run_needs_no_gpu(tmp_path: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCH / "kernels.py"), "--dry-run", "--out", str(tmp_path), "--format", FMT]
    subprocess.run(command, env=env, check=True, capture_output=True)
    result = json.loads((tmp_path / "dry-run.json").read_text())
    assert result["complete"]
    assert all(0 < r["registers"] <= 255 and r["spills"] == 0 for r in result["offline"])
    assert len(result["offline"]) == 2
    assert all(schedules for grid in result["schedules"].values() for schedules in grid.values())


def test_summary_of_a_junit_file(tmp_path: Path) -> None:
    xml = tmp_path / "tests.xml"
    xml.write_text(
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0" time="1.5">'
        '<testcase classname="tests.gpu.test_x" name="a[1-b.c]"/>'
        '<testcase name="b"><failure message="wrong&#10;more"/></testcase></testsuite></testsuites>'
    )
    command = [sys.executable, str(BENCH / "junit_summary.py"), str(xml)]
    stopped = subprocess.run([*command, "124", str(tmp_path / "out.json")], check=False, capture_output=True)
    assert stopped.returncode == 1
    assert not (tmp_path / "out.json").exists()
    assert (tmp_path / "out.passed").read_text() == "tests/gpu/test_x.py::a[1-b.c]\n"
    subprocess.run([*command, "1", str(tmp_path / "out.json")], check=True, capture_output=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["tests"], result["failures"], result["failed"]) == (2, 1, {"b": ["wrong"]})
    assert result["passed_before"] == 1
    missing = subprocess.run([sys.executable, command[1], str(tmp_path / "none.xml"), "1", str(tmp_path / "none.json")])
    assert missing.returncode == 1
    assert not (tmp_path / "none.json").exists()
