"""PTX text -> instructions, with names of nested scopes made unique and every operand taken apart."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from _ptx.errors import PtxError

__all__ = [
    "Address", "Immediate", "Instruction", "Kernel", "Module", "Name", "Operand", "Param", "Register", "Variable",
    "Vector", "parse",
]  # fmt: skip

WIDTHS = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "b128": 16}
for _bits in ("8", "16", "32", "64"):
    WIDTHS |= {f"{kind}{_bits}": int(_bits) // 8 for kind in "us"}
WIDTHS |= {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "pred": 0}


@dataclass(frozen=True)
class Register:
    """slot: its place in a thread block's list. width: bytes; 0 is a predicate. negated: `!%p`."""

    slot: int
    width: int
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or a float (with the bits it was written as, where it was)."""

    value: int | float


@dataclass(frozen=True)
class Name:
    """A label, variable, parameter or special register."""

    name: str


@dataclass(frozen=True)
class Vector:
    """`{a, b}`, or the two predicates of `p|q`."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; of tensors `[base, {coordinates}]`."""

    base: Operand
    offset: int
    coordinates: Vector | None = None


Operand = Register | Immediate | Name | Vector | Address


@dataclass
class Instruction:
    """One instruction. parts: its name cut at the dots. guard: the predicate before it, if any."""

    line: int
    text: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None

    @property
    def name(self) -> str:
        """With all that its dots divide."""
        return ".".join(self.parts)

    def has(self, *parts: str) -> bool:
        """Whether one of these follows a dot of its name."""
        return any(p in self.parts for p in parts)


@dataclass(frozen=True)
class Param:
    """A kernel's parameter and where its bytes lie in the block of all."""

    name: str
    size: int
    offset: int


@dataclass(frozen=True)
class Variable:
    """Memory with a name. size: bytes; 0 for dynamic shared memory. data: first bytes, zeros follow."""

    name: str
    space: str
    size: int
    align: int
    data: bytes = b""


@dataclass
class Kernel:
    """labels: name -> index of the instruction that follows. widths: bytes of every register slot."""

    name: str
    params: list[Param]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def param_bytes(self) -> int:
        """Of all parameters."""
        return max((p.offset + p.size for p in self.params), default=0)


@dataclass
class Module:
    """Kernels by name, and variables they share."""

    kernels: dict[str, Kernel]
    variables: list[Variable]


def parse(text: str) -> Module:
    """Raises PtxError for what it does not understand; instructions are understood later."""
    text = _plain(text)
    module = Module({}, [])
    entry = re.compile(r"\.(entry|func)\b")
    for statement, start, body in _outermost(text):
        line = text.count("\n", 0, start) + 1
        found = entry.search(statement)
        if found is None:
            module.variables += [v for v in [_variable(statement)] if v]
        elif found[1] == "entry":
            kernel = _kernel(statement[found.end() :])
            _Body(kernel).read(body, line + statement.count("\n"))
            module.kernels[kernel.name] = kernel
    return module


def _plain(text: str) -> str:
    """Without comments and debugging information; lines stay where they are."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"^\s*\.(loc|file|version|target|address_size)\b[^\n]*", "", text, flags=re.M)


def _outermost(text: str) -> Iterator[tuple[str, int, str]]:
    """(statement, position, what its braces hold) of the outermost level."""
    at = 0
    while found := re.compile(r"[;{]").search(text, at):
        statement, start = text[at : found.start()], at
        if found[0] == ";":
            at = found.end()
            yield statement, start, ""
            continue
        end = _closing(text, found.start())
        body, at = text[found.start() + 1 : end], end + 1
        if statement.rstrip().endswith("="):  # a variable's first values
            at = text.index(";", end) + 1
            yield statement + "{" + body + "}", start, ""
        else:
            yield statement, start, body


def _closing(text: str, at: int) -> int:
    depth = 0
    for found in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.start()
    raise PtxError("a brace is never closed")


_VARIABLE = re.compile(
    r"\.(global|shared|const|local)\b(?:\s*\.(?:align\s+(\d+)|attribute\([^)]*\)|ptr))*\s*"
    r"\.(\w+)\s+([\w$%]+)\s*(\[\s*(\d*)\s*\])?\s*(?:=\s*(.*))?$",
    re.S,
)


def _variable(statement: str) -> Variable | None:
    found = _VARIABLE.search(statement.strip())
    if found is None:
        return None
    space, align, kind, name, array, count, values = found.groups()
    width = WIDTHS[kind]
    size = width * (int(count or 0) if array else 1)
    data = b""
    if values:
        numbers = [int(v, 0) for v in re.findall(r"-?\w+", values)]
        data = b"".join((n % (1 << 8 * width)).to_bytes(width, "little") for n in numbers)
    return Variable(name, space, size, int(align or width), data)


def _kernel(head: str) -> Kernel:
    name = re.match(r"\s*([\w$]+)", head)
    if name is None:
        raise PtxError(f"a kernel without a name: {head[:80]!r}")
    params, offset = [], 0
    inside = head[head.index("(") + 1 : head.rindex(")")] if "(" in head else ""
    for text in filter(str.strip, re.split(r",(?![^\[]*\])", inside)):
        kind = re.search(r"\.(b8|b16|b32|b64|[us](?:8|16|32|64)|f32|f64|f16)\b", text)
        label = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", text)
        if kind is None or label is None:
            raise PtxError(f"parameter {text.strip()!r} is not understood")
        width = WIDTHS[kind[1]]
        found = re.search(r"\.align\s+(\d+)\s+\.b8", text)
        align = int(found[1]) if found else width
        offset += -offset % align
        params.append(Param(label[1], width * int(label[2] or 1), offset))
        offset += params[-1].size
    return Kernel(name[1], params)


class _Body:
    """Reads a kernel's statements. Names declared between braces hide those outside."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = [{}]
        self.slots: dict[str, int] = {}
        self.families: dict[str, int] = {}  # `%r<10>`: bytes by what comes before the number
        self.pending: list[tuple[int, int, str]] = []
        self.count = 0

    def read(self, body: str, line: int) -> None:
        token = re.compile(r"[;{}]|[\w$%]+\s*:(?!:)")
        at = 0
        while found := token.search(body, at):
            before = body[at : found.start()]
            here = line + body.count("\n", 0, at + len(before) - len(before.lstrip()))
            if found[0] == "{" and before.strip():  # a vector of operands
                end = body.index(";", found.end())
                self._statement(body[at:end].strip(), here)
                at = end + 1
                continue
            at = found.end()
            if found[0] == "{":
                self._open(body, at)
            elif found[0] == "}":
                self.scopes.pop()
            elif found[0] == ";":
                self._statement(before.strip(), here)
            else:
                self._label(found[0][:-1].strip(), body[at:])

    def _open(self, body: str, at: int) -> None:
        """A scope, with its labels and registers under names of their own."""
        inside = body[at : _closing(body, at - 1)]
        while (inner := inside.find("{")) >= 0 and _is_scope(inside, inner):
            inside = inside[:inner] + inside[_closing(inside, inner) + 1 :]
        self.count += 1
        labels = re.findall(r"(?:^|[;{}\n])\s*([\w$%]+)\s*:(?!:)", inside)
        self.scopes.append({name: f"{name}#{self.count}" for name in labels})

    def _label(self, name: str, after: str) -> None:
        table = re.match(r"\s*\.branchtargets\s+([^;]*);", after)
        if table:
            self.kernel.tables[name] = tuple(self._name(t.strip()) for t in table[1].split(","))
        self.kernel.labels[self._name(name)] = len(self.kernel.code)

    def _name(self, name: str) -> str:
        return next((s[name] for s in reversed(self.scopes) if name in s), name)

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            return self._declare(text)
        if text.startswith("."):
            self.kernel.variables += [v for v in [_variable(text)] if v]
            return None
        if not text:
            return None
        found = re.match(r"(?:@(!?)([\w$%.]+)\s+)?([\w.:]+)\s*(.*)$", text, re.S)
        if found is None:
            raise PtxError(f"line {line}: {text!r} is not understood")
        guard = self._register(found[2], bool(found[1])) if found[2] else None
        operands = tuple(self._operand(o.strip(), line) for o in _split(found[4]))
        parts = tuple(found[3].split("."))
        self.kernel.code.append(Instruction(line, " ".join(text.split()), parts, operands, guard))
        return None

    def _declare(self, text: str) -> None:
        _, kind, names = re.split(r"\s+", text.replace("\t", " "), maxsplit=2)
        width = WIDTHS[kind.removeprefix(".")]
        for name in names.split(","):
            if found := re.match(r"\s*([\w$%]+)<\d+>", name):
                self.families[found[1]] = width
                continue
            plain = name.strip()
            if len(self.scopes) > 1:
                self.scopes[-1][plain] = f"{plain}#{self.count}.{len(self.slots)}"
            self._slot(self._name(plain), width)

    def _slot(self, name: str, width: int) -> int:
        if name not in self.slots:
            self.slots[name] = len(self.kernel.widths)
            self.kernel.widths.append(width)
        return self.slots[name]

    def _register(self, name: str, negated: bool = False) -> Register | None:
        full = self._name(name)
        if full not in self.slots:
            family = self.families.get(name.rstrip("0123456789"))
            if family is None or name[-1] not in "0123456789":
                return None
            self._slot(full, family)
        slot = self.slots[full]
        return Register(slot, self.kernel.widths[slot], negated)

    def _operand(self, text: str, line: int) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(t.strip(), line) for t in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip(), line)
        if "|" in text:
            return Vector(tuple(self._operand(t.strip(), line) for t in text.split("|")))
        negated = text.startswith("!")
        plain = text.lstrip("!").strip()
        if re.match(r"-?\d", plain):
            return Immediate(_number(plain))
        if plain.startswith("-") and (register := self._register(plain[1:].strip())):
            raise PtxError(f"line {line}: negated operand {register} is not understood")
        symbol = re.match(r"([\w$]+)\s*\+\s*(\d+)$", plain)
        if symbol:
            return Address(Name(symbol[1]), int(symbol[2]))
        return self._register(plain, negated) or Name(self._name(plain))

    def _address(self, text: str, line: int) -> Address:
        base, *rest = _split(text)
        coordinates = self._operand(rest[0].strip(), line) if rest else None
        found = re.match(r"([^+]+?)\s*(?:\+\s*(-?\w+))?\s*$", base.strip())
        if found is None or not (coordinates is None or isinstance(coordinates, Vector)):
            raise PtxError(f"line {line}: address [{text}] is not understood")
        return Address(self._operand(found[1], line), int(found[2] or "0", 0), coordinates)


def _is_scope(text: str, at: int) -> bool:
    before = text[:at].rstrip()
    return not before or before[-1] in ";:}"


def _split(text: str) -> list[str]:
    """At commas that no bracket encloses."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += c
    return [*parts, current] if current.strip() else parts


def _number(text: str) -> int | float:
    if found := re.match(r"0[fF]([0-9a-fA-F]{8})$", text):
        return float(struct.unpack("<f", bytes.fromhex(found[1])[::-1])[0])
    if found := re.match(r"0[dD]([0-9a-fA-F]{16})$", text):
        return float(struct.unpack("<d", bytes.fromhex(found[1])[::-1])[0])
    plain = text.rstrip("U")
    try:
        return int(plain, 0)
    except ValueError:
        return int(plain, 8) if plain.isdigit() and plain.startswith("0") else float(plain)
