"""Types of the graph dialect: dense tensors are builtin tensors, quantized matrices are `!lb.q`.

!lb.q<576x1536, "int4.g64.sym">            canonical storage
!lb.q<576x1536, "int4.g64.sym", "panel16"> packed for a target family
"""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    BFloat16Type,
    Float16Type,
    IntAttr,
    IntegerType,
    StringAttr,
    TensorType,
    f32,
)
from xdsl.ir import Attribute, ParametrizedAttribute, TypeAttribute
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from lowbit.compiler.ir.layout import LAYOUTS

__all__ = ["DTYPES_OF", "DTYPE_NAMES", "QType", "dims", "tensor"]

DTYPE_NAMES: dict[str, Attribute] = {
    "float32": f32,
    "bfloat16": BFloat16Type(),
    "float16": Float16Type(),
    "int64": IntegerType(64),
    "int32": IntegerType(32),
    "uint8": IntegerType(8),
    "bool": IntegerType(1),
}
"""torch dtype name -> element type."""

DTYPES_OF: dict[Attribute, str] = {f32: "f32", BFloat16Type(): "bf16", Float16Type(): "f16"}
"""Element type of activations -> its name in kernel specs."""


@irdl_attr_definition
class QType(ParametrizedAttribute, TypeAttribute):
    """A quantized [n, k] matrix in a format, and in a packed layout once one is chosen."""

    name = "lb.q"
    n: IntAttr
    k: IntAttr
    fmt: StringAttr
    layout: StringAttr

    @staticmethod
    def get(n: int, k: int, fmt: str, layout: str = "") -> QType:
        """The type of an [n, k] matrix in format `fmt` (text form); `layout` names one of LAYOUTS."""
        return QType(IntAttr(n), IntAttr(k), StringAttr(fmt), StringAttr(layout))

    def verify(self) -> None:
        if self.n.data < 1 or self.k.data < 1:
            raise VerifyException(f"a quantized matrix has positive dimensions, not {self.n.data}x{self.k.data}")
        if self.layout.data and self.layout.data not in LAYOUTS:
            raise VerifyException(f"unknown layout {self.layout.data!r}; known: {', '.join(LAYOUTS)}")

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            n = parser.parse_shape_dimension(allow_dynamic=False)
            parser.parse_shape_delimiter()
            k = parser.parse_shape_dimension(allow_dynamic=False)
            parser.parse_punctuation(",")
            fmt = parser.parse_str_literal()
            layout = parser.parse_str_literal() if parser.parse_optional_punctuation(",") else ""
        return (IntAttr(n), IntAttr(k), StringAttr(fmt), StringAttr(layout))

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_string(f"{self.n.data}x{self.k.data}, ")
            printer.print_string_literal(self.fmt.data)
            if self.layout.data:
                printer.print_string(", ")
                printer.print_string_literal(self.layout.data)


def tensor(shape: Sequence[int | None], element: Attribute) -> TensorType[Attribute]:
    """A builtin tensor type; None is a dynamic dimension (the number of tokens)."""
    return TensorType(element, [DYNAMIC_INDEX if d is None else d for d in shape])


def dims(type_: Attribute) -> tuple[int | None, ...]:
    """Dimensions of a tensor or quantized matrix, None where dynamic."""
    if isinstance(type_, QType):
        return (type_.n.data, type_.k.data)
    if isinstance(type_, TensorType):
        return tuple(None if d == DYNAMIC_INDEX else d for d in type_.get_shape())
    raise TypeError(f"{type_} has no shape")
