"""The parent's end of a worker process: requests with time limits, and a reason when it does not come back."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import tempfile
import time
from collections.abc import Mapping
from typing import IO, Any

from lowbit.codegen.tune.database import FailureKind
from lowbit.codegen.tune.nursery import Nursery, OutOfTime

__all__ = ["Refused", "Trouble", "Worker"]

_ANY_S = 60.0  # a stage whose limit is not given
_LAST_WORDS = 300


class Refused(Exception):
    """A candidate that is of no use. at: the stage the worker was in, which in a race names the candidate."""

    def __init__(self, kind: FailureKind, reason: str, at: str = "") -> None:
        super().__init__(reason)
        self.kind, self.reason, self.at = kind, reason, at


class Trouble(Exception):
    """Something went wrong before the candidate had its turn (memory, say): no finding about it."""


class Worker:
    """A process that lives as long as its candidates behave; after one that does not, the next request starts another.

    threads: torch's, in the worker. The nursery's deadline is the worker's.
    """

    def __init__(self, nursery: Nursery, threads: int) -> None:
        self.nursery, self.threads = nursery, threads
        self._pid = 0
        self._requests, self._replies = -1, -1
        self._held = b""
        self._errors: IO[bytes] | None = None

    def ask(self, request: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
        """The reply to a request. limits: seconds each stage may take, by the stage's first word.

        Raises Refused with a kind and a reason, Trouble, OutOfTime, or KernelError (LB0474) when no process can be
        started.
        """
        stage = "start"
        try:
            self._start()
            self._send(request)
            while True:
                reply = self._receive(limits.get(stage.split()[0], _ANY_S))
                if "stage" in reply:
                    stage = str(reply["stage"])
                elif "failed" in reply:
                    kind = _kind(stage, str(reply["code"]))
                    if kind != "build":
                        self.close()  # it may have written where it should not, or broken the GPU's context
                    raise _finding(kind, str(reply["failed"]), stage)
                else:
                    return dict(reply["done"])
        except TimeoutError as e:
            self.close()
            if time.monotonic() >= self.nursery.deadline:
                raise OutOfTime from e
            reason = f"did not finish {_doing(stage)} in {limits.get(stage.split()[0], _ANY_S):.0f} s"
            raise _finding("timeout", reason, stage) from e
        except EOFError as e:
            how = self._death()
            if time.monotonic() >= self.nursery.deadline:  # it was stopped
                raise OutOfTime from e
            raise _finding("crash", f"{how} while {_doing(stage)}", stage) from e

    def close(self) -> None:
        """End the process and what it started, whatever they are doing."""
        self._end()

    def _end(self) -> int:
        """The exit status of a process that is gone now."""
        pid, self._pid, status = self._pid, 0, 0
        for end in (self._requests, self._replies):
            if end >= 0:
                os.close(end)
        self._requests, self._replies, self._held = -1, -1, b""
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # its group: compilers too
            status = self.nursery.status(pid)
        if self._errors is not None:
            self._errors.close()
            self._errors = None
        return status

    def _start(self) -> None:
        if self._pid:
            return
        theirs_in, self._requests = os.pipe()
        self._replies, theirs_out = os.pipe()
        self._errors = tempfile.TemporaryFile()
        try:
            self._pid = self.nursery.spawn((theirs_in, theirs_out, self._errors.fileno()))
        except BaseException:
            self._end()
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._send({"threads": self.threads})

    def _send(self, document: Mapping[str, Any]) -> None:
        try:
            os.write(self._requests, json.dumps(document).encode() + b"\n")
        except BrokenPipeError as e:
            raise EOFError from e

    def _receive(self, seconds: float) -> dict[str, Any]:
        """One line of the worker; TimeoutError when there is none in time, EOFError when it is gone."""
        end = min(time.monotonic() + seconds, self.nursery.deadline)
        while b"\n" not in self._held:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(self._replies, 1 << 16)
            if not chunk:
                raise EOFError
            self._held += chunk
        line, self._held = self._held.split(b"\n", 1)
        return dict(json.loads(line))

    def _death(self) -> str:
        """How the process ended, with its last words; and no process any more."""
        words = ""
        if self._errors is not None:
            self._errors.seek(0)
            words = " ".join(self._errors.read().decode(errors="replace").split())[-_LAST_WORDS:]
        status = self._end()
        how = f"died of {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        return f"{how} ({words})" if words else how


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kind(stage: str, code: str) -> FailureKind:
    return "wrong" if code == "LB0408" else "build" if stage == "build" else "launch"


def _finding(kind: FailureKind, reason: str, stage: str) -> Exception:
    return Refused(kind, reason, stage) if stage.split()[0] in ("build", "run") else Trouble(reason)


def _doing(stage: str) -> str:
    doing = {"start": "starting", "build": "compiling", "prepare": "preparing data", "run": "running"}
    return doing.get(stage.split()[0], stage)
