"""The text of kernels' headers, in `text/`, without what a kernel does not use.

Lines `#if LB_NAME` are decided here and lines `#include "name"` are replaced by that header, not by the compiler: a
kernel's text is what measurements and caches know it by, and so does not change with what other kernels have.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

__all__ = ["header"]

_OWN = "#if LB_"


@cache
def _stored(name: str) -> str:
    return (Path(__file__).parent / "text" / name).read_text()


def header(name: str, chosen: Mapping[str, bool], given: Mapping[str, str] | None = None) -> str:
    """The header `name`, with its parts under `#if LB_NAME` where `chosen` has LB_NAME as true. given: texts of headers
    that are no files, by name."""
    kept: list[str] = []
    live: list[bool | None] = []  # of conditions around a line; None: of the compiler's own
    for line in ((given or {}).get(name) or _stored(f"{name}.cuh")).splitlines():
        ours = False
        if line.startswith("#if"):
            live.append(chosen.get(line.split()[1], False) if line.startswith(_OWN) else None)
            ours = live[-1] is not None
        elif line.startswith(("#else", "#endif")):
            state = live.pop()
            ours = state is not None
            if line.startswith("#else"):
                live.append(not state if ours else None)
        if ours or False in live:
            continue
        if line.startswith('#include "'):
            kept += header(line.split('"')[1].removesuffix(".cuh"), chosen, given).splitlines()
        else:
            kept.append(line)
    return "\n".join(kept) + "\n"
