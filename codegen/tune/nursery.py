"""A process that has imported torch and nothing else, and forks workers: starting one again costs milliseconds.

It uses no threads and no GPU of its own, so that what it forks may. `Nursery` is the parent's end; requests are one
line of JSON each, and a new worker's three files (requests, replies, last words) travel beside the line.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import lowbit
from lowbit.compiler.errors import KernelError

__all__ = ["Nursery", "OutOfTime", "serve"]

_START_S = 180.0  # importing torch on a busy machine
_PR_SET_PDEATHSIG = 1


class OutOfTime(Exception):
    """The budget of the whole run is used up: no finding about a candidate."""


class Nursery:
    """Started with the first worker. deadline: `time.monotonic()` when everything has to be over."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._errors: IO[bytes] | None = None
        self._lock = threading.Lock()

    def spawn(self, files: tuple[int, int, int]) -> int:
        """Process id of a new worker, the leader of a process group of its own. Raises OutOfTime, and KernelError
        (LB0474) when no process can be started."""
        return int(self._ask({"fork": True}, files)["pid"])

    def status(self, pid: int) -> int:
        """The exit status of a worker that ended or was killed, negative for a signal, as `subprocess` has it."""
        try:
            return int(self._ask({"wait": pid}, ())["status"])
        except (OutOfTime, KernelError):  # the nursery was closed, and its workers with it
            return -signal.SIGKILL

    def close(self) -> None:
        """End it and, with it, every worker."""
        self.deadline = 0.0
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _ask(self, request: dict[str, Any], files: tuple[int, ...]) -> dict[str, Any]:
        with self._lock:
            line = self._started()
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise OutOfTime
            line.settimeout(min(left, _START_S))
            try:
                socket.send_fds(line, [json.dumps(request).encode()], list(files))
                reply = line.recv(4096)
            except OSError as e:
                if time.monotonic() >= self.deadline:
                    raise OutOfTime from e
                raise KernelError("LB0474", f"no process can be started to measure in: {e} {self._words()}") from e
            if not reply:
                if time.monotonic() >= self.deadline:
                    raise OutOfTime
                raise KernelError("LB0474", f"no process can be started to measure in: {self._words()}")
            return dict(json.loads(reply))

    def _words(self) -> str:
        """The nursery's last ones."""
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return " ".join(self._errors.read().decode(errors="replace").split())[-300:]

    def _started(self) -> socket.socket:
        if self._line is None:
            if time.monotonic() >= self.deadline:
                raise OutOfTime
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())]
            self._errors = tempfile.TemporaryFile()
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    pass_fds=(theirs.fileno(),),
                    env={**os.environ, "PYTHONPATH": _path()},
                    start_new_session=True,
                )
            except OSError as e:
                raise KernelError("LB0474", f"no process can be started to measure in: {e}") from e
            finally:
                theirs.close()
            self._line = ours
        return self._line


_PROGRAM = """
import sys
from lowbit.codegen.tune.nursery import serve
from lowbit.codegen.tune.worker import work
serve(int(sys.argv[1]), work)
"""


def _path() -> str:
    """Where workers find what this process could import."""
    own = str(Path(lowbit.__file__).resolve().parents[1])
    return os.pathsep.join(dict.fromkeys([own, *(p for p in sys.path if p)]))


def serve(line: int, work: Callable[[int, int], None]) -> None:
    """In the nursery: fork and reap on request until the parent is gone. work: what a worker does with its pipes."""
    warnings.simplefilter("ignore")  # about forking beside threads of libraries, which sleep
    with socket.socket(fileno=line) as requests:
        while True:
            message, files, _, _ = socket.recv_fds(requests, 4096, 3)
            if not message:
                return
            request = json.loads(message)
            if "wait" in request:
                _, status = os.waitpid(request["wait"], 0)
                requests.send(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())
                continue
            if (pid := os.fork()) == 0:
                requests.close()
                _become_worker(files, work)
            with contextlib.suppress(OSError):  # whichever of the two is first: it must be one before anybody kills it
                os.setpgid(pid, pid)
            for file in files:
                os.close(file)
            requests.send(json.dumps({"pid": pid}).encode())


def _become_worker(files: list[int], work: Callable[[int, int], None]) -> None:
    status = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        _die_with_nursery()
        os.dup2(files[2], 1)
        os.dup2(files[2], 2)
        work(files[0], files[1])
        status = 0
    finally:
        os._exit(status)


def _die_with_nursery() -> None:
    """Whatever a worker is doing, it ends with the nursery, and that when its line to the parent breaks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
