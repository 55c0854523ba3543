"""The decode program of a format: packed words -> one dequantized number.

For scalar formats three steps, composed here once for every backend: *extract* the code's bits from its parts (a
matter of layout), map the *code to its value* (a matter of the element, `Element.decode`), and apply *zero point or
offset, and scale*. Backends that multiply integers stop after the first step and apply the affine part to the sums.
For vector formats: the sum of the centroids' elements, each gathered from a codebook. Where a weight is a sum of terms,
the program is that of one term: what terms give is added up.
"""

from __future__ import annotations

from functools import cache

from lowbit.compiler.ir.layout import plane_bits
from lowbit.compiler.ir.program import Program, program
from lowbit.quantizers.formats import Format, VectorFormat, WeightFormat

__all__ = [
    "decode_program",
    "extract_program",
    "outlier_program",
    "scalar_program",
    "trellis_program",
    "vector_program",
]


@cache
def extract_program(*widths: int) -> Program:
    """A code out of parts of so many bits each, low ones first: arguments `w0, s0, w1, s1 ...` (the word that a part is
    in, and its shift there), an integer out.

    >>> extract_program(2, 1).args
    ('w0', 's0', 'w1', 's1')
    """
    names = [f"{letter}{i}" for i in range(len(widths)) for letter in "ws"]
    p = program(*names)
    code, low = None, 0
    for i, width in enumerate(widths):
        part = p.and_(p.shr(p.arg(f"w{i}"), p.arg(f"s{i}")), p.int(2**width - 1))
        if low:
            part = p.shl(part, p.int(low))
        code = part if code is None else p.or_(code, part)
        low += width
    assert code is not None
    p.result(code)
    return p.done()


def decode_program(fmt: WeightFormat) -> Program:
    """The decode program of any format: `scalar_program`, of codes in planes, `vector_program`, or `trellis_program`,
    of a column at the start of its words."""
    if isinstance(fmt, VectorFormat):
        return vector_program(fmt)
    assert isinstance(fmt, Format)
    if fmt.element.window > 1:
        return trellis_program(fmt, (0,) * len(plane_bits(fmt.bits)))
    return scalar_program(fmt, plane_bits(fmt.bits))


@cache
def vector_program(fmt: VectorFormat) -> Program:
    """Element `lane` of the centroid `index` in `book`, plus that of `residual_index` in `residual_book` if there is
    one. What norms do follows in the kernel: column norms on the activations, row norms on the sums."""
    p = program("index", "lane", *(["residual_index"] if fmt.residual else []))
    value = p.gather(p.arg("index"), p.arg("lane"), "book")
    if fmt.residual:
        value = p.add(value, p.gather(p.arg("residual_index"), p.arg("lane"), "residual_book"))
    p.result(value)
    return p.done()


@cache
def outlier_program() -> Program:
    """The same for outlier columns: element `lane` of the centroid `index` in `outlier_book`."""
    p = program("index", "lane")
    p.result(p.gather(p.arg("index"), p.arg("lane"), "outlier_book"))
    return p.done()


@cache
def trellis_program(fmt: Format, shifts: tuple[int, ...]) -> Program:
    """`value(state) * scale` of a trellis, out of 32-bit words that hold a row's codes in their order.

    Arguments `w0, p0, w1, p1 ...`: the word with a column's part of plane 0, 1 ..., from the constant bit `shifts` on,
    and the word before it; then `scale`.
    """
    element, widths = fmt.element, plane_bits(fmt.bits)
    p = program(*(f"{letter}{i}" for i in range(len(widths)) for letter in "wp"), "scale")
    state, low = None, 0
    for i, (width, shift) in enumerate(zip(widths, shifts, strict=True)):
        size = width * element.window
        first, word = shift + width - size, p.arg(f"w{i}")
        if first < 0:
            word = p.or_(p.shl(word, p.int(-first)), p.shr(p.arg(f"p{i}"), p.int(32 + first)))
        part = p.and_(p.shr(word, p.int(first)) if first > 0 else word, p.int(2**size - 1))
        state, low = part if state is None else p.or_(state, p.shl(part, p.int(low))), low + size
    assert state is not None
    value = p.inline(element.decode(), {"code": state})
    p.result(p.mul(value, p.arg("scale")))
    return p.done()


@cache
def scalar_program(fmt: Format, widths: tuple[int, ...]) -> Program:
    """`(value(extract(words)) - zero) * scale`, or `value * scale + offset`, of codes in parts of `widths` bits:
    arguments of `extract_program`, then `scale` and, if stored, `zero` or `offset`."""
    extract = extract_program(*widths)
    p = program(*extract.args, "scale", *(["zero"] if fmt.zero else ["offset"] if fmt.offset else []))
    code = p.inline(extract, {name: p.arg(name) for name in extract.args})
    value = p.inline(fmt.element.decode(), {"code": code})
    if fmt.zero:
        value = p.sub(value, p.arg("zero"))
    if fmt.offset:
        p.result(p.fma(value, p.arg("scale"), p.arg("offset")))
    else:
        p.result(p.mul(value, p.arg("scale")))
    return p.done()
