"""How C++ kernels decode trellises: states out of runs of words, then bytes out of states.

In the layout `runs16` a 32-bit lane has a row's codes in their order, so that a state is a run of neighbouring bits.
Moving a lane's words once puts the states of two columns into its two halves, where 16-bit instructions hash them both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from lowbit.codegen.cpp.expr import Node, build, name
from lowbit.codegen.cpp.products import FloatProducts, IntProducts, Products, WordProducts
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.parts import plane_bits
from lowbit.quantizers.formats import Element

__all__ = ["TrellisWords", "trellis_header", "trellis_products"]

_WORD = 32


@dataclass(frozen=True)
class Hash:
    """The value of a state: the sum of the four bytes of its product with `multiplier`, without its lowest `dropped`
    bits, less `middle`."""

    multiplier: int
    dropped: int
    middle: int


@cache
def hash_of(element: Element) -> Hash:
    """The hash that the element's decode program is; raises KernelError (LB0411) for another program."""
    value = build(element.decode(), {"code": name("state")})
    hashed = next((n for n in _nodes(value) if n.op == "multiply"), None)
    if value.op == "fadd" and hashed is not None and hashed.args[1].op == "int":
        total = value.args[0].args[0]
        found = Hash(_number(hashed.args[1]), _number(total), -_number(value.args[1]))
        if total.op == "shift" and total.args[0] == _byte_sum(hashed):
            return found
    raise KernelError("LB0411", f"the decode program of {element.name} is no sum of bytes of a product")


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for inner in node.args:
        yield from _nodes(inner)


def _number(node: Node) -> int:
    return int(node.value)  # type: ignore[arg-type]


def _byte_sum(x: Node) -> Node:
    """The sum of the four bytes of `x`."""
    pairs = Node("vadd", (_masked(x, 0, 0x00FF00FF), _masked(x, 8, 0x00FF00FF)))
    return Node("vadd", (_masked(pairs, 0, 0xFFFF), Node("shift", (pairs,), 16)))


def _masked(x: Node, down: int, mask: int) -> Node:
    return Node("mask", (Node("shift", (x,), down) if down else x,), mask)


class TrellisProducts(Products):
    """What products with trellises load: `h<word>_<i>`, the values + middle of column `i` of a word and of the one
    half a word further on, in halves of lanes."""

    @property
    def half(self) -> int:
        """Columns of half a word of the first plane."""
        return _WORD // 2 // self.plan.planes[0]

    def loads(self) -> Iterator[tuple[str, str]]:
        """Words, those before a block's first (`p<plane>`, 0 before a row's first), and values."""
        yield from super().loads()
        for i in range(len(self.plan.planes)):
            yield f"p{i}", f"const V p{i} = c | b ? vload(w{i} - 64) : vzero();"
        found = hash_of(self.plan.spec.fmt.element)
        for word in range(self.plan.planes[0]):
            for i in range(self.half):
                at, label = word * 2 * self.half + i, f"h{word}_{i}"
                sums = f"byte_sums<{found.multiplier}u, {found.dropped}>({self._states(at)})"
                yield label, f"const V {label} = {sums};"

    def _states(self, column: int) -> str:
        """The states of a column and of the one half a word further on."""
        element, low, text = self.plan.spec.fmt.element, 0, ""
        for i, width in enumerate(plane_bits(element.bits)):
            size = width * element.window
            run = self._run(i, width, (column - element.window + 1) * width, self.half * width + size)
            for place, shift in ((low, low), (16 + low, 16 + low - self.half * width)):
                mask = f"set1(0x{(2**size - 1) << place:08x}u)"
                moved = f"shl<{shift}>({run})" if shift > 0 else f"shr<{-shift}>({run})" if shift else run
                text = f"and_or({moved}, {mask}, {text})" if text else f"vand({moved}, {mask})"
            low += size
        return text

    def _run(self, plane: int, width: int, first: int, size: int) -> str:
        """`size` bits of a plane's columns in a row, from bit `first` of the block on (below 0: before it)."""
        word, shift = divmod(first, _WORD)
        low, high = (f"w{plane}_{w}" if w >= 0 else f"p{plane}" for w in (word, word + 1))
        if not shift:
            return low
        if shift + size <= _WORD:
            return f"shr<{shift}>({low})"
        return f"vor(shr<{shift}>({low}), shl<{_WORD - shift}>({high}))"

    def _bytes(self, quad: int) -> str:
        """The bytes of columns 4 * quad to 4 * quad + 3."""
        word, column = divmod(4 * quad, 2 * self.half)
        high, first = divmod(column, self.half)
        a, b = (f"vor(h{word}_{i}, shl<8>(h{word}_{i + 1}))" for i in (first, first + 2))
        if high:
            return f"and_or({b}, set1(0xffff0000u), shr<16>({a}))"
        return f"and_or({a}, set1(0x0000ffffu), shl<16>({b}))"


class TrellisBytes(TrellisProducts, IntProducts):
    """Byte dot products with trellises."""

    def _codes(self, quad: int, shift: int = 0) -> Node:
        return name(self._bytes(quad))


class TrellisWords(TrellisProducts, WordProducts):
    """Dot products of 16-bit numbers with trellises: a step is a column and the one half a word further on, which lie
    side by side already. Activations are stored so (`LB_WORDS` 3)."""

    def weight(self, step: int, which: int = 0) -> str:
        word, i = divmod(step, self.half)
        return f"h{word}_{i}"


class TrellisFloats(TrellisProducts, FloatProducts):
    """Products of floats with trellises."""

    def weight(self, step: int, which: int = 0) -> str:
        word, column = divmod(step, 2 * self.half)
        high, i = divmod(column, self.half)
        both, middle = f"h{word}_{i}", hash_of(self.plan.spec.fmt.element).middle
        value = f"shr<16>({both})" if high else f"vand({both}, set1(0x0000ffffu))"
        return f"fmul(fadd(cvt({value}), fset1({-float(middle)}f)), scale)"


def trellis_products(integer: bool, words: bool) -> type[Products]:
    """The products of a plan whose weights are trellises."""
    return (TrellisWords if words else TrellisBytes) if integer else TrellisFloats


def trellis_header(arch: str) -> str:
    """The file of `text/` with an instruction set's primitives."""
    wide = "avx512" if arch.startswith("avx512") else "avx2" if arch.startswith("avx2") else "generic"
    return f"trellis_{wide}.h"
