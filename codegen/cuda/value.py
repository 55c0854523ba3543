"""Reading a decode program: what number stands for a code, in a form that tells how tensor cores can get it.

The program (`Element.decode`) is run with a table whose values are symbols. Three shapes come out: an *integer*, the
code itself; a *half*, a float16 whose fields are bits of the code; a *table*. Each with a factor and an addend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from lowbit.compiler.ir.program import Program

__all__ = ["Move", "Number", "read_moves", "read_value"]

Move: TypeAlias = tuple[int, int]
"""(mask of code bits, how far they are shifted to the left; to the right when negative)."""


class _Unreadable(Exception):
    """The program does something that has no symbol."""


@dataclass(frozen=True)
class _Bits:
    """An integer made of shifted parts of the code."""

    moves: tuple[Move, ...]


@dataclass(frozen=True)
class _Constant:
    value: float


@dataclass(frozen=True)
class Number:
    """value = n * factor + addend, where n is the code (`integer`), the float16 with the bits `moves` makes of the code
    (`half`), or `table[code]`."""

    kind: Literal["integer", "half", "table"]
    moves: tuple[Move, ...] = ()
    table: tuple[float, ...] = ()
    factor: float = 1.0
    addend: float = 0.0


_Symbol: TypeAlias = _Bits | _Constant | Number


def read_value(program: Program, bits: int) -> Number | None:
    """The number that `program` (argument `code`, of `bits` bits) computes, or None when it has none of the shapes."""
    try:
        code: _Symbol = _Bits(((2**bits - 1, 0),))
        found = program.run(_TABLE, {"code": code})
    except (_Unreadable, KeyError):
        return None
    return found if isinstance(found, Number) else None


def read_moves(program: Program, bits: int) -> tuple[Move, ...] | None:
    """Where the program puts the bits of its argument `code`, or None when it does more than move them."""
    try:
        code: _Symbol = _Bits(((2**bits - 1, 0),))
        return _bits(program.run(_TABLE, {"code": code}))
    except (_Unreadable, KeyError):
        return None


def _bits(x: _Symbol) -> tuple[Move, ...]:
    if not isinstance(x, _Bits):
        raise _Unreadable
    return x.moves


def _int(x: _Symbol) -> int:
    if not isinstance(x, _Constant):
        raise _Unreadable
    return int(x.value)


def _float(x: _Symbol) -> float:
    if not isinstance(x, _Constant):
        raise _Unreadable
    return x.value


def _number(x: _Symbol) -> Number:
    if not isinstance(x, Number):
        raise _Unreadable
    return x


def _shift(x: _Symbol, by: int) -> _Bits:
    """Bits shifted out below the lowest are gone; a code's are never shifted out above 32."""
    return _Bits(tuple((mask & ~(2 ** max(-(up + by), 0) - 1), up + by) for mask, up in _bits(x)))


def _and(x: _Symbol, y: _Symbol) -> _Bits:
    keep = _int(y)
    return _Bits(tuple((mask & (keep >> up if up >= 0 else keep << -up), up) for mask, up in _bits(x)))


def _int_to_float(x: _Symbol) -> Number:
    if len(moves := _bits(x)) != 1 or moves[0][1] != 0:
        raise _Unreadable
    return Number("integer", moves)


def _add(x: _Symbol, y: _Symbol) -> Number:
    n = _number(x)
    return replace(n, addend=n.addend + _float(y))


def _mul(x: _Symbol, y: _Symbol) -> Number:
    n, by = _number(x), _float(y)
    return replace(n, factor=n.factor * by, addend=n.addend * by)


def _fma(x: _Symbol, y: _Symbol, z: _Symbol) -> Number:
    # x * 0 only turns codes for NaN into NaN, and no weight has one.
    return _number(z) if _float(y) == 0.0 else _add(_mul(x, y), z)


_TABLE: dict[str, Callable[..., _Symbol]] = {
    "const": _Constant,
    "int": _Constant,
    "shr": lambda x, by: _shift(x, -_int(by)),
    "shl": lambda x, by: _shift(x, _int(by)),
    "and": _and,
    "or": lambda x, y: _Bits(_bits(x) + _bits(y)),
    "half": lambda x: Number("half", _bits(x)),
    "int_to_float": _int_to_float,
    "lut": lambda x, table: Number("table", _bits(x), table),
    "add": _add,
    "mul": _mul,
    "fma": _fma,
}
