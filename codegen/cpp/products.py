"""How one 32-column block of packed weights meets the activations: as integers or as floats.

Both forms split a block into steps. A step gives one weight vector (an expression printed from the format's own
decode program) and the place of the activations it is multiplied with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from lowbit.codegen.cpp.expr import Node, Printer, build, name, number
from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.decode import decode_program, extract_program

__all__ = ["CentroidProducts", "FloatProducts", "IntProducts", "Products", "products"]


class Products(ABC):
    """`vector`, `load`, `store`: the C++ type of a weight vector and its primitives; `item` its activations' type."""

    vector: str
    load: str
    store: str
    item: str
    steps: int
    printer: Printer

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def loads(self) -> Iterator[str]:
        """Statements that load one block: `w<plane>_<vector>` from the pointers `w<plane>`."""
        for i, width in enumerate(self.plan.planes):
            for v in range(width):
                yield f"const V w{i}_{v} = vload(w{i} + {64 * v});"

    @abstractmethod
    def weight(self, step: int) -> str:
        """The weight vector of a step, over the names of `loads` (and `scale`, `zero` for floats)."""

    @abstractmethod
    def activation(self, pointer: str, offset: str) -> str:
        """The activations at `pointer[offset]`, in every lane."""

    @abstractmethod
    def multiply(self, acc: str, w: str, x: str) -> str:
        """acc + w * x."""

    @abstractmethod
    def offset(self, step: int) -> int:
        """Columns from the start of a block to the step's first activation."""

    def _args(self, quad: int, shift: int) -> dict[str, Node]:
        """Arguments of the extract program for columns 4 * quad to 4 * quad + 3: words and constant shifts."""
        args = {}
        for i, width in enumerate(self.plan.planes):
            vector, slot = divmod(quad, 8 // width)
            args[f"w{i}"], args[f"s{i}"] = name(f"w{i}_{vector}"), number(slot * width + shift)
        return args


class IntProducts(Products):
    """Byte dot products: a step is 4 columns, 16 rows x 4 codes against 4 activation digits."""

    vector, load, store, item, steps = "V", "vload", "vstore", "int8_t", 8

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.printer = Printer("bytes")

    def weight(self, step: int) -> str:
        return self.printer.text(build(extract_program(self.plan.spec.fmt.bits), self._args(step, 0)))

    def activation(self, pointer: str, offset: str) -> str:
        return f"bcast4({pointer} + {offset})"

    def multiply(self, acc: str, w: str, x: str) -> str:
        return f"dot({acc}, {w}, {x})"

    def offset(self, step: int) -> int:
        return 4 * step


class FloatProducts(Products):
    """Fused multiply-adds: a step is 1 column, 16 dequantized rows against one activation."""

    vector, load, store, item, steps = "F", "fload", "fstore", "float", 32

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.printer = Printer("words")

    def weight(self, step: int) -> str:
        fmt = self.plan.spec.fmt
        args = self._args(step // 4, step % 4 * 8) | {side: name(side) for side in ("scale", "zero", "offset")}
        return self.printer.text(build(decode_program(fmt), args))

    def activation(self, pointer: str, offset: str) -> str:
        return f"fset1({pointer}[{offset}])"

    def multiply(self, acc: str, w: str, x: str) -> str:
        return f"fma_({w}, {x}, {acc})"

    def offset(self, step: int) -> int:
        return step


class CentroidProducts(FloatProducts):
    """Products with rows that are decoded before: what is left of `FloatProducts` without a scalar format."""

    def __init__(self) -> None:
        self.printer = Printer("words")


def products(plan: Plan) -> Products:
    """The products of a plan's spec."""
    return IntProducts(plan) if plan.integer else FloatProducts(plan)
