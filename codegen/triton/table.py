"""What the operations of a decode program mean, as Triton expressions on tiles.

Three local rewrites keep the instruction count low, and know nothing of formats.

- Bit fields stay symbolic: shifts, masks and ors of them are merged before anything is printed.
- An integer becomes a float by placing it in the mantissa of a large power of two, where its lowest bit already
  stands: one logical operation and no shift, where the conversion instruction runs at a quarter of the rate. The
  power of two to subtract is merged with the next integer constant or operand added.
- A multiplication by the literal 1.0 disappears, as does an addition of 0.0, so that a caller who applies scales and
  offsets to sums passes these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lowbit.compiler.ir.program import Program

__all__ = ["Expr", "Printer", "magic_definitions"]

_MANTISSA = 23
_WORD = 32


@dataclass(frozen=True)
class Field:
    """`(word >> shift) & mask`, a shift to the left when negative."""

    word: str
    shift: int
    mask: int

    def at(self, position: int) -> str:
        """The field moved up by `position` bits, as text."""
        move = self.shift - position
        moved = self.word if move == 0 else f"({self.word} {'>>' if move > 0 else '<<'} {abs(move)})"
        return f"({moved} & {self.mask << position})"


@dataclass(frozen=True)
class Expr:
    """A Triton expression: `text`, to which the integer `offset` still has to be added; or, when `fields` is not
    empty, the bitwise or of them (an unsigned integer of at most 32 bits)."""

    text: str
    offset: float = 0.0
    fields: tuple[Field, ...] = ()

    def __str__(self) -> str:
        if self.fields:
            return _any(self.fields, 0)
        if not self.offset:
            return self.text
        return f"({self.text} {'-' if self.offset < 0 else '+'} {abs(self.offset)!r})"

    @property
    def literal(self) -> float | None:
        """The value of a plain number."""
        try:
            return None if self.fields else float(self.text) + self.offset
        except ValueError:
            return None


def _any(fields: tuple[Field, ...], position: int) -> str:
    text = " | ".join(f.at(position) for f in fields)
    return f"({text})" if len(fields) > 1 else text


class Printer:
    """Prints programs as Triton statements into `lines`; names of temporaries are unique per printer.

    `gather(index, lane, book)` prints the load of a codebook's element; programs of scalar formats have none.
    """

    def __init__(self, lines: list[str], indent: str, gather: Callable[[Expr, Expr, str], Expr] | None = None) -> None:
        self.lines = lines
        self.indent = indent
        self._gather = gather
        self._count = 0

    def let(self, text: str) -> str:
        """Bind `text` to a new temporary and return its name."""
        self._count += 1
        name = f"t{self._count}"
        self.lines.append(f"{self.indent}{name} = {text}")
        return name

    def run(self, program: Program, args: Mapping[str, str]) -> str:
        """The program's result as an expression; `args` maps argument names to expressions (words are uint32)."""
        return str(program.run(self.table(), {name: Expr(text) for name, text in args.items()}))

    def table(self) -> dict[str, Callable[..., Expr]]:
        """Operation name -> printer, for `Program.run`."""
        gather = {"gather": self._gather} if self._gather else {}
        return gather | {
            "const": lambda value: Expr(repr(float(value))),
            "int": lambda value: Expr(str(int(value))),
            "shr": _shr,
            "shl": _shl,
            "and": _and,
            "or": _or,
            "multiply": lambda x, y: Expr(self.let(f"{x} * {y}")),
            "plus": lambda x, y: Expr(self.let(f"{x} + {y}")),
            "bitcast": lambda x: Expr(f"({x}).to(tl.float32, bitcast=True)"),
            "half": lambda x: Expr(f"({x}).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)"),
            "int_to_float": _int_to_float,
            "lut": self._lut,
            "add": _add,
            "sub": _sub,
            "mul": _mul,
            "fma": _fma,
        }

    def _lut(self, index: Expr, table: tuple[float, ...]) -> Expr:
        """A binary tree of selects over the bits of `index`; constant halves collapse."""
        code = self.let(str(index))

        def select(low: int, size: int) -> str:
            if len(set(table[low : low + size])) == 1:
                return repr(float(table[low]))
            half = size // 2
            return f"tl.where(({code} & {half}) != 0, {select(low + half, half)}, {select(low, half)})"

        if len(set(table)) == 1:
            return Expr(f"tl.where({code} == 0, {float(table[0])!r}, {float(table[0])!r})")
        return Expr(select(0, len(table)))


def _shr(x: Expr, by: Expr) -> Expr:
    if (n := by.literal) is None:
        return Expr(f"({x} >> {by})")
    if not x.fields:
        return Expr("", fields=(Field(str(x), int(n), 2 ** (_WORD - int(n)) - 1),))
    return Expr("", fields=tuple(Field(f.word, f.shift + int(n), f.mask >> int(n)) for f in x.fields))


def _shl(x: Expr, by: Expr) -> Expr:
    n = by.literal
    if n is None or not x.fields or any((f.mask << int(n)) >> _WORD for f in x.fields):
        return Expr(f"({x} << {by})")
    return Expr("", fields=tuple(Field(f.word, f.shift - int(n), f.mask << int(n)) for f in x.fields))


def _and(x: Expr, y: Expr) -> Expr:
    if (mask := y.literal) is None:
        return Expr(f"({x} & {y})")
    fields = x.fields or (Field(str(x), 0, 2**_WORD - 1),)
    return Expr("", fields=tuple(Field(f.word, f.shift, f.mask & int(mask)) for f in fields))


def _or(x: Expr, y: Expr) -> Expr:
    if x.fields and y.fields:
        return Expr("", fields=(*x.fields, *y.fields))
    return Expr(f"({x} | {y})")


def _int_to_float(x: Expr) -> Expr:
    """Left where its lowest field lies, or, from bit 16 on, after one shift that all such fields of a word share."""
    if not x.fields:
        return _magic(str(x), 0)
    first = x.fields[0]
    position = max(first.shift, 0) % 16
    if position + max(f.mask for f in x.fields).bit_length() > _MANTISSA:
        position = 0
    return _magic(_any(x.fields, position), position)


def _magic(text: str, position: int) -> Expr:
    """2**(23 - position) as a float has a mantissa whose bit `position` is worth 1."""
    return Expr(f"({text} | magic_{position}).to(tl.float32, bitcast=True)", -float(2 ** (_MANTISSA - position)))


def magic_definitions(body: str) -> list[str]:
    """Statements that define the `magic_<position>` constants `body` uses.

    They have the sign of the token count added, which is 0 but not known to be: an instruction takes one immediate
    operand, so with a constant in a register mask and or become one instruction, and with two immediates they do not.
    """
    used = sorted({int(p) for p in re.findall(r"magic_(\d+)", body)})
    lines = [f"magic_{p} = {(127 + _MANTISSA - p) << _MANTISSA} + nothing" for p in used]
    return ["nothing = tokens >> 31", *lines] if used else []


def _add(x: Expr, y: Expr) -> Expr:
    if x.offset and (value := y.literal) is not None and value.is_integer():
        return Expr(x.text, x.offset + value)
    return Expr(f"({x} + {y})")


def _sub(x: Expr, y: Expr) -> Expr:
    if x.offset and (value := y.literal) is not None and value.is_integer():
        return Expr(x.text, x.offset - value)
    if x.offset:  # raw + offset - y = raw - (y - offset): the bracket is the same for every column of a group
        return Expr(f"({x.text} - {Expr(y.text, y.offset - x.offset)})")
    return Expr(f"({x} - {y})")


def _mul(x: Expr, y: Expr) -> Expr:
    if y.literal == 1.0:
        return x
    return Expr(f"({x} * {y})")


def _fma(x: Expr, y: Expr, z: Expr) -> Expr:
    if z.literal == 0.0:
        return _mul(x, y)
    return _add(x, z) if y.literal == 1.0 else Expr(f"({x} * {y} + {z})")
