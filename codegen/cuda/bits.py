"""Straight-line sequences of 32-bit instructions: built with common parts shared, printed as CUDA C++, run on the CPU.

Words hold two 16-bit halves or four bytes, one weight in each. The same list of operations is printed for the compiler
and run on tensors to prove it, so that what is proven is what is emitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

__all__ = ["NarrowType", "Op", "Operand", "Sequence", "Type16", "half_of", "run", "run_words", "text", "to_bits"]

Type16 = Literal["f16", "bf16"]
"""Operand types of the matrix instructions that are halves of a word."""

NarrowType = Literal["s8", "e4m3", "s4"]
"""Those that are bytes, signed integers and FP8; and signed integers of four bits."""

Operand: TypeAlias = str | int
"""A register's name, or a constant."""

_TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Op:
    """One instruction. shr, shl, rotr: (a, by). and: (a, mask). andor, andxor: (a & mask) | b, ^ b. prmt: bytes of
    (a, b) by selector. fma: both halves of a, times b, plus c (constants: pairs of equal 16-bit floats). lookup: the
    entries of the table whose indices are bytes `by` and `by + 2` of a."""

    name: str
    args: tuple[Operand, ...]


@dataclass
class Sequence:
    """Operations in order; equal ones are there once. Results are called `t0`, `t1` ..."""

    ops: dict[Op, str] = field(default_factory=dict)
    outputs: dict[str, Operand] = field(default_factory=dict)

    def add(self, name: str, *args: Operand) -> str:
        """The result of an operation, new or already there."""
        return self.ops.setdefault(Op(name, args), f"t{len(self.ops)}")

    def shift(self, word: Operand, right: int) -> Operand:
        """`word` shifted to the right (to the left when negative); by nothing it is itself."""
        if right == 0:
            return word
        return self.add("shr" if right > 0 else "shl", word, abs(right))

    @property
    def cost(self) -> int:
        """Instructions; a lookup counts for the six it takes."""
        return sum(6 if op.name == "lookup" else 1 for op in self.ops)


def half_of(value: float, dtype: Type16) -> int:
    """The bits of `value` as a 16-bit float; raises ValueError when it is not one."""
    rounded = torch.tensor([value], dtype=torch.float64).to(_TORCH[dtype])
    if float(rounded) != value:
        raise ValueError(f"{value} is no {dtype}")
    return int(rounded.view(torch.int16)) & 0xFFFF


def to_bits(values: torch.Tensor, dtype: Type16) -> torch.Tensor:
    """int64 bits of float64 `values` rounded to a 16-bit float."""
    return values.to(_TORCH[dtype]).view(torch.int16).to(torch.int64) & 0xFFFF


def _floats(words: torch.Tensor, dtype: Type16) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves of `words` as float64, low half first."""
    halves = torch.stack([words & 0xFFFF, words >> 16])
    low, high = (halves - ((halves & 0x8000) << 1)).to(torch.int16).view(_TORCH[dtype]).double()
    return low, high


def run(
    s: Sequence, words: Mapping[str, torch.Tensor], dtype: Type16, table: torch.Tensor | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Output name -> (low, high) halves as float64, for int64 tensors of 32-bit `words`."""
    return {name: _floats(word, dtype) for name, word in run_words(s, words, dtype, table).items()}


def run_words(
    s: Sequence, words: Mapping[str, torch.Tensor], dtype: Type16 = "f16", table: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Output name -> int64 words of 32 bits."""
    found: dict[Operand, torch.Tensor] = dict(words.items())
    for op, name in s.ops.items():
        found[name] = _apply(op, found, dtype, table) & 0xFFFFFFFF
    return {name: found[at] if isinstance(at, str) else torch.tensor(at) for name, at in s.outputs.items()}


def _apply(op: Op, found: Mapping[Operand, torch.Tensor], dtype: Type16, table: torch.Tensor | None) -> torch.Tensor:
    a, *rest = [found[x] if isinstance(x, str) else torch.tensor(x) for x in op.args]
    if op.name == "prmt":
        pool = [a >> 8 * i & 255 for i in range(4)] + [rest[0] >> 8 * i & 255 for i in range(4)]
        return sum((pool[int(rest[1]) >> 4 * i & 7] << 8 * i for i in range(4)), start=torch.zeros_like(a))
    if op.name == "fma":
        factor, addend = (_floats(x, dtype)[0] for x in rest)
        low, high = (to_bits(x * factor + addend, dtype) for x in _floats(a, dtype))
        return low | high << 16
    if op.name == "lookup":
        assert table is not None
        low, high = (to_bits(table[a >> 8 * (int(rest[0]) + i) & 255], dtype) for i in (0, 2))
        return low | high << 16
    return {"shr": lambda: a >> rest[0], "shl": lambda: a << rest[0], "and": lambda: a & rest[0],
            "rotr": lambda: a >> rest[0] | a << (32 - rest[0]), "andxor": lambda: (a & rest[0]) ^ rest[1],
            "andor": lambda: (a & rest[0]) | rest[1]}[op.name]()  # fmt: skip


_NAMES = {"and": "band", "andor": "band_or", "andxor": "band_xor", "fma": "fma16"}


def text(s: Sequence) -> list[str]:
    """C++ statements that compute the outputs, for the primitives of `text/ptx.cuh`."""
    lines = []
    for op, name in s.ops.items():
        args = [x if isinstance(x, str) else f"0x{x:x}u" for x in op.args]
        if op.name in ("shr", "shl"):
            value = f"{args[0]} {'>>' if op.name == 'shr' else '<<'} {op.args[1]}"
        elif op.name == "rotr":
            value = f"rotr({args[0]}, {op.args[1]})"
        elif op.name == "prmt":
            value = f"prmt<{args[2]}>({args[0]}, {args[1]})"
        elif op.name == "lookup":
            value = f"lookup<{op.args[1]}>(table, {args[0]})"
        else:
            value = f"{_NAMES[op.name]}({', '.join(args)})"
        lines.append(f"const uint32_t {name} = {value};")
    return lines + [f"{target} = {at};" for target, at in s.outputs.items()]
