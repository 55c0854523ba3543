"""Runs with tuning and fine-tuning that are killed continue and write the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from _jobs import Recorder, contents, quantize, save_tiny

from lowbit.compiler.job.journal import Journal
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.scheme import Scheme, Tuning

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
TUNED = {"tune": Tuning(1, 1e-2, 2), "finetune": Tuning(1, 1e-2, 4)}
SCHEMES = {
    "vptq": Scheme("test", parse_format("vq.d4.k16.r4"), "vptq", {"refit": 1}, **TUNED),  # type: ignore[arg-type]
    "decoupleq": Scheme("test", parse_format("int2.g16.fz"), "decoupleq", **TUNED),  # type: ignore[arg-type]
}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tuned") / "model", "20KB", **SMALL)


@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "parallel"])
@pytest.mark.parametrize("method", SCHEMES)
def test_killed_before_and_after_every_kind_of_event(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, sequential: bool
) -> None:
    """Between two groups of a block, around tuning, around the end of a block, and around fine-tuning."""
    chosen, append = SCHEMES[method], Journal.append
    seen: list[str] = []

    def recording(self: Journal, record: dict[str, object]) -> None:
        seen.append(str(record["event"]))
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", recording)
        quantize(model, tmp_path / "whole", chosen, sequential=sequential)
    whole = contents(tmp_path / "whole")
    assert {"embedded", "group", "tuned", "block", "finetuned", "writing"} < set(seen)
    places = [seen.index("group") + 1, seen.index("tuned"), seen.index("tuned") + 1, seen.index("finetuned")]
    for place in places:
        left, out = [place], tmp_path / f"out{place}"

        def dying(self: Journal, record: dict[str, object], left: list[int] = left) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            append(self, record)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", dying)
            with pytest.raises(Killed):
                quantize(model, out, chosen, sequential=sequential)
        sink = Recorder()
        quantize(model, out, chosen, sequential=sequential, progress=sink)
        assert any("continuing" in m for m in sink.messages)
        assert contents(out) == whole, f"killed at event {place} of {seen}"


@pytest.mark.slow
@pytest.mark.parametrize("place", [4, 7, 12])
@pytest.mark.parametrize("method", SCHEMES)
def test_killed_for_real(model: Path, tmp_path: Path, method: str, place: int) -> None:
    """SIGKILL from within, in a process of its own."""
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from _jobs import quantize
        from test_resume_tuned import SCHEMES
        from lowbit.compiler.job.journal import Journal
        append, left = Journal.append, [{place}]
        def dying(self, record):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            append(self, record)
        Journal.append = dying
        quantize(Path({str(model)!r}), Path({str(tmp_path / "out")!r}), SCHEMES[{method!r}])
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, timeout=240)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    quantize(model, tmp_path / "whole", SCHEMES[method])
    quantize(model, tmp_path / "out", SCHEMES[method])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
