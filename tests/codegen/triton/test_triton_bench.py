"""The GPU benchmark's own logic, without a GPU: the dry run, the oracle, tuning, resuming, running out of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lowbit.codegen.backend import Launcher
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.qtensor import PackedWeight, unpack
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
    monkeypatch.setattr(kernel_cases, "COLD_BYTES", 1 << 16)
    grid = [kernels.Problem(FMT, 64, 128), kernels.Problem("int4.g128.sym", 64, 128)]
    monkeypatch.setattr(kernels, "problems", lambda: iter(grid))
    monkeypatch.setattr(kernels, "TOKENS", (1, 16))
    monkeypatch.setattr(kernels, "Builder", FakeBuilder)
    monkeypatch.setattr(kernels, "_device_target", lambda: Target.parse("sm_90"))
    ticks = iter(range(1, 10**6))
    monkeypatch.setattr(kernels, "seconds_per_call", lambda calls: 1e-6 * (1000 - next(ticks) % 997))
    yield kernels
    for name in ("kernels", "kernel_cases", "kernel_peers"):
        sys.modules.pop(name, None)


class FakeBuilder:
    """Launchers that compute with torch: wrong ones for split schedules, and one that fails to build."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target

    def build(self, spec: KernelSpec, schedules: Iterable[Schedule]) -> tuple[dict[Schedule, Launcher], dict[str, str]]:
        unique = list(dict.fromkeys(schedules))
        return {s: self.launcher(s.split_k == 2) for s in unique[1:]}, {str(s): "made to fail" for s in unique[:1]}

    @staticmethod
    def launcher(wrong: bool) -> Launcher:
        def launch(x: torch.Tensor, w: PackedWeight, bias: object, residual: object, out: torch.Tensor) -> None:
            dense = torch.cat([q.dequantize() for q in unpack(w)])
            out.copy_(x.float() @ dense.T)
            if wrong:
                out[0, 0] = float("nan")

        return launch


def test_oracle_agrees_with_the_layout(bench: ModuleType) -> None:
    weight = bench.random_weight(bench.Problem(FMT, 48, 192))
    (q,) = unpack(weight)
    torch.testing.assert_close(bench.dequantize(weight), q.dequantize())
    copies = bench.copies_of(weight, 1 << 14)
    assert len(copies) == 4
    assert len({c.planes[0].data_ptr() for c in copies}) == 4


@pytest.mark.parametrize("fmt", ["int2.g64.fz", "vq.d4.k256", "vq.d8.k256.r256"])
def test_oracle_of_offsets_and_vectors(fmt: str, bench: ModuleType) -> None:
    problem = bench.Problem(fmt, 48, 192)
    weight = bench.random_weight(problem)
    (q,) = unpack_weights(weight)
    torch.testing.assert_close(bench.dequantize(weight), q.dequantize())
    assert problem.nbytes == weight.nbytes()
    assert len({next(iter(c.tensors.values())).data_ptr() for c in bench.copies_of(weight, 1 << 14)}) == 4


def test_tuning_keeps_the_fastest_right_schedule(bench: ModuleType, tmp_path: Path) -> None:
    run = bench.Run(tmp_path, 1000)
    assert bench.run_stage(run, "tune", bench.tune)
    stored = json.loads((tmp_path / "tune.json").read_text())
    assert stored["complete"]
    for found in stored["problems"].values():
        assert [r["m"] for r in found["rows"]] == [1, 16]
        assert found["failed"]
        for row in found["rows"]:
            assert all(row["seconds"] <= other["seconds"] for other in row["others"])
            assert row["schedule"]["split_k"] != 2
            assert row["error"] < 0.01
        assert all(w["schedule"]["split_k"] == 2 for w in found["wrong"])


def test_a_run_out_of_time_goes_on_later(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bench.Run(tmp_path, 1000)
    finished = []

    def stop_after_one(problem: object, result: object) -> None:
        finished.append(problem)
        run.deadline = 0.0

    monkeypatch.setattr(bench, "_print_best", stop_after_one)
    assert not bench.run_stage(run, "tune", bench.tune)
    assert "out of time" in capsys.readouterr().out
    assert not run.read("tune")["complete"]
    again = bench.Run(tmp_path, 1000)
    assert bench.run_stage(again, "tune", bench.tune)
    assert len(finished) == 2
    assert len(set(map(str, finished))) == 2
    assert bench.run_stage(again, "tune", pytest.fail)


def test_shortlist_spreads_over_kinds(bench: ModuleType) -> None:
    spec = bench.Problem("int4.g128.sym", 8192, 8192).spec
    chosen = bench.shortlist(spec, Target.parse("sm_90"), 1)
    assert len(chosen) == len(set(chosen)) == bench.SHORTLIST
    assert {s.get("gemv", 0) for s in chosen} == {0, 1}
    assert len({s.tile_n for s in chosen}) >= 3
    assert all(n != chosen[0] for n in bench.neighbours(spec, Target.parse("sm_90"), chosen[0]))


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
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0" time="1.5"><testcase name="a"/>'
        '<testcase name="b"><failure message="wrong&#10;more"/></testcase></testsuite></testsuites>'
    )
    command = [sys.executable, str(BENCH / "junit_summary.py"), str(xml)]
    subprocess.run([*command, "1", str(tmp_path / "out.json")], check=True, capture_output=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["tests"], result["failures"], result["failed"]) == (2, 1, {"b": ["wrong"]})
    stopped = subprocess.run([*command, "124", str(tmp_path / "none.json")], check=False, capture_output=True)
    assert stopped.returncode == 1
    assert not (tmp_path / "none.json").exists()
