"""Progress of long commands: a bar on a terminal, plain lines in a pipe or log, JSON events for machines.

Everything goes to stderr, so that stdout keeps the result alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["BarSink", "JsonSink", "LineSink", "make_sink", "window_progress"]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _resident_mb() -> float:
    """Memory this process holds now, in MB; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096 / 1e6
    except OSError:
        return 0.0


def _facts(info: dict[str, Any]) -> str:
    """What one layer's record says: its error, against rounding to nearest."""
    error, rtn = info.get("proxy_error"), info.get("rtn_error")
    parts = [str(info["format"])] if info.get("format") else []
    if isinstance(error, float) and isinstance(rtn, float) and rtn > 0:
        parts.append(f"error {100 * error / rtn:.0f}% of rtn's")
    return ", ".join(parts)


class _Timed:
    """Counts layers and predicts the time left from those done in this process."""

    def __init__(self) -> None:
        self.total, self._begin, self._first = 0, time.monotonic(), -1

    def start(self, total_layers: int, names: Sequence[str]) -> None:
        """A run of `total_layers` layers begins."""
        self.total, self._begin = total_layers, time.monotonic()

    def eta(self, done: int) -> float | None:
        """Seconds left, or None before there is anything to go by."""
        if self._first < 0:
            self._first = done - 1  # layers that a resumed run found finished took no time
        worked = done - self._first
        return (time.monotonic() - self._begin) / worked * (self.total - done) if worked > 0 else None


class LineSink(_Timed):
    """One plain line per layer."""

    def layer(self, i: int, n: int, path: str, info: dict[str, Any]) -> None:
        """Layer `i` (from 1) of `n` is done."""
        left = self.eta(i)
        eta = f", {_clock(left)} left" if left is not None and i < n else ""
        facts = _facts(info)
        print(f"layer {i}/{n} {path}{': ' + facts if facts else ''} ({_resident_mb():.0f} MB{eta})", file=sys.stderr)
        sys.stderr.flush()

    def message(self, text: str) -> None:
        """Something worth saying."""
        print(text, file=sys.stderr)
        sys.stderr.flush()

    def finish(self) -> None:
        """The run is over."""


class JsonSink(_Timed):
    """One JSON object per line on stderr."""

    def start(self, total_layers: int, names: Sequence[str]) -> None:
        """A run of `total_layers` layers begins."""
        super().start(total_layers, names)
        self._say({"event": "start", "layers": total_layers})

    def layer(self, i: int, n: int, path: str, info: dict[str, Any]) -> None:
        """Layer `i` (from 1) of `n` is done."""
        self._say({"event": "layer", "index": i, "of": n, "path": path, "eta_seconds": self.eta(i), **info})

    def message(self, text: str) -> None:
        """Something worth saying."""
        self._say({"event": "message", "text": text})

    def finish(self) -> None:
        """The run is over."""
        self._say({"event": "finish"})

    def _say(self, record: dict[str, Any]) -> None:
        print(json.dumps(record, default=str), file=sys.stderr, flush=True)


class BarSink(_Timed):
    """A bar with layer, time left, error against rounding, and memory."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("quantizing"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            TextColumn("{task.fields[facts]}", markup=False),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def start(self, total_layers: int, names: Sequence[str]) -> None:
        """A run of `total_layers` layers begins."""
        super().start(total_layers, names)
        self._task = self._bar.add_task("layers", total=total_layers, eta="", facts="")
        self._bar.start()

    def layer(self, i: int, n: int, path: str, info: dict[str, Any]) -> None:
        """Layer `i` (from 1) of `n` is done."""
        left = self.eta(i)
        eta = f"{_clock(left)} left" if left is not None else ""
        facts = f"{path} {_facts(info)} {_resident_mb():.0f} MB"
        self._bar.update(self._task, completed=i, eta=eta, facts=facts)

    def message(self, text: str) -> None:
        """Something worth saying."""
        self._bar.console.print(text, markup=False, highlight=False)

    def finish(self) -> None:
        """The run is over."""
        self._bar.stop()


def make_sink(json_output: bool) -> LineSink | JsonSink | BarSink:
    """The sink that suits where stderr goes."""
    if json_output:
        return JsonSink()
    return BarSink() if sys.stderr.isatty() else LineSink()


@contextmanager
def window_progress(total: int, json_output: bool) -> Iterator[Callable[[int, int, float], None]]:
    """A progress callback for `evaluate`: a bar, lines or JSON events on stderr."""
    if json_output or not sys.stderr.isatty():

        def say(done: int, of: int, so_far: float) -> None:
            if json_output:
                print(json.dumps({"event": "window", "index": done, "of": of, "perplexity": so_far}), file=sys.stderr)
            else:
                print(f"window {done}/{of}: perplexity {so_far:.3f} so far", file=sys.stderr)
            sys.stderr.flush()

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("perplexity {task.fields[so_far]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("windows", total=total, so_far="-")
        yield lambda done, of, so_far: bar.update(task, completed=done, total=of, so_far=f"{so_far:.3f}")
