"""The fixed numbers of kernels that look sums of activations up: which codes a nibble holds, and what its table says.

The method of "T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge" (Wei et al.): activations are
known before weights are read, so the sum that a few low-bit codes pick out of them is one of 16 numbers. Here the
packed bytes are the indices as they are: a nibble holds four codes of a plane of 1 bit, or two of 2 bits, so a table
has the sums of four or two products. Tables are exact: an entry has 10 bits, in two bytes that are added up apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import Layout, plane_bits
from lowbit.quantizers.formats import IntegerLevels

__all__ = [
    "LOW_BITS",
    "OFFSET",
    "TABLE_BYTES",
    "WIDEST",
    "LutStep",
    "blocks_per_sum",
    "centre",
    "code_step",
    "factors",
    "lut_problem",
    "lut_steps",
]

TABLE_BYTES = 128
"""Of one step: low bytes of the four tables, then high bytes."""
OFFSET, LOW_BITS = 512, 5
"""Entries are sums plus OFFSET, so 0 to 1020. Their low bytes hold LOW_BITS bits, the high ones the rest."""
WIDEST = 2
"""Bits of the widest plane: one product of a 4-bit code would take a lookup that two products of 2 bits take."""
_BYTE, _ROWS, _COLUMNS = 64, 16, 32  # bytes of a vector; rows and columns of a block
_LOOKUPS = 8  # entries' bytes, 31 at most, that a byte holds the sum of


@dataclass(frozen=True)
class LutStep:
    """One nibble of all 64 bytes of a vector: 16 rows x 4 tables.

    plane, vector: where the bytes are. half: 1 for the high nibble. columns: of the block, that the codes from the
    lowest bits on belong to in table 0; in table j they are j further on.
    """

    plane: int
    vector: int
    half: int
    columns: tuple[int, ...]


@cache
def lut_steps(layout: Layout, bits: int) -> tuple[LutStep, ...]:
    """The steps of a block of 16 rows x 32 columns of `bits`-wide codes, read off the layout; raises KernelError
    (LB0412) for a layout whose bytes are not 16 rows x 4 neighbouring columns."""
    return tuple(step for i, width in enumerate(plane_bits(bits)) for step in _plane_steps(layout, i, width))


def _plane_steps(layout: Layout, plane: int, width: int) -> list[LutStep]:
    place, shift = (t.tolist() for t in layout.address(width, _ROWS, _COLUMNS))
    found: dict[tuple[int, int, int], dict[int, int]] = {}
    for row, column in product(range(_ROWS), range(_COLUMNS)):
        vector, byte = divmod(place[row][column], _BYTE)
        half, bit = divmod(shift[row][column], 4)
        table = byte - 4 * row
        if not 0 <= table < 4 or found.setdefault((vector, half, table), {}).setdefault(bit, column) != column:
            raise KernelError("LB0412", f"nibbles of layout {layout} have no tables in common")
    steps = []
    for vector, half, table in sorted(found):
        columns = tuple(column for _, column in sorted(found[vector, half, 0].items()))
        if tuple(column - table for _, column in sorted(found[vector, half, table].items())) != columns:
            raise KernelError("LB0412", f"tables of layout {layout} are not of neighbouring columns")
        if not table:
            steps.append(LutStep(plane, vector, half, columns))
    return steps


def centre(width: int) -> int:
    """What is taken off the codes of a plane, so that sums of 4 products have magnitudes of 4 x 128 at most."""
    return width - 1


def factors(width: int) -> tuple[tuple[int, ...], ...]:
    """By code of a nibble, low bits first: what its activation is multiplied with in each of the 16 entries."""
    codes = range(4 // width)
    return tuple(tuple((n >> width * i) % 2**width - centre(width) for n in range(16)) for i in codes)


def blocks_per_sum(width: int) -> int:
    """Blocks whose lookups are added up as bytes: a block takes 4 a bit, two tables of a vector at a time."""
    return _LOOKUPS // (4 * width)


def code_step(levels: IntegerLevels) -> int:
    """The power of two that the bytes of `levels` are multiples of their codes by, or 0."""
    (first, *others), step = levels.digits, levels.digits[0][1]
    even = not others and first == tuple(step * code for code in range(len(first)))
    return step if even and step & (step - 1) == 0 else 0


def lut_problem(spec: KernelSpec) -> str | None:
    """Why sums of a spec's products cannot be looked up, or None."""
    levels = spec.integer_levels
    if not spec.limbs or spec.vector or levels is None:
        return "tables are of sums of integer products"
    if spec.fmt.element.window > 1:
        return "tables are of codes, not of states"
    if spec.layout_.whole:
        return "tables are for codes in planes"
    if max(plane_bits(spec.fmt.bits)) > WIDEST:
        return f"tables are for planes of up to {WIDEST} bits, and {spec.format} has wider ones"
    if spec.parts > 1:
        return f"sums of {32 // spec.parts} columns end before bytes of tables are full"
    return None if code_step(levels) else f"the integers of {spec.format} are no multiples of its codes"
