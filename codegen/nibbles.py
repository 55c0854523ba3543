"""Four-bit codes as bytes for integer matrix instructions: the bit tricks, and which instruction a GPU has.

The tricks are written with operators only. On Python integers or tensors they compute; on `Text` they print the same
expression for an emitter, so what tests check for every code is what kernels contain. A 32-bit word holds eight codes,
the low four bits first; bytes come in the order of the word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from lowbit.compiler.errors import KernelError

__all__ = ["Lowering", "Text", "affine_bytes", "fold_scale", "lower_product", "two_level_bytes", "unpack_x16"]


class Word(Protocol):
    """What 32-bit words can do here."""

    def __and__(self, other: Any) -> Any: ...
    def __xor__(self, other: Any) -> Any: ...
    def __lshift__(self, by: int) -> Any: ...
    def __mul__(self, other: Any) -> Any: ...
    def __add__(self, other: Any) -> Any: ...


@dataclass(frozen=True)
class Text:
    """An expression over unsigned 32-bit words, in the syntax that C and CUDA share."""

    text: str

    def _with(self, op: str, other: Text | int) -> Text:
        right = other.text if isinstance(other, Text) else f"0x{other & 0xFFFFFFFF:08x}u"
        return Text(f"({self.text} {op} {right})")

    def __and__(self, other: Text | int) -> Text:
        return self._with("&", other)

    def __xor__(self, other: Text | int) -> Text:
        return self._with("^", other)

    def __mul__(self, other: Text | int) -> Text:
        return self._with("*", other)

    def __add__(self, other: Text | int) -> Text:
        return self._with("+", other)

    def __lshift__(self, by: int) -> Text:
        return Text(f"({self.text} << {by})")


def unpack_x16(word: Word) -> tuple[Any, Any]:
    """(low, high): the words whose signed bytes are 16 times the low and the high codes of each byte of `word`.

    Codes are two's complement (`code ^ 8` for codes that are stored as value + 8). Three operations for eight codes;
    the factor goes into the scale (`fold_scale`). From "COMET: Towards Practical W4A4KV4 LLMs Serving".
    """
    return (word << 4) & 0xF0F0F0F0, word & 0xF0F0F0F0


def affine_bytes(codes: Word, scale: Any, least: Any) -> Any:
    """The word whose signed bytes are code * scale + least, for the four bytes `codes` of 0 to 15.

    scale from 1 up and least are integers with all results in [-128, 127]: then bytes do not carry into each other,
    because each is computed 128 too high. One multiply-add and one exclusive or for four codes, as in "LiquidGEMM:
    Hardware-Efficient W4A8 GEMM Kernel for High-Performance LLM Serving".
    """
    return (codes * scale + (least + 128) * 0x01010101) ^ 0x80808080


def two_level_bytes(codes: Word, scale: Any, zero: Any) -> Any:
    """`affine_bytes` for (code - zero) * scale: the weights of "QServe: W4A8KV4 Quantization and System Co-design for
    Efficient LLM Serving" before their channel's scale."""
    return affine_bytes(codes, scale, zero * scale * -1)


def fold_scale(scale: torch.Tensor, power: int) -> torch.Tensor:
    """scale * 2**power in its own type, exactly; raises KernelError (LB0417) when bits or range do not suffice."""
    folded = torch.ldexp(scale.double(), torch.tensor(power)).to(scale.dtype)
    back = torch.ldexp(folded.double(), torch.tensor(-power))
    if not torch.equal(back, scale.double()):
        raise KernelError(
            "LB0417", f"scales in {scale.dtype} lose bits when multiplied by 2**{power}", hint="use float32"
        )
    return folded


@dataclass(frozen=True)
class Lowering:
    """One matrix instruction. operand: its type of both factors. instruction: the shape's name. factor: what its sums
    exceed those of the levels by, because four-bit levels are taken as bytes times 16."""

    operand: Literal["s4", "s8"]
    instruction: Literal["mma.m16n8k64", "mma.m16n8k32", "wgmma.m64k32"]
    factor: int


# sm_90 and later accept s4 operands, but ptxas makes two s8 products and some 180 other instructions of one.
_NATIVE_S4 = frozenset({80, 86, 87, 89})
_WGMMA = frozenset({90})
_WGMMA_ROWS = 64


def lower_product(arch: str, weight_bits: int, activation_bits: int, rows: int) -> Lowering:
    """How integers of these widths are multiplied on `arch` (such as `sm_90`), in tiles of `rows` along the M of an
    instruction: four-bit products only where the hardware has them and both sides are that narrow."""
    generation = int(arch.removeprefix("sm_").rstrip("af"))
    narrow = max(weight_bits, activation_bits) <= 4
    if narrow and generation in _NATIVE_S4:
        return Lowering("s4", "mma.m16n8k64", 1)
    factor = (16 if weight_bits == 4 else 1) * (16 if activation_bits == 4 else 1)
    wide = generation in _WGMMA and rows >= _WGMMA_ROWS
    return Lowering("s8", "wgmma.m64k32" if wide else "mma.m16n8k32", factor)
