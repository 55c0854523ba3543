"""Fences. Everything here happens in one order, so that they have nothing to do but one thing: bytes that threads wrote
are seen by the copy engine and the matrix units only after `fence.proxy.async`."""

from __future__ import annotations

from _ptx.build import Builder, Op, operation
from _ptx.parse import Instruction

__all__: list[str] = []


@operation("fence")
def _fence(b: Builder, i: Instruction) -> Op:
    if i.has("proxy") and any(p.startswith("async") for p in i.parts):
        return lambda c, lanes: c.fenced(lanes)
    return lambda c, lanes: None
