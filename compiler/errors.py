"""Errors a user can act on.

Every error lowbit raises on purpose is a `LowbitError` with a stable code, what went wrong, where, and what to do.
Codes are grouped by hundreds: 1xx input files, 2xx schemes and formats, 3xx the IR, 4xx kernels, 5xx quantization runs.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "FormatError",
    "IRError",
    "KernelError",
    "LowbitError",
    "RunError",
]


class LowbitError(Exception):
    """A refusal: what, where, why, and what to do.

    `code` is stable across versions (`LB0101`). `where` names the file, module path or op. `hint` is one sentence
    that starts with a verb.
    """

    def __init__(self, code: str, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.code = code
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(self.render())

    def render(self) -> str:
        """The error as one line: `LB0101 where: message (hint)`, however many the libraries quoted in it wrote."""
        place = f"{self.where}: " if self.where else ""
        advice = f" ({self.hint})" if self.hint else ""
        lines = f"{self.code} {place}{self.message}{advice}".splitlines()
        return " ".join(line.strip() for line in lines if line.strip())


class CheckpointError(LowbitError):
    """A model, text or checkpoint file that cannot be read or written (LB01xx)."""


class FormatError(LowbitError):
    """A format, scheme or layout that does not exist or does not fit the tensor (LB02xx)."""


class IRError(LowbitError):
    """IR text or a module that is not valid (LB03xx)."""


class KernelError(LowbitError):
    """A kernel that cannot be generated, compiled, loaded or launched (LB04xx)."""


class RunError(LowbitError):
    """A quantization run that cannot start, continue or finish (LB05xx)."""
