"""Ctrl-C during a run: once to stop where the work is saved, twice to stop at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lowbit.compiler.errors import RunError
from lowbit.compiler.job.layers import ProgressSink

__all__ = ["Interrupt"]


class Interrupt:
    """Turns the first Ctrl-C into a flag that is looked at between layers; the second one interrupts at once."""

    def __init__(self, sink: ProgressSink) -> None:
        self.asked = False
        self._sink = sink
        self._before: Any = None
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interrupt:
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._sink.message("stopping after this layer; press Ctrl-C again to stop now")

    def check(self, where: str) -> None:
        """Raise RunError (LB0530) when Ctrl-C was pressed."""
        if self.asked:
            raise RunError(
                "LB0530", f"stopped after {where}, everything up to there is saved",
                hint="run the same command again to continue",
            )  # fmt: skip
