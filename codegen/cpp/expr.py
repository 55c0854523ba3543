"""Decode programs printed as C++ vector expressions.

A program is run with a table whose values are small expression nodes; building a node applies the peepholes, and
`text` prints it in the primitives of `text/<isa>.h`. Three readings of the same program:

- *bytes*: a vector holds one code per byte. Masks are repeated in every byte, and a shift of a byte is a shift of the
  32-bit lane: bits that stray in from the neighbouring byte are removed by the mask that always follows.
- *halves*: one code per 16-bit lane, in the same way.
- *words*: a vector holds one code per 32-bit lane, for arithmetic on floats.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.program import Program

__all__ = [
    "Bit",
    "Node",
    "Printer",
    "at_once",
    "build",
    "by_table",
    "half_bits",
    "name",
    "number",
    "shifted",
    "shifts_of",
    "table_text",
]

Reading = Literal["bytes", "halves", "words"]
_REPEATED = {"bytes": 0x01010101, "halves": 0x00010001, "words": 1}
_WIDTH = {"bytes": 8, "halves": 16, "words": 32}
Bit = tuple[str, int]
"""A vector's name, and which bit of each of its bytes."""


@dataclass(frozen=True)
class Node:
    """One operation. `op`: name (text), int or float (constants), shift (by > 0 to the right), mask, or a primitive."""

    op: str
    args: tuple[Node, ...] = ()
    value: str | int | float | tuple[float, ...] | tuple[int, ...] = 0


def name(text: str) -> Node:
    """A C++ expression the program's argument stands for."""
    return Node("name", value=text)


def number(value: int) -> Node:
    """An integer known when the kernel is generated, such as a shift."""
    return Node("int", value=value)


def _int(node: Node) -> int:
    if node.op != "int" or not isinstance(node.value, int):
        raise KernelError("LB0411", f"a shift or mask must be a constant, not {node.op}")
    return node.value


def _shift(x: Node, by: int) -> Node:
    """x moved right by `by` bits (left when negative); no movement prints nothing."""
    return Node("shift", (x,), by) if by else x


def _shr(x: Node, by: Node) -> Node:
    return _shift(x, _int(by))


def _shl(x: Node, by: Node) -> Node:
    """Peephole: ((w >> s) & m) << l is (w >> (s - l)) & (m << l), one shift instead of two."""
    left = _int(by)
    if x.op == "mask":
        inner, moved = x.args[0], 0
        if inner.op == "shift":
            moved, inner = int(inner.value), inner.args[0]  # type: ignore[arg-type]
        return Node("mask", (_shift(inner, moved - left),), int(x.value) << left & 0xFFFFFFFF)  # type: ignore[arg-type]
    if x.op == "and_or":
        (word, by_), rest = _moved(x.args[0]), _shl(x.args[1], by)
        return Node("and_or", (_shift(word, by_ - left), rest), int(x.value) << left & 0xFFFFFFFF)  # type: ignore[arg-type]
    return _shift(x, -left)


def _and(x: Node, y: Node) -> Node:
    """Peephole: two masks are one."""
    if y.op != "int":
        x, y = y, x
    if x.op == "mask":
        return Node("mask", x.args, int(x.value) & _int(y))  # type: ignore[arg-type]
    return Node("mask", (x,), _int(y))


def _or(x: Node, y: Node) -> Node:
    """Peephole: x | (y & m) is one operation where the machine has three-operand logic."""
    if y.op == "mask":
        return Node("and_or", (y.args[0], x), y.value)
    return Node("and_or", (x.args[0], y), x.value) if x.op == "mask" else Node("vor", (x, y))


def by_table(table: tuple[int, ...], index: Node, bits: Sequence[Bit]) -> Node:
    """`table[code]` as bytes: the code's low bits are in `index` (at most four), the others, low first, are `bits`.

    Halves of the table are looked up and the right one is picked, or where they mirror each other only one half is.
    """
    if len(table) <= 16:
        return Node("lookup", (index,), table + (0,) * (16 - len(table)))
    *others, (vector, bit) = bits
    low, high = table[: len(table) // 2], table[len(table) // 2 :]
    half, sums = by_table(low, index, others), {a + b for a, b in zip(low, high, strict=True)}
    if low == high:
        return half
    if len(sums) == 1:
        return Node("reflect", (name(vector), half, number(sums.pop())), bit)
    return Node("pick", (name(vector), half, by_table(high, index, others)), bit)


def at_once(table: tuple[int, ...], code: Node, pieces: Node) -> Node:
    """`table[code]` as bytes where the machine looks up 64 entries with one instruction; elsewhere `pieces`, the same
    by `by_table`. Both are printed, and the headers choose."""
    if not 16 < len(table) <= 64:
        return pieces
    return Node("at_once", (code, pieces), table * (64 // len(table)))


def _primitive(op: str) -> Callable[..., Node]:
    return lambda *args: Node(op, args)


_TABLE: dict[str, Callable[..., Node]] = {
    "const": lambda value: Node("float", value=value),
    "int": number,
    "shr": _shr,
    "shl": _shl,
    "and": _and,
    "or": _or,
    "multiply": _primitive("multiply"),
    "plus": _primitive("vadd"),
    "bitcast": _primitive("bitcast"),
    "half": _primitive("half"),
    "int_to_float": _primitive("cvt"),
    "lut": lambda x, table: Node("lut", (x,), table),
    # One vector holds the elements of a centroid, so the lane is not an argument of its own.
    "gather": lambda index, lane, book: Node("gather", (index,), book),
    "add": _primitive("fadd"),
    "sub": _primitive("fsub"),
    "mul": _primitive("fmul"),
    "fma": _primitive("fma_"),
}


def build(program: Program, args: Mapping[str, Node]) -> Node:
    """The program as one expression; raises KernelError (LB0411) when it uses what vectors cannot do."""
    try:
        return program.run(_TABLE, args)
    except KeyError as e:
        raise KernelError("LB0411", f"the decode operation {e} has no C++ form") from e


def _moved(node: Node) -> tuple[Node, int]:
    """What is shifted, and how far to the right."""
    return (node.args[0], int(node.value)) if node.op == "shift" else (node, 0)  # type: ignore[arg-type]


def half_bits(value: Node) -> tuple[Node, float] | None:
    """The 16 bits behind `value` and the constant they are multiplied with, where it is a float16 times a constant.

    Codes for NaN, which no weight has, may give other numbers: what only turns them into NaN is dropped.
    """
    if value.op == "fma_" and value.args[1] == Node("float", value=0.0):
        return half_bits(value.args[2])
    if value.op == "fmul" and value.args[1].op == "float" and value.args[0].op == "half":
        return value.args[0].args[0], float(value.args[1].value)  # type: ignore[arg-type]
    return (value.args[0], 1.0) if value.op == "half" else None


def shifted(node: Node, by: int) -> Node:
    """node times 2**by; bits that stand there already are not moved."""
    return _shl(node, number(by)) if by else node


def shifts_of(node: Node) -> frozenset[Node]:
    """All shifts that printing the node takes; equal ones are computed once."""
    inner = frozenset[Node]().union(*(shifts_of(a) for a in node.args))
    return inner | {node} if node.op == "shift" else inner


def table_text(declared: str, values: Iterable[object]) -> str:
    """The C++ definition of a constant table, `declared` as its type and name."""
    return f"alignas(64) static const {declared}[] = {{{', '.join(map(str, values))}}};\n"


class Printer:
    """Prints nodes and collects the lookup tables they need (`tables`: C++ definitions)."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self._tables: dict[tuple[float, ...], str] = {}
        self._bytes: dict[tuple[int, ...], str] = {}

    @property
    def tables(self) -> str:
        """Definitions of the tables printed so far."""
        floats = {label: ("float", map(_float, values)) for values, label in self._tables.items()}
        found = floats | {label: ("uint8_t", map(str, values)) for values, label in self._bytes.items()}
        return "".join(table_text(f"{type_} {label}", values) for label, (type_, values) in found.items())

    def text(self, node: Node) -> str:
        """The node as a C++ expression."""
        args = [self.text(a) for a in node.args]
        if node.op == "name":
            return str(node.value)
        if node.op == "int":
            return f"set1({node.value}u)"
        if node.op == "float":
            return f"fset1({_float(float(node.value))})"  # type: ignore[arg-type]
        if node.op == "shift":
            by = int(node.value)  # type: ignore[arg-type]
            return f"shr<{by}>({args[0]})" if by > 0 else f"shl<{-by}>({args[0]})"
        if node.op == "mask":
            return self._mask(node, args[0])
        if node.op == "and_or" and self.reading == "halves" and (signed := self._signed(node)):
            return signed
        if node.op == "and_or":
            return f"and_or({args[0]}, {self._constant(int(node.value))}, {args[1]})"  # type: ignore[arg-type]
        if node.op == "gather":
            return f"gather_{node.value}({node.value}, {args[0]})"
        if node.op == "lut":
            return self._lut(node, args[0])
        if node.op in ("lookup", "at_once"):
            label = self._bytes.setdefault(node.value, f"kBytes{len(self._bytes)}")  # type: ignore[arg-type]
            return f"{node.op}({args[0]}, {label}{', ' + args[1] if len(args) > 1 else ''})"
        if node.op == "pick":
            return f"pick<{node.value}>({', '.join(args)})"
        if node.op == "reflect":
            top = self._constant(int(node.args[2].value))  # type: ignore[arg-type]
            return f"reflect<{node.value}>({args[0]}, {args[1]}, {top})"
        return f"{node.op}({', '.join(args)})"

    def _mask(self, node: Node, inner: str) -> str:
        """Peephole: a mask that keeps everything the shift left over is dropped."""
        mask, x = int(node.value), node.args[0]  # type: ignore[arg-type]
        words, width = self.reading == "words", _WIDTH[self.reading]
        kept = width - (int(x.value) if words and x.op == "shift" else 0)  # type: ignore[arg-type]
        if mask == 2**kept - 1 and (words or x.op == "name"):
            return inner
        return f"vand({inner}, {self._constant(mask)})"

    def _signed(self, node: Node) -> str | None:
        """Peephole: a sign that stands `by` bits further up than in the code. Shifting it to its place and then all
        down with copies of the sign, which the mask removes, takes one operation less."""
        (body, sign), mask = node.args, int(node.value)  # type: ignore[arg-type]
        if sign.op != "mask" or sign.value != 0x8000:
            return None
        (word, down), (other, up) = _moved(body), _moved(sign.args[0])
        by = down - up
        if word != other or by <= 0 or mask >> (16 - by):
            return None
        return f"vand(sra16<{by}>({self.text(_shift(word, up))}), {self._constant(0x8000 | mask)})"

    def _constant(self, mask: int) -> str:
        return f"set1(0x{mask * _REPEATED[self.reading]:08x}u)"

    def _lut(self, node: Node, index: str) -> str:
        values = node.value
        assert isinstance(values, tuple)
        size = 1 << (len(values) - 1).bit_length()
        values = values + (0.0,) * (size - len(values))
        label = self._tables.setdefault(values, f"kTable{len(self._tables)}")
        return f"lut<{size}>({index}, {label})"


def _float(value: float) -> str:
    """A float literal that reads back exactly."""
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"{float(single).hex()}f"
