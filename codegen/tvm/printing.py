"""Decode programs printed as TVM script, on vectors of 16 rows.

TVM's script has no literals of vectors, so a constant stays a number until it meets a vector and is broadcast then.
Nothing here knows a format: an operation means what `compiler.ir.kernel` says it means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.kernel import Lut
from lowbit.compiler.ir.program import Program

__all__ = ["LANES", "Expr", "Printer", "float_text", "spread", "tables_of", "wide"]

LANES = 16
"""Numbers of a vector: the rows of a panel."""


@dataclass(frozen=True)
class Expr:
    """An expression as text, or a constant: `value` is its number, and `text` empty."""

    text: str = ""
    value: int | float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return self.text
        kind = float_text(self.value) if isinstance(self.value, float) else f"T.uint32({self.value})"
        return spread(kind)


def float_text(value: float) -> str:
    """A float32 constant."""
    return f"T.float32({value!r})" if math.isfinite(value) else f'T.float32("{value}")'


def spread(scalar: str) -> str:
    """A scalar in all places of a vector."""
    return f"T.Broadcast({scalar}, {LANES})"


def wide(kind: str) -> str:
    """The type of vectors of `kind`."""
    return f"{kind}x{LANES}"


def tables_of(program: Program) -> tuple[tuple[float, ...], ...]:
    """The tables that a program looks codes up in, in the order of the printer's `table<n>` buffers."""
    found = (tuple(e.value.data for e in op.table) for op in program.region.block.ops if isinstance(op, Lut))
    return tuple(dict.fromkeys(found))


class Printer:
    """Prints programs as statements `name: T.let[...] = ...` into `lines` and expressions; names are unique.

    tables: those of the programs it prints, read from memory as buffers `table0`, `table1` ...: with 16 entries,
    selecting by the bits of a code takes twice as long. prefix: how names begin, another one for every printer whose
    statements stand in one scope.
    """

    def __init__(self, tables: tuple[tuple[float, ...], ...] = (), prefix: str = "v") -> None:
        self.lines: list[str] = []
        self._tables, self._prefix = tables, prefix
        self._count = 0

    def let(self, text: str, kind: str) -> Expr:
        """A new name for the value of `text`, a vector of `kind`."""
        self._count += 1
        name = f"{self._prefix}{self._count}"
        self.lines.append(f"{name}: T.let[T.{wide(kind)}] = {text}")
        return Expr(name)

    def take(self) -> list[str]:
        """The statements printed since the last call."""
        taken, self.lines = self.lines, []
        return taken

    def run(self, program: Program, args: Mapping[str, Expr]) -> Expr:
        """The program's result; `args` are vectors of uint32 words and float32 side values, or constants. Raises
        KernelError (LB0450) when it uses what has no form here."""
        try:
            return program.run(self._table(), args)
        except KeyError as e:
            raise KernelError("LB0450", f"the decode operation {e} has no TVM form") from e

    def _table(self) -> dict[str, Callable[..., Expr]]:
        return {
            "const": lambda value: Expr(value=float(value)),
            "int": lambda value: Expr(value=int(value)),
            "shr": lambda x, by: _call("shift_right", x, by),
            "shl": lambda x, by: _call("shift_left", x, by),
            "and": lambda x, y: _call("bitwise_and", x, y),
            "or": lambda x, y: _call("bitwise_or", x, y),
            "multiply": lambda x, y: Expr(f"({x} * {y})"),
            "plus": lambda x, y: Expr(f"({x} + {y})"),
            "bitcast": lambda x: Expr(f'T.reinterpret("{wide("float32")}", {x})'),
            "half": _half,
            "int_to_float": _int_to_float,
            "lut": self._lut,
            "add": lambda x, y: Expr(f"({x} + {y})"),
            "sub": lambda x, y: Expr(f"({x} - {y})"),
            "mul": _mul,
            "fma": _fma,
        }

    def _lut(self, index: Expr, table: tuple[float, ...]) -> Expr:
        return Expr(f'table{self._tables.index(table)}[T.Cast("{wide("int32")}", {index})]')


def _call(name: str, x: Expr, y: Expr) -> Expr:
    """An operation of integers; moving by no bits is none."""
    return x if name.startswith("shift") and y.value == 0 else Expr(f"T.{name}({x}, {y})")


def _int_to_float(x: Expr) -> Expr:
    """By way of signed integers, which instruction sets before AVX-512 convert; codes are small."""
    return Expr(f'T.Cast("{wide("float32")}", T.Cast("{wide("int32")}", {x}))')


def _half(x: Expr) -> Expr:
    bits = f'T.reinterpret("{wide("float16")}", T.Cast("{wide("uint16")}", {x}))'
    return Expr(f'T.Cast("{wide("float32")}", {bits})')


def _mul(x: Expr, y: Expr) -> Expr:
    """A factor of 1.0 is none: callers who apply scales to sums pass it."""
    return x if y.value == 1.0 else Expr(f"({x} * {y})")


def _fma(x: Expr, y: Expr, z: Expr) -> Expr:
    return Expr(f"({_mul(x, y)} + {z})")
