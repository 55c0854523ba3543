"""Recipes as CuTe DSL statements.

A recipe is found from the format's decode program and proven for every code (`codegen/cuda/recipe.py`); here its
operations are printed one by one. Every name and number in a text is made here: none comes from a checkpoint.
"""

from __future__ import annotations

from lowbit.codegen.cuda.bits import Op, Operand, Sequence

__all__ = ["decode_text"]

_LOP3 = {"andor": "0xEA", "andxor": "0x6A"}  # (a & b) | c, (a & b) ^ c


def decode_text(s: Sequence) -> list[str]:
    """The function `decode(w, table)`: words w[plane][i] of 16 rows x 64 columns -> the 16 registers a[4 * step + i]
    of a warp's left operands. table: shared address of 16-bit numbers by code."""
    body = [f"{name} = {_value(op)}" for op, name in s.ops.items()]
    body += [f"{_register(target)} = {_operand(at)}" for target, at in s.outputs.items()]
    return ["def decode(w, table):", *[f"    {line}" for line in ("a = [None] * 16", *body, "return a")]]


def _register(target: str) -> str:
    """`a[step][i]` as an element of one list."""
    step, i = (int(part.rstrip("]")) for part in target.split("[")[1:])
    return f"a[{4 * step + i}]"


def _operand(x: Operand) -> str:
    if isinstance(x, int):
        return f"Uint32(0x{x:x})"
    return f"w[{x[1]}]{x[2:]}" if x.startswith("w") else x


def _value(op: Op) -> str:
    a, *rest = op.args
    if op.name in ("shr", "shl"):
        return f"{_operand(a)} {'>>' if op.name == 'shr' else '<<'} Uint32({rest[0]})"
    if op.name == "and":
        return f"{_operand(a)} & {_operand(rest[0])}"
    if op.name in _LOP3:
        return f"cute.arch.lop3({_operand(a)}, {_operand(rest[0])}, {_operand(rest[1])}, {_LOP3[op.name]})"
    if op.name == "rotr":
        return f'cute.arch.shf({_operand(a)}, {_operand(a)}, {rest[0]}, "r")'
    if op.name == "lookup":
        return f"lookup({_operand(a)}, {rest[0]}, table)"
    name = "fma16" if op.name == "fma" else op.name
    return f"{name}({', '.join(_operand(x) for x in op.args)})"
