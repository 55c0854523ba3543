"""What goes wrong in a kernel, or in reading one."""

from __future__ import annotations

__all__ = ["PtxError"]


class PtxError(Exception):
    """The message says what happened, in which instruction (line and text), and to which thread where one did it."""
