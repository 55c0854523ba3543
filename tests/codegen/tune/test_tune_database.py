"""The database of measurements: round trips, damage, other devices and versions, several writers, what merges."""

from __future__ import annotations

import json
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune import database as db
from lowbit.codegen.tune.database import Database, Entry, Failure, Trial, known, read_database, update_database
from lowbit.codegen.tune.device import file_name
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS

DEVICE = "sm_90; NVIDIA H200; 132 multiprocessors"
SPEC = KernelSpec((16,), 64, "int4.g64.sym", str(LAYOUTS["panel16"]), "float").key()
FAST, SLOW = Schedule(2, 32).with_extra(words=1), Schedule(1, 16)
TRIALS = (Trial(FAST, "abc", 1e-6), Trial(SLOW, "d", 2e-6))
ENTRY = Entry("cpp", SPEC, 16, FAST, "abc", 1e-6, 1e-7, SLOW, 2e-6, 40, "g++ 12", TRIALS)
FAILURE = Failure("cpp", SPEC, SLOW, "feed", "g++ 12", "crash", "crash: died of SIGSEGV")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWBIT_TUNING", str(tmp_path))
    monkeypatch.setattr(db, "SHIPPED", tmp_path / "shipped")
    return tmp_path / file_name(DEVICE)


def fill(database: Database) -> None:
    database.put(ENTRY)
    database.fail(FAILURE)


def test_round_trip(path: Path) -> None:
    update_database(path, DEVICE, fill)
    found = read_database(path, DEVICE)
    assert found.entries == {ENTRY.key: ENTRY}
    assert found.failures == {FAILURE.key: FAILURE}
    assert known(DEVICE).entries == found.entries
    text = path.read_text()
    update_database(path, DEVICE, lambda d: None)
    assert path.read_text() == text
    update_database(path, DEVICE, lambda d: d.forget({SPEC}))
    assert known(DEVICE).entries == known(DEVICE).failures == {}


def test_own_measurements_go_over_shipped_ones_unless_unfinished(path: Path) -> None:
    shipped = path.parent / "shipped" / path.name
    update_database(shipped, DEVICE, fill)
    assert known(DEVICE).entries[ENTRY.key] == ENTRY
    better = replace(ENTRY, schedule=SLOW, code="d", complete=False)
    update_database(path, DEVICE, lambda d: d.put(better))
    assert known(DEVICE).entries[ENTRY.key] == ENTRY
    update_database(path, DEVICE, lambda d: d.put(replace(better, complete=True)))
    assert known(DEVICE).entries[ENTRY.key].schedule == SLOW
    assert known(DEVICE).failures == {FAILURE.key: FAILURE}
    assert json.loads(shipped.read_text())["entries"][0]["code"] == "abc"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '{"schema": "x", "device": "d"}',
                                  '{"schema": 1, "device": "d", "entries": 3}', "\0\0"])  # fmt: skip
def test_a_damaged_file_is_one_warning_and_nothing_is_lost(
    text: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "lowbit"):
        assert known(DEVICE).entries == {}
        assert known(DEVICE).entries == {}
    assert [r.getMessage().split()[0] for r in caplog.records] == ["LB0470"]
    update_database(path, DEVICE, fill)
    assert known(DEVICE).entries == {ENTRY.key: ENTRY}
    assert path.with_name(f"{path.name}.damaged").read_text() == text
    path.write_text(text)
    update_database(path, DEVICE, fill)
    assert path.with_name(f"{path.name}.damaged1").read_text() == text


@pytest.mark.parametrize("change", [{"schema": 99}, {"device": "sm_80; NVIDIA A100; 108 multiprocessors"}])
def test_files_of_later_versions_and_other_devices_are_left_alone(
    change: dict[str, object], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    update_database(path, DEVICE, fill)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = path.read_text()
    code = "LB0471" if "schema" in change else "LB0472"
    with caplog.at_level(logging.WARNING, "lowbit"):
        assert known(DEVICE).entries == {}
    assert code in caplog.text
    with pytest.raises(KernelError, match=code):
        update_database(path, DEVICE, fill)
    assert path.read_text() == before


@pytest.mark.parametrize(
    "change", [{"seconds": -1}, {"seconds": "nan"}, {"schedule": 3}, {"spec": "x"}, {"tokens": None}]
)
def test_a_row_that_makes_no_sense_is_ignored_and_kept(change: dict[str, object], path: Path) -> None:
    update_database(path, DEVICE, fill)
    document = json.loads(path.read_text())
    document["entries"].append({**document["entries"][0], **change})
    path.write_text(json.dumps(document))
    found = read_database(path, DEVICE)
    assert found.entries == {ENTRY.key: ENTRY}
    assert len(found.ignored) == 1
    update_database(path, DEVICE, lambda d: d.put(replace(ENTRY, tokens=1)))
    assert json.loads(path.read_text())["entries"][-1] == document["entries"][-1]


def test_a_folder_that_cannot_be_written_is_one_error(path: Path) -> None:
    (path.parent / "file").write_text("")
    with pytest.raises(KernelError, match="LB0473"):
        update_database(path.parent / "file" / "x.json", DEVICE, fill)


def _write(path: str, worker: int) -> None:
    for i in range(10):
        update_database(Path(path), DEVICE, lambda d, i=i: d.put(replace(ENTRY, tokens=100 * worker + i)))  # type: ignore[misc]


def test_several_processes_write_and_nothing_is_lost(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(str(path), w)) for w in range(4)]
    for w in writers:
        w.start()
    for w in writers:
        w.join(60)
    assert [w.exitcode for w in writers] == [0] * 4
    assert {e.tokens for e in read_database(path, DEVICE).entries.values()} == {
        100 * w + i for w in range(4) for i in range(10)
    }
    assert not [p for p in path.parent.iterdir() if p.suffix not in (".json", ".lock")]


def test_shipped_files_can_be_read() -> None:
    for path in db.SHIPPED.glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert path.name == file_name(device)
        found = read_database(path, device)
        assert not found.ignored
        assert all(e.complete for e in found.entries.values())
