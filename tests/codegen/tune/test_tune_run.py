"""Tuning through the real worker process: bad candidates, the winner, resumption, budgets, and what selection makes of
it. The kernels are those of a backend that behaves as it is told; one case runs the C++ backend."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _tune_backend import (
    BROKEN,
    CRASH,
    GOOD,
    HANG,
    ILLEGAL,
    RAGGED,
    SLOW,
    THROWS,
    WRONG,
    SharedNursery,
    schedule,
    use_fake,
)

from lowbit.codegen import load_backend
from lowbit.codegen.select import candidates, say_once, stale
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune import tuner
from lowbit.codegen.tune.database import Database, Failure, database_folder, known, update_database
from lowbit.codegen.tune.device import device_name, file_name
from lowbit.codegen.tune.trials import Tuning
from lowbit.codegen.tune.tuner import Job, Options, Outcome, tune_kernels
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.runtime.build import adopt_kernel, build_kernel
from lowbit.compiler.runtime.cache import KernelCache

SPEC = KernelSpec((16,), 64, "int4.g64.sym", str(LAYOUTS["panel16"]), "float")
HERE = host_target()
OPTIONS = Options(budget=300, candidates=9, neighbours=0, race_s=0.05, run_s=4.0, builders=1)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    stale.cache_clear()
    yield use_fake(monkeypatch, tmp_path)
    load_backend.cache_clear()
    stale.cache_clear()


def compiled(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()]


def database() -> Database:
    return known(str(device_name(HERE)))


def tune(options: Options = OPTIONS, tokens: int = 16) -> Outcome:
    (outcome,) = tune_kernels([Job(SPEC, tokens)], HERE, options)
    return outcome


def first(tokens: int = 16) -> int:
    return candidates(SPEC, HERE, tokens)[0][2].get("does", -1)


def test_bad_candidates_are_quarantined_and_the_fastest_right_one_wins(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first() == SLOW  # by prediction
    outcome = tune()
    entry = outcome.entry
    assert entry is not None
    assert entry.complete
    assert (entry.default, outcome.why) == (schedule(SLOW), "")
    assert entry.schedule in (schedule(GOOD), schedule(RAGGED))
    assert entry.default_seconds is not None
    assert entry.default_seconds > entry.seconds
    kinds = {f.schedule.get("does", 0): f.kind for f in database().failures.values()}
    expected = {WRONG: "wrong", CRASH: "crash", HANG: "timeout", BROKEN: "build", THROWS: "launch"}
    assert {k: v for k, v in kinds.items() if k != RAGGED} == expected
    reasons = "\n".join(outcome.failures)
    for words in ("died of SIGSEGV (about to die) while running", "refuses the call", "the compiler does not like it"):
        assert words in reasons
    assert ILLEGAL not in compiled(log)

    # Selection follows, for this class and device only, for as long as the generator writes the same code.
    chosen = entry.schedule.get("does", 0)
    assert first() == first(9) == chosen
    assert first(8) == SLOW
    monkeypatch.setenv("LOWBIT_TUNING", "off")
    assert first() == SLOW
    monkeypatch.delenv("LOWBIT_TUNING")
    monkeypatch.setenv("LOWBIT_FAKE_VERSION", "2")
    stale.cache_clear()
    assert first() == SLOW
    monkeypatch.delenv("LOWBIT_FAKE_VERSION")
    stale.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert first() == SLOW
    finally:
        torch.set_num_threads(threads)
    assert first() == chosen

    # The same run again measures nothing, and compiles nothing.
    before = compiled(log)
    again = tune()
    assert (again.known, again.entry, compiled(log)) == (True, entry, before)

    # What is quarantined is not even compiled when the rest is measured again.
    monkeypatch.setenv("LOWBIT_FAKE_SPACE", f"{SLOW},{CRASH},{HANG},{GOOD}")
    update_database(Path(str(database_folder())) / file_name(str(device_name(HERE))), str(device_name(HERE)),
                    lambda d: d.entries.clear())  # fmt: skip
    outcome = tune()
    assert outcome.entry is not None
    assert outcome.entry.schedule == schedule(GOOD)
    assert sorted(compiled(log)[len(before) :]) == [GOOD, SLOW]
    assert sum("quarantined before" in line for line in outcome.failures) == 2


def test_a_winner_that_is_wrong_on_other_data_loses(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_FAKE_SPACE", f"{SLOW},{RAGGED}")
    entry = tune().entry
    assert entry is not None
    assert entry.schedule == schedule(SLOW)
    assert [f.kind for f in database().failures.values()] == ["wrong"]


def test_an_interrupted_run_keeps_what_it_measured_and_goes_on(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_FAKE_SPACE", f"{SLOW},{GOOD}")

    def interrupt(self: Tuning, finalists: object) -> dict[object, float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tuning, "_race", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune()
    (partial,) = database().entries.values()
    assert not partial.complete
    assert {t.schedule for t in partial.trials} == {schedule(SLOW), schedule(GOOD)}
    assert first() == GOOD
    before = compiled(log)
    assert sorted(before) == [GOOD, SLOW]
    asked = []
    ask = tuner.Worker.ask
    monkeypatch.setattr(tuner.Worker, "ask", lambda self, r, limits: asked.append(r) or ask(self, r, limits))
    entry = tune().entry
    assert entry is not None
    assert entry.complete
    assert compiled(log) == before
    assert not [r for r in asked if r["op"] == "try" and r["time"]]
    assert [r["op"] for r in asked if r["op"] != "build"] == ["race", "try"]


def test_a_budget_that_is_used_up_blames_no_candidate(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_FAKE_SPACE", f"{HANG},{GOOD}")
    outcomes = tune_kernels(
        [Job(SPEC, 16), Job(SPEC, 1)], HERE, Options(budget=3.0, candidates=2, run_s=1000.0, builders=1)
    )
    assert [o.entry for o in outcomes] == [None, None]
    assert outcomes[1].why == "not reached within the budget"
    assert database().failures == {}
    monkeypatch.setenv("LOWBIT_FAKE_SPACE", str(GOOD))
    entry = tune(tokens=1).entry
    none_left = tune_kernels([Job(SPEC, 16), Job(SPEC, 1)], HERE, Options(budget=1e-9, builders=1))
    assert [(o.entry, o.known) for o in none_left] == [(None, False), (entry, True)]


def test_restart_measures_again(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_FAKE_SPACE", str(GOOD))
    tune()
    tune(Options(budget=300, builders=1, race_s=0.05, restart=True))
    assert compiled(log) == [GOOD, GOOD]


def test_tuning_for_another_machine_is_refused(log: Path) -> None:
    with pytest.raises(KernelError, match="LB0475"):
        tune_kernels([Job(SPEC, 1)], Target.parse("sm_90"))


@pytest.mark.parametrize(
    ("space", "built", "lines"),
    [
        ((BROKEN, WRONG, GOOD), ("fake", GOOD), 2),
        ((BROKEN, WRONG, RAGGED, GOOD), ("reference", None), 4),  # three attempts, then the next backend
    ],
)
def test_a_schedule_that_fails_makes_room_for_the_next(
    space: tuple[int, ...], built: tuple[str, int | None], lines: int, log: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("LOWBIT_FAKE_SPACE", ",".join(map(str, space)))
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "lowbit"):
        kernel = build_kernel(SPEC, HERE, 16, KernelCache(tmp_path))
    assert kernel.backend == built[0]
    assert built[1] is None or kernel.schedule == schedule(built[1])
    said = [r.getMessage() for r in caplog.records if "fake" in r.getMessage()]
    assert len(said) == lines
    assert "the compiler does not like it" in said[0]
    assert "disagrees with the reference" in said[1]


def test_serving_does_not_touch_what_is_quarantined(
    log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOWBIT_FAKE_SPACE", f"{CRASH},{GOOD}")
    say_once.cache_clear()
    code = load_backend("fake").emit(SPEC, schedule(CRASH), HERE).digest
    bad = Failure("fake", SPEC.key(), schedule(CRASH), code, "fake 1", "crash", "crash: died of SIGSEGV")
    device = str(device_name(HERE))
    update_database(Path(str(database_folder())) / file_name(device), device, lambda d: d.fail(bad))
    with caplog.at_level(logging.WARNING, "lowbit"):
        assert build_kernel(SPEC, HERE, 16, KernelCache()).schedule == schedule(GOOD)
    assert "tuning found: crash: died of SIGSEGV" in caplog.text
    assert CRASH not in compiled(log)


@pytest.mark.real_kernels
def test_a_real_kernel_is_tuned_and_then_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load_backend("cpp")
    if why := backend.available(HERE):
        pytest.skip(why)
    monkeypatch.setattr(tuner, "Nursery", SharedNursery)
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setenv("LOWBIT_BACKENDS", "cpp,reference")
    monkeypatch.delenv("LOWBIT_TUNING", raising=False)
    options = Options(budget=300, candidates=2, neighbours=0, race_s=0.05, builders=1)
    (outcome,) = tune_kernels(
        [Job(SPEC, 1)], HERE, options, adopt=lambda b, spec, s, path, error: adopt_kernel(b, spec, s, HERE, path, error)
    )
    entry = outcome.entry
    assert entry is not None, outcome
    assert entry.complete
    assert 0 <= entry.error < 2e-5
    assert len(entry.trials) == 2
    assert entry.schedule in list(backend.space(SPEC, HERE, 1))
    monkeypatch.setattr(type(backend), "compile", lambda *args: pytest.fail("compiled again"))
    kernel = build_kernel(SPEC, HERE, 1, KernelCache())
    assert (kernel.backend, kernel.schedule) == ("cpp", entry.schedule)
    assert list((tmp_path / "tuning" / "candidates").iterdir()) == []
