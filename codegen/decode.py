"""The decode program of a format: packed words -> one dequantized number.

Three steps, composed here once for every backend: *extract* the code's bits from its planes (a matter of layout), map
the *code to its value* (a matter of the element, `Element.decode`), and apply *zero point and scale*. Backends that
multiply integers stop after the first step and apply the affine part to the sums.
"""

from __future__ import annotations

from functools import cache

from lowbit.compiler.ir.layout import plane_bits
from lowbit.compiler.ir.program import Program, program
from lowbit.quantizers.formats import Format

__all__ = ["decode_program", "extract_program"]


@cache
def extract_program(bits: int) -> Program:
    """Bits of one code out of its planes: arguments `w0, s0, w1, s1 ...` (word, shift), an integer out.

    >>> extract_program(3).args
    ('w0', 's0', 'w1', 's1')
    """
    widths = plane_bits(bits)
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


@cache
def decode_program(fmt: Format) -> Program:
    """`(value(extract(words)) - zero) * scale`: arguments of `extract_program`, then `scale` and, if stored, `zero`."""
    extract = extract_program(fmt.bits)
    p = program(*extract.args, "scale", *(["zero"] if fmt.zero else []))
    code = p.inline(extract, {name: p.arg(name) for name in extract.args})
    value = p.inline(fmt.element.decode(), {"code": code})
    if fmt.zero:
        value = p.sub(value, p.arg("zero"))
    p.result(p.mul(value, p.arg("scale")))
    return p.done()
