"""A run that is killed at any point continues with the same call and writes the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _jobs import Recorder, contents, quantize, save_tiny, scheme

from lowbit.compiler.errors import RunError
from lowbit.compiler.job import activations, journal
from lowbit.compiler.job import run as run_module

QUICK = scheme(refits=0, clip_search=False, block=64)
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}


class Killed(BaseException):
    """Stands for the end of the process: nothing in the product may catch it."""


class DyingOS:
    """`os`, in which the call with a given number (over fsync, replace and write) kills the process.

    A write is cut in half first, as a crash would.
    """

    def __init__(self, fatal: int) -> None:
        self.fatal, self.count = fatal, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _step(self) -> bool:
        self.count += 1
        return self.count == self.fatal

    def fsync(self, handle: int) -> None:
        if self._step():
            raise Killed
        os.fsync(handle)

    def replace(self, old: Path, new: Path) -> None:
        if self._step():
            raise Killed
        os.replace(old, new)

    def write(self, handle: int, data: bytes) -> int:
        if self._step():
            os.write(handle, bytes(data[: len(data) // 2]))
            raise Killed
        return os.write(handle, data)


def with_os(monkeypatch: pytest.MonkeyPatch, fatal: int, action: Callable[[], object]) -> int:
    """Run `action` with a dying os; returns how many of its calls were made."""
    dying = DyingOS(fatal)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "os", dying)
        patch.setattr(activations, "os", dying)
        action()
    return dying.count


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("resume") / "model", "20KB", **SMALL)


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "parallel"])
def test_killed_at_any_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequential: bool, stride: int
) -> None:
    steps = with_os(monkeypatch, 0, lambda: quantize(model, tmp_path / "whole", QUICK, sequential=sequential))
    whole = contents(tmp_path / "whole")
    assert steps > 60
    # With a stride the two modes take turns.
    for fatal in range(1 + sequential * (stride // 2), steps + 1, stride):
        out = tmp_path / f"out{fatal}"
        with pytest.raises(Killed):
            with_os(monkeypatch, fatal, lambda out=out: quantize(model, out, QUICK, sequential=sequential))
        assert not out.exists()
        quantize(model, out, QUICK, sequential=sequential)
        assert contents(out) == whole, f"killed at step {fatal} of {steps}"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_killed_again_and_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(model, tmp_path / "whole", QUICK)
    out, kills = tmp_path / "out", 0
    while True:
        try:
            with_os(monkeypatch, 13, lambda: quantize(model, out, QUICK))
            break
        except Killed:
            kills += 1
    assert kills >= 4
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_the_final_write(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    first = quantize(model, tmp_path / "whole", QUICK)
    write, out = run_module.write_checkpoint, tmp_path / "out"

    def die(*args: Any, **kwargs: Any) -> None:
        if when == "after":
            write(*args, **kwargs)
        (tmp_path / ".out.partial-0123").mkdir()  # what a killed writer leaves
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_checkpoint", die)
        with pytest.raises(Killed):
            quantize(model, out, QUICK)
    again = quantize(model, out, QUICK)
    assert contents(out) == contents(tmp_path / "whole")
    assert again.report["totals"]["mean_proxy_error"] == first.report["totals"]["mean_proxy_error"]
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "out"}


def test_killed_for_real(model: Path, tmp_path: Path) -> None:
    """SIGKILL from within, in a process of its own."""
    quantize(model, tmp_path / "whole", QUICK)
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from pathlib import Path
        from _jobs import quantize, scheme
        from lowbit.compiler.job.journal import Journal
        append, left = Journal.append, [6]
        def dying(self, record):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            append(self, record)
        Journal.append = dying
        quantize(Path({str(model)!r}), Path({str(tmp_path / "out")!r}),
                 scheme(refits=0, clip_search=False, block=64))
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(__import__("torch").get_num_threads())}
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, timeout=240)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert (tmp_path / ".out.lowbit-run" / "journal.jsonl").read_text().count("\n") == 5
    sink = Recorder()
    quantize(model, tmp_path / "out", QUICK, progress=sink)
    assert any("continuing" in m for m in sink.messages)
    assert len(sink.layers) < sink.total
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class Interrupter(Recorder):
    """Presses Ctrl-C after a layer."""

    def layer(self, i: int, n: int, path: str, info: dict[str, Any]) -> None:
        super().layer(i, n, path, info)
        if i == 5:
            os.kill(os.getpid(), signal.SIGINT)


def test_control_c_saves_and_says_how_to_continue(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "whole", QUICK)
    before, sink = signal.getsignal(signal.SIGINT), Interrupter()
    with pytest.raises(RunError, match=r"LB0530.*same command"):
        quantize(model, tmp_path / "out", QUICK, progress=sink)
    assert signal.getsignal(signal.SIGINT) is before
    assert sink.finished == 1
    rest = Recorder()
    result = quantize(model, tmp_path / "out", QUICK, progress=rest)
    assert result.report["resumed_layers"] == len(sink.layers)
    assert sink.layers + rest.layers == [layer["path"] for layer in result.report["layers"]]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
