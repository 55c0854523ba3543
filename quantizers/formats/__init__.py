"""Number formats: how one tensor's numbers are stored.

`parse_format` reads the text form; `ELEMENTS` is the list a new family of elements is added to, and everything else
(kernels, tests, `quantize formats`) iterates over `catalog()`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats.activation import ActivationFormat, parse_activation
from lowbit.quantizers.formats.base import (
    K_ALIGN,
    MOST_TERMS,
    SCALE_DTYPES,
    WIDE_DTYPES,
    Element,
    Format,
    Granularity,
    WeightFormat,
)
from lowbit.quantizers.formats.choice import ChoiceFormat
from lowbit.quantizers.formats.integer import IntElement
from lowbit.quantizers.formats.levels import IQ4_NL, NORMAL_FLOAT4, LevelElement
from lowbit.quantizers.formats.minifloat import FLOAT_NAMES, FloatElement
from lowbit.quantizers.formats.scaled import IntegerLevels
from lowbit.quantizers.formats.trellis import TrellisElement
from lowbit.quantizers.formats.vector import Outliers, VectorFormat

__all__ = [
    "ALIASES",
    "ELEMENTS",
    "K_ALIGN",
    "SCALE_DTYPES",
    "WIDE_DTYPES",
    "ActivationFormat",
    "ChoiceFormat",
    "Element",
    "ElementFamily",
    "FloatElement",
    "Format",
    "Granularity",
    "IntElement",
    "IntegerLevels",
    "LevelElement",
    "Outliers",
    "TrellisElement",
    "VectorFormat",
    "WeightFormat",
    "catalog",
    "exact_integers",
    "parse_activation",
    "parse_format",
    "register_element",
    "scalar_format",
    "sixteen_bit_products",
    "sum_catalog",
    "trellis_catalog",
    "vector_catalog",
]


@dataclass(frozen=True)
class ElementFamily:
    """Elements that are read by one parser: (name, symmetric) -> element, or None for names it does not know.

    names, symmetries: what `catalog` lists.
    """

    parse: Callable[[str, bool], Element | None]
    names: tuple[str, ...]
    symmetries: tuple[str, ...] = ("sym",)


ELEMENTS: list[ElementFamily] = [
    ElementFamily(IntElement.parse, tuple(f"int{bits}" for bits in range(1, 9)), ("sym", "asym", "fz")),
    ElementFamily(FloatElement.parse, FLOAT_NAMES),
    ElementFamily(TrellisElement.parse, ()),
]
"""One entry per family of elements; the first that knows a name wins. See also `register_element`."""

ALIASES = {
    "mxfp4": "e2m1.g32.e8m0",
    "mxfp6_e2m3": "e2m3.g32.e8m0",
    "mxfp6_e3m2": "e3m2.g32.e8m0",
    "mxfp8_e4m3": "e4m3.g32.e8m0",
    "mxfp8_e5m2": "e5m2.g32.e8m0",
    "nvfp4": "e2m1.g16.e4m3.t32",
}
"""Well-known names -> the format they stand for."""


def register_element(element: Element) -> None:
    """Add one element for this process. For other processes too (compilers, `quantize`), let an installed package name
    the module that calls this as an entry point of the group `lowbit.formats`."""

    def parse(name: str, symmetric: bool) -> Element | None:
        return element if name == element.name and symmetric == element.symmetric else None

    ELEMENTS.append(ElementFamily(parse, (element.name,), ("sym" if element.symmetric else "asym",)))


register_element(LevelElement("nf4", NORMAL_FLOAT4))
register_element(LevelElement("iq4nl", IQ4_NL))


@cache
def _load_installed() -> None:
    """Import what other packages add, once."""
    for entry in entry_points(group="lowbit.formats"):
        entry.load()


@cache
def parse_format(text: str) -> WeightFormat:
    """The format written as `text`; raises FormatError (LB0210) saying what a format looks like.

    >>> str(parse_format("int4.g128.asym")), str(parse_format("vq.d8.k256.r256"))
    ('int4.g128.asym', 'vq.d8.k256.r256')
    """
    text = text.strip()
    if "|" in text:
        return ChoiceFormat(tuple(scalar_format(part) for part in text.split("|")))
    return VectorFormat.parse(text) or _scalar(ALIASES.get(text, text))


def scalar_format(text: str) -> Format:
    """`parse_format` for text that must name a format with one code per weight; raises FormatError (LB0210)."""
    fmt = parse_format(text)
    if not isinstance(fmt, Format):
        raise _unknown(text, "a format with one code per weight is needed here")
    return fmt


def _scalar(text: str) -> Format:
    head, *rest = text.split(".")
    granularity, symmetry, scale, tensor, ordered, terms = Granularity("ch"), "sym", "f16", False, False, 1
    if binary := re.fullmatch(r"bcq([2-9])", head):
        head, terms = "int1", int(binary[1])
    for part in rest:
        if m := re.fullmatch(r"g(\d{1,9})", part):
            granularity = Granularity("g", int(m[1]))
        elif part in ("t", "ch"):
            granularity = Granularity(part)  # type: ignore[arg-type]
        elif part in ("sym", "asym", "fz") and not binary:
            symmetry = part
        elif part in SCALE_DTYPES:
            scale = part
        elif part == "t32":
            tensor = True
        elif part == "perm":
            ordered = True
        else:
            raise _unknown(text, f"{part!r} is neither a granularity, a symmetry nor a scale type")
    element = _element(head, symmetry != "asym")
    if element is None:
        raise _unknown(text, f"no element is called {head!r}" + (", with zero points" if symmetry == "asym" else ""))
    return Format(element, granularity, scale, symmetry == "fz", tensor, ordered, terms)


def _element(name: str, symmetric: bool) -> Element | None:
    found = next((e for family in ELEMENTS if (e := family.parse(name, symmetric))), None)
    if found is None:
        _load_installed()
        found = next((e for family in ELEMENTS if (e := family.parse(name, symmetric))), None)
    return found


def _unknown(text: str, why: str) -> FormatError:
    return FormatError(
        "LB0210",
        f"cannot read format {text!r}: {why}",
        hint="write element.granularity.symmetry, such as int4.g128.asym, int8.ch.sym, e3m2.ch or int3.g64.asym.f32; "
        "`quantize formats` lists them",
    )


def exact_integers(fmt: WeightFormat) -> IntegerLevels | None:
    """The integers whose products give those of `fmt` exactly, scales aside; None where only floats do."""
    if isinstance(fmt, VectorFormat):
        return fmt.integer_levels
    if not isinstance(fmt, Format) or (fmt.zero and not fmt.element.integer):
        return None
    return fmt.element.integer_levels


def sixteen_bit_products(fmt: WeightFormat) -> bool:
    """Whether CPU kernels form products in 16 bits (KernelSpec's `int16`): exact integers times two digits, or sums of
    products with centroids, rounded once."""
    return exact_integers(fmt) is not None or (isinstance(fmt, VectorFormat) and fmt.table_sums)


def catalog() -> Iterator[Format]:
    """One scalar format of every element and symmetry, per channel: what tests and tables iterate over."""
    _load_installed()
    for family in ELEMENTS:
        for name in family.names:
            for symmetry in family.symmetries:
                yield scalar_format(f"{name}.ch.{symmetry}")


def sum_catalog() -> Iterator[Format]:
    """Binary coding of every number of signs: what tables show."""
    for terms in range(2, MOST_TERMS + 1):
        yield scalar_format(f"bcq{terms}.g64")


def trellis_catalog() -> Iterator[Format]:
    """Trellis coding of every number of bits: what tables show."""
    for bits in range(1, 5):
        yield scalar_format(f"tcq{bits}.g64")


def vector_catalog() -> Iterator[VectorFormat]:
    """Vector formats from about one to four bits: what tables show."""
    for text in (
        "d8.k256",
        "d4.k256",
        "d8.k256.r256",
        "d8.k65536",
        "d4.k256.r16",
        "d2.k64",
        "d4.k4096",
        "d2.k256",
        "d8.k4096.s8",
        "d8.k256.r256.in.rn",
        "d8.k65536.in.rn",
    ):
        fmt = parse_format(f"vq.{text}")
        assert isinstance(fmt, VectorFormat)
        yield fmt
