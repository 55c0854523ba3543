"""Number formats: how one tensor's numbers are stored.

`parse_format` reads the text form; `ELEMENTS` is the list a new family of elements is added to, and everything else
(kernels, tests, `quantize formats`) iterates over `catalog()`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats.base import K_ALIGN, SCALE_DTYPES, Element, Format, Granularity
from lowbit.quantizers.formats.integer import IntElement

__all__ = [
    "ELEMENTS",
    "K_ALIGN",
    "SCALE_DTYPES",
    "Element",
    "Format",
    "Granularity",
    "IntElement",
    "catalog",
    "parse_format",
]

ELEMENTS: tuple[Callable[[str, bool], Element | None], ...] = (IntElement.parse,)
"""Parsers of element names; the first that knows a name wins. One entry per format family."""

_NAMES = tuple(f"int{bits}" for bits in range(1, 9))


@cache
def parse_format(text: str) -> Format:
    """The format written as `text`; raises FormatError (LB0210) saying what a format looks like.

    >>> str(parse_format("int4.g128.asym"))
    'int4.g128.asym'
    """
    head, *rest = text.strip().split(".")
    granularity, symmetric, scale = Granularity("ch"), True, "f16"
    for part in rest:
        if m := re.fullmatch(r"g(\d{1,9})", part):
            granularity = Granularity("g", int(m[1]))
        elif part in ("t", "ch"):
            granularity = Granularity(part)  # type: ignore[arg-type]
        elif part in ("sym", "asym"):
            symmetric = part == "sym"
        elif part in SCALE_DTYPES:
            scale = part
        else:
            raise _unknown(text, f"{part!r} is neither a granularity, a symmetry nor a scale type")
    for parse in ELEMENTS:
        if element := parse(head, symmetric):
            return Format(element, granularity, scale)
    raise _unknown(text, f"no element is called {head!r}")


def _unknown(text: str, why: str) -> FormatError:
    return FormatError(
        "LB0210",
        f"cannot read format {text!r}: {why}",
        hint="write element.granularity.symmetry, such as int4.g128.asym, int8.ch.sym or int3.g64.asym.f32; "
        "`quantize formats` lists them",
    )


def catalog() -> Iterator[Format]:
    """One format of every element and symmetry, per channel: what tests and tables iterate over."""
    for name in _NAMES:
        for symmetry in ("sym", "asym"):
            yield parse_format(f"{name}.ch.{symmetry}")
