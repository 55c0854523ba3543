"""What a kernel is made of: sizes, parameters, where a block's codes lie, and which panels one unit of work has.

A *panel* is 16 rows, the lanes of a vector of 32-bit words: in the layouts that are read (`READS`) the rows of a panel
lie four bytes apart, so a word of each holds codes of that row alone, at the same places in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from lowbit.codegen.decode import scalar_program
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tvm.printing import LANES, tables_of
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS, Layout
from lowbit.compiler.ir.program import Program
from lowbit.quantizers.formats import K_ALIGN

__all__ = ["MOST_TOKENS", "READS", "SIDE_TYPES", "STORED", "CodePart", "Plan", "code_parts", "plan_of"]

READS = tuple(LAYOUTS[name] for name in ("panel16", "whole16", "signs16"))
"""Layouts of such panels, those of the C++ kernels."""

MOST_TOKENS = 512
"""Tokens of one call of the generated function; the launcher cuts longer ones, which bounds scratch memory."""

STORED = {"f32": "float32", "f16": "float16", "bf16": "uint16"}
"""Types of outputs and residuals as the kernel sees them: of bfloat16 the bits."""

SIDE_TYPES = {"f32": "float32", "f16": "float16", "e8m0": "uint8", "e4m3": "uint8"}
"""Types of packed scales as the kernel sees them."""

_VECTOR_BYTES = 4 * LANES


@dataclass(frozen=True)
class CodePart:
    """Neighbouring bits of the codes of one column: `width` bits from bit `shift` on of the words in vector `vector` of
    a block's part of plane `plane`."""

    plane: int
    vector: int
    shift: int
    width: int


@lru_cache(maxsize=64)
def code_parts(layout: Layout, bits: int) -> tuple[tuple[CodePart, ...], ...]:
    """Where the codes of every column of a block lie, low bits first, as `Layout.places` says.

    Raises KernelError (LB0450) for a layout whose rows are not words side by side.
    """
    columns: list[list[CodePart]] = [[] for _ in range(K_ALIGN)]
    for plane, width, index, shift in layout.places(bits, layout.row_tile, K_ALIGN):
        for column, parts in enumerate(columns):
            at, moved = index[:, column].tolist(), set(shift[:, column].tolist())
            if at != [at[0] + 4 * row for row in range(LANES)] or len(moved) != 1:
                raise KernelError("LB0450", f"rows of {layout} are not words side by side")
            vector, byte = divmod(at[0], _VECTOR_BYTES)
            parts.append(CodePart(plane, vector, 8 * byte + moved.pop(), width))
    return tuple(map(_joined, columns))


def _joined(parts: list[CodePart]) -> tuple[CodePart, ...]:
    """Parts that continue each other as one."""
    joined: list[CodePart] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last and (last.plane, last.vector, last.shift + last.width) == (part.plane, part.vector, part.shift):
            joined[-1] = CodePart(last.plane, last.vector, last.shift, last.width + part.width)
        else:
            joined.append(part)
    return tuple(joined)


@dataclass(frozen=True)
class Plan:
    """One (spec, schedule). spec: of a plain matrix (`codegen.sums.one_matrix`)."""

    spec: KernelSpec
    schedule: Schedule

    @property
    def buffered(self) -> bool:
        """Weights are decoded into memory and met by all tokens there, not in registers by a few."""
        return bool(self.schedule.get("buffered", 0))

    @cached_property
    def pairs(self) -> int:
        """Panels that an output takes: two for a gated MLP."""
        return 2 if "silu_mul" in self.spec.epilogue else 1

    @cached_property
    def side_by_side(self) -> int:
        """Panels of outputs in one unit of work."""
        return self.schedule.tile_n // LANES

    @property
    def panels(self) -> int:
        """Panels of weights in one unit of work."""
        return self.side_by_side * self.pairs

    @cached_property
    def output_panels(self) -> int:
        """Panels that the outputs take."""
        return self.spec.rows // LANES // self.pairs

    @cached_property
    def units(self) -> int:
        """Units of work: what threads share out."""
        return -(-self.output_panels // self.side_by_side)

    @cached_property
    def columns(self) -> int:
        """Columns of the packed matrix."""
        return self.spec.blocks * K_ALIGN

    @cached_property
    def chunk_blocks(self) -> int:
        """Blocks that are decoded before they are multiplied."""
        return min(self.schedule.tile_k // K_ALIGN, self.spec.blocks)

    @property
    def late(self) -> bool:
        """Scales meet sums of a group, not weights. Offsets would need sums of activations, and wait in registers."""
        return not self.buffered and not self.spec.fmt.offset

    @cached_property
    def parts(self) -> tuple[tuple[CodePart, ...], ...]:
        """Where the codes of a block's columns lie."""
        return code_parts(self.spec.layout_, self.spec.fmt.bits)

    @cached_property
    def regular(self) -> bool:
        """Whether every column is found by the same arithmetic, that of planes of `panel16`: neighbours in the bytes of
        a word, every fourth one in the same byte."""
        planes = [(part.plane, part.width) for part in self.parts[0]]

        def expected(column: int) -> tuple[CodePart, ...]:
            turns = [divmod(column // 4, 8 // width) for _, width in planes]
            shifts = [8 * (column % 4) + at * width for (_, at), (_, width) in zip(turns, planes, strict=True)]
            return tuple(
                CodePart(plane, vector, shift, width)
                for (plane, width), (vector, _), shift in zip(planes, turns, shifts, strict=True)
            )

        return all(expected(column) == parts for column, parts in enumerate(self.parts))

    @cached_property
    def vectors(self) -> tuple[tuple[int, int], ...]:
        """(plane, vector) of everything a block is read by, in order."""
        return tuple(sorted({(part.plane, part.vector) for parts in self.parts for part in parts}))

    @cached_property
    def plane_vectors(self) -> tuple[int, ...]:
        """Vectors that a block has in every plane."""
        return self.spec.layout_.widths(self.spec.fmt.bits)

    def program(self, column: int) -> Program:
        """The decode program of a block's column."""
        return scalar_program(self.spec.fmt, tuple(part.width for part in self.parts[column]))

    @cached_property
    def tables(self) -> tuple[tuple[float, ...], ...]:
        """Tables that the decode programs read from memory; the same for all columns."""
        return tables_of(self.program(0))

    @cached_property
    def params(self) -> dict[str, str]:
        """Name -> element type of the generated function's pointers, in order."""
        fmt, spec = self.spec.fmt, self.spec
        side = SIDE_TYPES[spec.scale_dtype]
        found = {"x": "float32"} | {f"plane{i}": "uint32" for i in range(len(self.plane_vectors))} | {"scale": side}
        found |= {"zero": "uint8"} if fmt.zero else {}
        found |= {"offset": side} if fmt.offset else {}
        found |= {"tensor_scale": "float32"} if self.whole_scales else {}
        found |= {f"table{i}": "float32" for i in range(len(self.tables))}
        found |= {"bias": "float32"} if "bias" in spec.epilogue else {}
        found |= {"residual": STORED[spec.out_dtype]} if "residual" in spec.epilogue else {}
        found["out"] = STORED[spec.out_dtype]
        return found | ({"decoded": "float32", "sums": "float32"} if self.buffered else {})

    @property
    def whole_scales(self) -> bool:
        """Whether the kernel multiplies scales of groups by that of their matrix: wider ones have it in them."""
        return self.spec.fmt.tensor and SIDE_TYPES[self.spec.scale_dtype] == "uint8"

    def padded_tokens(self, m: int) -> int:
        """Tokens that `x` has rows for when `m` are asked for."""
        return -(-m // self.schedule.tile_m) * self.schedule.tile_m

    def scratch(self, m: int) -> tuple[int, int]:
        """float32 numbers of `decoded` and `sums` that one thread needs for `m` tokens."""
        return self.chunk_blocks * K_ALIGN * LANES, self.panels * self.padded_tokens(m) * LANES


@lru_cache(maxsize=4096)
def plan_of(spec: KernelSpec, schedule: Schedule) -> Plan:
    """`Plan(spec, schedule)`, remembered."""
    return Plan(spec, schedule)
