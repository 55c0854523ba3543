"""Decode programs: small straight-line programs over bits, built once per format and run by every backend.

A `Program` is a region of `lbk` operations with named arguments and one result. `run` walks it with a table that
says what each operation means: torch functions give the reference, string templates give C++ or Triton source.

    with program("code") as p:
        p.result(p.int_to_float(p.arg("code")))
    p.done().run(TORCH, {"code": codes})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from xdsl.dialects.builtin import ArrayAttr, FloatAttr, IntAttr, StringAttr, f32, i32
from xdsl.ir import Block, Region, SSAValue

from lowbit.compiler.ir import kernel as lbk

__all__ = ["Program", "ProgramBuilder", "program"]

T = TypeVar("T")
FLOAT_ARGS = ("scale", "zero", "offset", "value")


@dataclass(frozen=True)
class Program:
    """A finished program. `region` is owned by the program; clone it before attaching it to an operation."""

    region: Region

    @property
    def args(self) -> tuple[str, ...]:
        """Argument names, in order."""
        return tuple(op.label.data for op in self.region.block.ops if isinstance(op, lbk.ArgName))

    def clone(self) -> Region:
        """A copy of the region, to put into a `lbk.kernel`."""
        return self.region.clone()

    def run(self, table: Mapping[str, Callable[..., T]], args: Mapping[str, T]) -> T:
        """Evaluate with `table[op name](*operands)`; constants call `table[name](python value)`.

        Raises KeyError naming the operation when the table lacks one the program uses.
        """
        values: dict[SSAValue, T] = {}
        for op in self.region.block.ops:
            if isinstance(op, lbk.ArgName):
                values[op.value] = args[op.label.data]
            elif isinstance(op, lbk.Yield):
                return values[op.values[0]]
            else:
                values[op.results[0]] = _apply(op, table, [values[o] for o in op.operands])
        raise AssertionError("a program ends in lbk.yield")


def _apply(op: Any, table: Mapping[str, Callable[..., T]], operands: list[T]) -> T:
    function = table[op.name.removeprefix("lbk.")]
    if isinstance(op, lbk.Const):
        return function(op.value.value.data)
    if isinstance(op, lbk.IntConst):
        return function(op.value.data)
    if isinstance(op, lbk.Lut):
        return function(*operands, tuple(entry.value.data for entry in op.table))
    if isinstance(op, lbk.Gather):
        return function(*operands, op.book.data)
    return function(*operands)


class ProgramBuilder:
    """Builds a Program operation by operation; see `program`."""

    def __init__(self, *args: str) -> None:
        types = [f32 if name in FLOAT_ARGS else i32 for name in args]
        self._block = Block(arg_types=types)
        self._names = dict(zip(args, self._block.args, strict=True))
        for name, value in self._names.items():
            self._block.add_op(lbk.ArgName(value, name))

    def __enter__(self) -> ProgramBuilder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        return None

    def _emit(self, op: Any) -> SSAValue:
        self._block.add_op(op)
        return op.results[0]  # type: ignore[no-any-return]

    def arg(self, name: str) -> SSAValue:
        """The argument called `name`."""
        return self._names[name]

    def const(self, value: float) -> SSAValue:
        """A float constant."""
        return self._emit(lbk.Const(attributes={"value": FloatAttr(value, f32)}))

    def int(self, value: int) -> SSAValue:
        """An integer constant."""
        return self._emit(lbk.IntConst(attributes={"value": IntAttr(value)}))

    def shr(self, x: SSAValue, by: SSAValue) -> SSAValue:
        """Logical shift right."""
        return self._emit(lbk.Shr(x, by))

    def shl(self, x: SSAValue, by: SSAValue) -> SSAValue:
        """Shift left."""
        return self._emit(lbk.Shl(x, by))

    def and_(self, x: SSAValue, y: SSAValue) -> SSAValue:
        """Bitwise and."""
        return self._emit(lbk.And(x, y))

    def or_(self, x: SSAValue, y: SSAValue) -> SSAValue:
        """Bitwise or."""
        return self._emit(lbk.Or(x, y))

    def multiply(self, x: SSAValue, y: SSAValue) -> SSAValue:
        """Integers: the lowest 32 bits of x * y."""
        return self._emit(lbk.Multiply(x, y))

    def plus(self, x: SSAValue, y: SSAValue) -> SSAValue:
        """Integers: the lowest 32 bits of x + y."""
        return self._emit(lbk.Plus(x, y))

    def bitcast(self, x: SSAValue) -> SSAValue:
        """float32 with the bits of `x`."""
        return self._emit(lbk.Bitcast(x))

    def half(self, x: SSAValue) -> SSAValue:
        """The float16 with the bits of `x`, as float32."""
        return self._emit(lbk.Half(x))

    def int_to_float(self, x: SSAValue) -> SSAValue:
        """Integer to float32."""
        return self._emit(lbk.IntToFloat(x))

    def lut(self, x: SSAValue, table: tuple[float, ...]) -> SSAValue:
        """`table[x]`."""
        return self._emit(lbk.Lut(x, attributes={"table": ArrayAttr(FloatAttr(v, f32) for v in table)}))

    def gather(self, index: SSAValue, lane: SSAValue, book: str) -> SSAValue:
        """Element `lane` of centroid `index` in the operand `book`."""
        return self._emit(lbk.Gather(index, lane, attributes={"book": StringAttr(book)}))

    def add(self, x: SSAValue, y: SSAValue) -> SSAValue:
        """x + y."""
        return self._emit(lbk.AddFloat(x, y))

    def sub(self, x: SSAValue, y: SSAValue) -> SSAValue:
        """x - y."""
        return self._emit(lbk.SubFloat(x, y))

    def mul(self, x: SSAValue, y: SSAValue) -> SSAValue:
        """x * y."""
        return self._emit(lbk.Mul(x, y))

    def fma(self, x: SSAValue, y: SSAValue, z: SSAValue) -> SSAValue:
        """x * y + z."""
        return self._emit(lbk.Fma(x, y, z))

    def inline(self, other: Program, args: Mapping[str, SSAValue]) -> SSAValue:
        """Append the operations of `other` with its arguments bound to `args`; returns its result."""
        mapper: dict[SSAValue, SSAValue] = {}
        for op in other.region.block.ops:
            if isinstance(op, lbk.ArgName):
                mapper[op.value] = args[op.label.data]
            elif isinstance(op, lbk.Yield):
                return mapper[op.values[0]]
            else:
                copy = op.clone(value_mapper=mapper)
                self._emit(copy)
        raise AssertionError("a program ends in lbk.yield")

    def result(self, value: SSAValue) -> None:
        """Set the program's result."""
        self._block.add_op(lbk.Yield(value))

    def done(self) -> Program:
        """The finished, verified program."""
        region = Region(self._block)
        for op in region.block.ops:
            op.verify()
        return Program(region)


def program(*args: str) -> ProgramBuilder:
    """Start a program with named arguments; `scale`, `zero`, `offset` and `value` are floats, all others integers."""
    return ProgramBuilder(*args)
