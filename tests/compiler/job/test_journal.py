"""The journal refuses what does not belong together, and holds one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from _jobs import Recorder, contents, quantize, save_tiny, scheme, token_ids
from _models import random_qtensor

from lowbit.compiler.errors import RunError
from lowbit.compiler.job import run as run_module
from lowbit.compiler.job.journal import Journal, load_qtensor, save_qtensors
from lowbit.quantizers.formats import catalog
from lowbit.quantizers.scheme import Scheme

QUICK = {"refits": 0, "clip_search": False}


class Stop(BaseException):
    """Ends a run early."""


def stop(*_: Any, **__: Any) -> None:
    raise Stop


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "model")
    save_tiny(folder / "other", seed=1)
    return folder


@pytest.fixture(scope="module")
def interrupted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output path of a run that was stopped after its first group of layers."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    append = Journal.append

    def dying(self: Journal, record: Any) -> None:
        append(self, record)
        if record["event"] == "group":
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", dying)
        with pytest.raises(Stop):
            quantize(models / "model", out, scheme(**QUICK))
    return out


CHANGES: dict[str, dict[str, Any]] = {
    "model": {"model": "other"},
    "scheme.weight": {"scheme": scheme("int3.g32.sym", **QUICK)},
    "scheme.method": {"scheme": Scheme("test", scheme().weight, "rtn", {"clip_search": False})},
    "scheme.options.refits": {"scheme": scheme(refits=1, clip_search=False)},
    "scheme.options.damping": {"scheme": scheme(damping=0.1, **QUICK)},
    "scheme.ignore": {"scheme": Scheme("test", scheme().weight, "gptq", QUICK, ignore=("lm_head", "*.up_proj"))},
    "scheme.overrides": {"scheme": Scheme("test", scheme().weight, "gptq", QUICK, overrides=(("*.q_proj", None),))},
    "calibration": {"calibration": token_ids(seed=9)},
    "samples": {"calibration": token_ids(samples=5)},
    "length": {"calibration": token_ids(length=20)},
    "seed": {"seed": 3},
    "sequential": {"sequential": False},
    "skip_first": {"skip_first": 2},
}


@pytest.mark.parametrize("field", CHANGES)
def test_other_settings_are_refused_by_name(models: Path, interrupted: Path, field: str) -> None:
    options = {"scheme": scheme(**QUICK), "model": "model", **CHANGES[field]}
    before = (interrupted.parent / f".{interrupted.name}.lowbit-run" / "journal.jsonl").read_bytes()
    with pytest.raises(RunError, match="LB0531") as caught:
        quantize(models / options.pop("model"), interrupted, options.pop("scheme"), **options)
    assert "--restart" in caught.value.render()
    named = caught.value.message.split(" had ")[1].split(" = ")[0]
    assert named.startswith(field)
    after = (interrupted.parent / f".{interrupted.name}.lowbit-run" / "journal.jsonl").read_bytes()
    assert before == after


def test_other_versions_are_refused(models: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.compiler.job.run.versions", lambda: {"lowbit": "9.9", "torch": torch.__version__})
    with pytest.raises(RunError, match=r"LB0531.*lowbit"):
        quantize(models / "model", interrupted, scheme(**QUICK))


def test_restart_forgets(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_checkpoint", stop)
        with pytest.raises(Stop):
            quantize(models / "model", tmp_path / "out", scheme("int3.g32.sym", **QUICK))
    sink = Recorder()
    quantize(models / "model", tmp_path / "out", scheme(**QUICK), restart=True, progress=sink)
    assert len(sink.layers) == sink.total
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_damaged_files_are_noticed(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, folder = tmp_path / "out", tmp_path / ".out.lowbit-run"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_checkpoint", stop)
        with pytest.raises(Stop):
            quantize(models / "model", out, scheme(**QUICK))
    victim = folder / "group_00003.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    with pytest.raises(RunError, match=r"LB0534.*--restart"):
        quantize(models / "model", out, scheme(**QUICK))
    victim.unlink()
    with pytest.raises(RunError, match="LB0534"):
        quantize(models / "model", out, scheme(**QUICK))
    journal = folder / "journal.jsonl"
    journal.write_text(journal.read_text().replace("{", "[", 1))
    with pytest.raises(RunError, match="LB0534"):
        quantize(models / "model", out, scheme(**QUICK))
    assert not out.exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "work", {"a": 1}) as first:
        with pytest.raises(RunError, match=r"LB0533.*pid \d+ on"), Journal(tmp_path / "work", {"a": 1}):
            pass
        first.append({"event": "group"})
    with Journal(tmp_path / "work", {"a": 1}) as second:
        assert len(second.records) == 1


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    script = (
        "import os,sys; from pathlib import Path; from lowbit.compiler.job.journal import Journal\n"
        f"j=Journal(Path({str(tmp_path / 'work')!r}), {{'a': 1}}).__enter__()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == b"held"
        with pytest.raises(RunError, match=f"pid {holder.pid} "), Journal(tmp_path / "work", {"a": 1}):
            pass
        holder.kill()
        holder.wait()
    with Journal(tmp_path / "work", {"a": 1}) as after:
        assert after.records == []


def test_fifty_races_have_one_winner_each(tmp_path: Path) -> None:
    for race in range(50):
        won: list[int] = []
        lost: list[str] = []
        barrier = threading.Barrier(2)

        def enter(
            race: int = race,
            won: list[int] = won,
            lost: list[str] = lost,
            barrier: threading.Barrier = barrier,
        ) -> None:
            barrier.wait()
            try:
                with Journal(tmp_path / f"work{race}", {}):
                    won.append(1)
                    barrier.wait()
            except RunError as e:
                lost.append(e.code)
                barrier.wait()

        threads = [threading.Thread(target=enter) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert won == [1]
        assert lost == ["LB0533"]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="LB0532"), Journal(tmp_path, {}, restart=True):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "lock").exists()


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    with Journal(tmp_path, {}) as journal:
        journal.append({"event": "group", "n": 1})
        journal.append({"event": "group", "n": 2})
    path = tmp_path / "journal.jsonl"
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with Journal(tmp_path, {}) as journal:
            whole = data[:cut].count(b"\n")
            assert len(journal.records) == max(0, whole - 1)
        assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("fmt", list(catalog()), ids=str)
def test_matrices_come_back_as_they_were(fmt: object, tmp_path: Path) -> None:
    tensors = {
        name: random_qtensor(str(fmt).replace(".ch", f".{g}", 1), 7, 37) for name, g in [("a.b", "g8"), ("c", "t")]
    }
    save_qtensors(tmp_path / "x", tensors)
    for name, q in tensors.items():
        back = load_qtensor(tmp_path / "x", name)
        assert back.fmt == q.fmt
        assert torch.equal(back.codes, q.codes)
        assert torch.equal(back.dequantize(), q.dequantize())


def test_contents_helper_sees_differences(models: Path, tmp_path: Path) -> None:
    quantize(models / "model", tmp_path / "a", scheme(**QUICK))
    quantize(models / "model", tmp_path / "b", scheme("int3.g32.sym", **QUICK))
    assert contents(tmp_path / "a") != contents(tmp_path / "b")


def test_the_order_of_overrides_counts(tmp_path: Path) -> None:
    """The first glob that matches wins, so another order is another scheme."""
    pairs = [["*.q_proj", "keep"], ["*_proj", "int8.ch.sym"]]
    with Journal(tmp_path, {"scheme": {"overrides": pairs}}):
        pass
    with (
        pytest.raises(RunError, match=r"LB0531.*scheme\.overrides"),
        Journal(tmp_path, {"scheme": {"overrides": pairs[::-1]}}),
    ):
        pass
