"""Weights as bfloat16 numbers, two columns of 16 rows in a vector."""

from __future__ import annotations

from lowbit.codegen.cpp.bf16 import Lookup, bf16_lookup
from lowbit.codegen.cpp.expr import Printer, table_text
from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.products import Products

__all__ = ["Bf16Products"]


class Bf16Products(Products):
    """Dot products of bfloat16 numbers: a step is 2 columns, 16 rows x 2 weights against 2 activations.

    Activations are stored in the order of columns 0, 2, 1, 3 (`LB_BF16_X`), so that a vector of bytes, the codes of 4
    columns, is two vectors of words, which are looked up (see `Lookup`). Scales meet sums, unless they are folded into
    the numbers.
    """

    vector, load, store, item, steps, late, total = "V", "vload", "vstore", "uint16_t", 16, True, "F"

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.printer = Printer("bytes")

    @property
    def _lookup(self) -> Lookup:
        found = bf16_lookup(self.plan.spec.fmt.element)
        assert found is not None
        return found

    def weight(self, step: int, which: int = 0) -> str:
        quad, odd = divmod(step, 2)
        code, lookup = self.printer.text(self._codes(quad)), self._lookup
        if lookup.bytewise:
            high = f"byte_of({code}, kHighBytes)"
            high = f"and_or({code}, set1(0x80808080u), {high})" if lookup.signed else high
            found = f"joined<{odd}>({high}, byte_of({code}, kLowBytes))"
        else:
            found = f"{'word_of' if len(lookup.words) == 32 else 'signed_word_of<5>'}(lane<{odd}>({code}), kWords)"
        return f"scaled({found}, scale)" if self.plan.folded else found

    @property
    def tables(self) -> str:
        words = self._lookup.words
        if self._lookup.bytewise:
            low = table_text("uint8_t kLowBytes", (w & 0xFF for w in words))
            return low + table_text("uint8_t kHighBytes", (w >> 8 for w in words))
        return table_text("int16_t kWords", (w - (w >> 15 << 16) for w in words))

    def activation(self, pointer: str, offset: str) -> str:
        return f"bcast4({pointer} + {offset})"

    def multiply(self, acc: str, w: str, x: str) -> str:
        return f"dot_bf16({acc}, {w}, {x})"

    def offset(self, step: int) -> int:
        return 2 * step
