"""`KernelSpec`: what a kernel computes, free of any backend. Its canonical JSON is the tuning key."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from lowbit.codegen.rounded import ROUNDED, RoundedRows, unroundable, unstored
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import Layout
from lowbit.quantizers.formats import (
    K_ALIGN,
    SCALE_DTYPES,
    ActivationFormat,
    Format,
    IntegerLevels,
    VectorFormat,
    WeightFormat,
    exact_integers,
    parse_activation,
    parse_format,
)
from lowbit.quantizers.qtensor import padded_columns, padded_group
from lowbit.quantizers.vqtensor import byte_rows, has_scale

__all__ = ["COMPUTE", "DTYPES", "EPILOGUES", "Compute", "KernelSpec", "rounded_products"]

Compute = Literal["float", "int16", "int8"]
COMPUTE = ("float", "int16", "int8")
DTYPES = ("f32", "bf16", "f16")
EPILOGUES = ("bias", "silu_mul", "residual")
CHUNK_BLOCKS = 4  # columns that share an activation scale: at most 4 x 32


def rounded_products(fmt: WeightFormat, k: int, layout: Layout, rounding: ActivationFormat) -> Compute:
    """How products with activations in `rounding` are formed: `int8` where both sides are integers, else `float`.

    Layouts of words are read by GPU kernels, whose integer products are of plain codes in whole blocks.
    """
    if not rounding.integer or exact_integers(fmt) is None:
        return "float"
    if isinstance(fmt, VectorFormat):
        return "int8"
    assert isinstance(fmt, Format)
    return "int8" if layout.container == 8 or (fmt.element.integer and padded_group(fmt, k) >= K_ALIGN) else "float"


def _vector_rounding_problem(fmt: VectorFormat, rounding: ActivationFormat, k: int, compute: Compute) -> str | None:
    """Why activations of a vector format cannot be rounded to `rounding`, or None: its kernels multiply bytes of
    codebooks with integers that have one scale per token."""
    if not fmt.scaled:
        return f"products are of integers, which {fmt.table} codebooks are not"
    if not rounding.integer or compute != "int8":
        return f"products are of integers, not of {rounding.element.name} as {compute}"
    if fmt.norm == "col":
        return "norms of columns come before the rounding"
    if rounding.static or rounding.wide or rounding.groups(k) > 1:
        return "there is one scale per token, found at run time"
    return None


@dataclass(frozen=True)
class KernelSpec:
    """y = epilogue(x @ dequantize(w).T) for one (possibly fused) linear layer.

    segments: output rows of each sibling matrix. compute: how products are formed. `float`: weights are decoded to
    float32 and multiplied as such. `int8`: activations are rounded to int8, one scale per token and chunk, products
    are exact int32 sums. `int16`: the same with two int8 digits per activation (16 bits, error about 2**-16 of the
    chunk's largest value), which stands for "A16" on machines whose fast path is an int8 dot product (bfloat16
    activations may be multiplied as they are, where a machine does that as fast); of vectors along
    the input, tables of sums of products, rounded to 16 bits.
    epilogue: in order, from `bias`, `silu_mul` (two equal segments in, one out), `residual`.
    norm_eps: x goes through a root-mean-square norm first, with this epsilon (0: through none) and with the operand
    `norm_weight`.
    rotate: what happens to x then: blocks of this many columns are rotated (`quantizers.hadamard.rotate`), 0 for none.
    activation: the text of an ActivationFormat that x, in the weight's stored order of columns, is rounded to: part of
    what the kernel means, where the rounding of `int8` and `int16` alone only is how it computes. Integer formats then
    are one int8 digit with `int8` products, and numbers with `float` ones.
    invariant: a token's result must not depend, to the bit, on how many other tokens a call has; then one schedule runs
    all of them.
    x_dtype `rounded`: x is what another kernel has rounded to `activation`, the bytes of `codegen.rounded.RoundedRows`.
    out_activation: the text of an ActivationFormat that the output, as numbers in out_dtype, is rounded to: then the
    kernel writes such rows. Static scales are the operand `output_scale`.
    """

    segments: tuple[int, ...]
    k: int
    format: str
    layout: str
    compute: Compute
    x_dtype: str = "f32"
    out_dtype: str = "f32"
    epilogue: tuple[str, ...] = ()
    activation: str = ""
    rotate: int = 0
    norm_eps: float = 0.0
    invariant: bool = False
    out_activation: str = ""

    def __post_init__(self) -> None:
        known = self.x_dtype in (*DTYPES, ROUNDED) and self.out_dtype in DTYPES
        if self.compute not in COMPUTE or not known:
            raise KernelError("LB0401", f"no such kernel: {self.compute} {self.x_dtype} -> {self.out_dtype}")
        words = self.table_sums and self.compute == "int16"
        if self.compute != "float" and self.integer_levels is None and not words:
            raise KernelError("LB0402", f"{self.format} cannot be multiplied as integers")
        if any(e not in EPILOGUES for e in self.epilogue):
            raise KernelError("LB0403", f"unknown epilogue in {self.epilogue}")
        if "silu_mul" in self.epilogue and (len(self.segments) != 2 or len(set(self.segments)) != 1):
            raise KernelError("LB0404", f"silu_mul needs two equal segments, not {self.segments}")
        if self.compute != "float" and self.rounding and (self.compute != "int8" or not self.rounding.integer):
            raise KernelError(
                "LB0416",
                f"activations in {self.activation} have no {self.compute} products",
                hint="use int8 products for integers of up to 8 bits, float products for the rest",
            )
        if self.norm_eps < 0 or (self.norm_eps and self.vector):
            raise KernelError("LB0401", f"no kernel of {self.format} weights has a norm of epsilon {self.norm_eps}")
        if self.vector and (why := self.rounding_problem):
            text = f"activations of {self.format} weights are not rounded to {self.activation}: {why}"
            raise KernelError("LB0416", text)
        if self.reads_rows and (why := self._unread()):
            raise KernelError("LB0422", f"activations of {self.format} weights cannot arrive rounded: {why}")
        if self.out_rounding and (why := self._unwritten()):
            text = f"outputs are not rounded to {self.out_activation} where they are made: {why}"
            raise KernelError("LB0423", text, hint="leave it to the layer that reads them")

    def _unread(self) -> str | None:
        """Why x cannot be rows of bytes, or None."""
        if self.rounding is None:
            return "their format is not known"
        if self.rotate or self.norm_eps:
            return f"they are {'rotated' if self.rotate else 'normalised'} before they are rounded"
        if "columns" in self.operands:
            return "their groups are of columns in the weight's own order"
        if self.terms > 1:
            return "weights are sums, which round the activations of all terms at once"
        return unstored(self.rounding)

    def _unwritten(self) -> str | None:
        """Why outputs cannot be rows of bytes, or None."""
        assert self.out_rounding is not None
        if len(self.segments) > 1 and "silu_mul" not in self.epilogue:
            return f"{len(self.segments)} matrices have an output each"
        return unroundable(self.out_rounding, self.n_out)

    @cached_property
    def weight_format(self) -> WeightFormat:
        """The weight format, parsed."""
        return parse_format(self.format)

    @property
    def fmt(self) -> Format:
        """The weight format of a kernel whose weights have one code each."""
        assert isinstance(self.weight_format, Format), self.format
        return self.weight_format

    @property
    def vector(self) -> VectorFormat | None:
        """The weight format when one index stands for several weights, else None."""
        return self.weight_format if isinstance(self.weight_format, VectorFormat) else None

    @cached_property
    def integer_levels(self) -> IntegerLevels | None:
        """The integers that stand for the codes, or None for formats whose products are of floats only."""
        return exact_integers(self.weight_format)

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the weight's tensors, in the order in which the operator passes them (see `PackedWeight`)."""
        if (v := self.vector) is None:
            planes = tuple(f"plane{i}" for i in range(len(self.layout_.widths(self.fmt.bits))))
            sides = ["zero"] * self.fmt.zero + ["offset"] * self.fmt.offset + ["tensor_scale"] * self.fmt.tensor
            sides += ["channel_scale"] * self.fmt.channel + ["columns"] * self.fmt.ordered
            sides += ["input_scale"] * (self.rounding is not None and self.rounding.static)
            sides += ["norm_weight"] * bool(self.norm_eps)
            sides += ["output_scale"] * (self.out_rounding is not None and self.out_rounding.static)
            return (*planes, "scale", *sides)
        books = ["", *(["residual_"] if v.residual else []), *(["outlier_"] if v.outliers else [])]
        parts = []
        for book in books:
            scale = ["book_scale"] if v.scaled and has_scale(f"{book}book") else []
            parts += [f"{book}{kind}" for kind in ("index", "book", *scale)]
        parts += ["columns"] if v.ordered else []
        parts += ["norm_scale", "norm_bias"] if v.norm != "none" else []
        return (*parts, *["output_scale"] * (self.out_rounding is not None and self.out_rounding.static))

    @cached_property
    def rounding(self) -> ActivationFormat | None:
        """What x is rounded to, parsed."""
        return parse_activation(self.activation) if self.activation else None

    @cached_property
    def out_rounding(self) -> ActivationFormat | None:
        """What the output is rounded to, parsed."""
        return parse_activation(self.out_activation) if self.out_activation else None

    @property
    def reads_rows(self) -> bool:
        """Whether x is what another kernel has rounded."""
        return self.x_dtype == ROUNDED

    @cached_property
    def x_rows(self) -> RoundedRows:
        """The rows that x is, where it `reads_rows`."""
        assert self.reads_rows
        assert self.rounding is not None
        return RoundedRows(self.rounding, self.k)

    @cached_property
    def out_rows(self) -> RoundedRows | None:
        """The rows that the output is, or None where it is numbers."""
        return RoundedRows(self.out_rounding, self.n_out) if self.out_rounding else None

    @cached_property
    def uses_rows(self) -> bool:
        """Whether x or the output is such rows."""
        return self.reads_rows or bool(self.out_activation)

    @property
    def x_width(self) -> int:
        """Elements of a row of x as it arrives."""
        return self.x_rows.row_bytes if self.reads_rows else self.k

    @property
    def out_width(self) -> int:
        """Elements of a row of the output as it is written."""
        return self.out_rows.row_bytes if self.out_rows else self.n_out

    def typed(self, dtype: str) -> KernelSpec:
        """This kernel for activations and outputs of `dtype`; activations that are rounded stay what they are."""
        return replace(self, x_dtype=ROUNDED if self.reads_rows else dtype, out_dtype=dtype)

    @cached_property
    def layout_(self) -> Layout:
        """The packed layout, parsed."""
        return Layout.parse(self.layout)

    @property
    def table_sums(self) -> bool:
        """Whether sums of products can be looked up by whole indices (`VectorFormat.table_sums`)."""
        return self.vector is not None and self.vector.table_sums

    @property
    def limbs(self) -> int:
        """int8 digits per activation; 0 for products of floats, and where sums of products are looked up."""
        return 0 if self.table_sums else {"float": 0, "int8": 1, "int16": 2}[self.compute]

    @property
    def n_out(self) -> int:
        """Columns of the output."""
        return self.segments[0] if "silu_mul" in self.epilogue else sum(self.segments)

    @property
    def rows(self) -> int:
        """Packed rows (of codes, or of vectors' indices): every segment padded to the layout's row tile."""
        tile, vector = self.layout_.row_tile, self.vector
        return sum(math.ceil((vector.vectors(n) if vector else n) / tile) * tile for n in self.segments)

    @property
    def joins_by_rows(self) -> bool:
        """Whether operands of matrices one below the other are those of each, one behind the other: in layouts of row
        panels, where no operand belongs to all rows."""
        rows = all(o.startswith("plane") or o in ("scale", "zero", "offset") for o in self.operands)
        return rows and self.layout_.container == 8

    @property
    def blocks(self) -> int:
        """32-column blocks of the packed matrix."""
        return padded_columns(self.fmt, self.k, self.layout_.block) // K_ALIGN

    @property
    def group(self) -> int:
        """Columns of one scale group in the unpacked matrix."""
        return min(self.fmt.granularity.group_size(self.k), self.k)

    @property
    def group_blocks(self) -> int:
        """32-column blocks of one full scale group (the last group may have fewer), or 1 where blocks have `parts`."""
        return padded_group(self.fmt, self.k) // K_ALIGN or 1

    @property
    def parts(self) -> int:
        """Scale groups of one block: more than 1 where groups are smaller than blocks."""
        return max(1, K_ALIGN // padded_group(self.fmt, self.k))

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.fmt.granularity.groups(self.k) * self.terms

    @property
    def terms(self) -> int:
        """Numbers that a weight is the sum of: so many groups one behind the other, whole ones, meet the same
        activations."""
        return self.weight_format.terms if isinstance(self.weight_format, Format) else 1

    @property
    def chunk_blocks(self) -> int:
        """Blocks that share one activation scale: the largest divisor of `group_blocks` up to 4 with sums that fit.

        Chunks are whole groups or parts of one, except that one block is the least; the last chunk of the matrix may
        be shorter. Groups of activations are whole chunks too.
        """
        levels, most = self.integer_levels, CHUNK_BLOCKS
        if self.limbs and levels is not None:
            column = levels.largest * (127, 127 * 257)[self.limbs - 1]
            most = min(most, (2**31 - 1) // (column * K_ALIGN))
        spans = (self.group_blocks, self.span_blocks, self.lead_blocks)
        return next(c for c in range(most, 0, -1) if all(span % c == 0 for span in spans))

    @cached_property
    def span_blocks(self) -> int:
        """32-column blocks of one full group of activations with `int8` products, 0 where all columns are one group."""
        rounding = self.rounding
        if rounding is None or self.compute != "int8" or self.rounding_problem or rounding.groups(self.k) == 1:
            return 0
        if rounding.lead:
            return 0
        size = rounding.group_size(self.k)
        return size // K_ALIGN if self._dense else size // self.group * self.group_blocks

    @property
    def lead_blocks(self) -> int:
        """32-column blocks of activations that have one scale of their own, before the others' one; mostly 0."""
        rounding = self.rounding
        return rounding.lead // K_ALIGN if rounding is not None and self.compute == "int8" else 0

    @cached_property
    def double_chunks(self) -> int:
        """Leading chunks whose activations are two int8 digits, each multiplied in a round of its own."""
        rounding = self.rounding
        if rounding is None or self.compute != "int8" or rounding.wide_bits == 8 or self.rounding_problem:
            return 0
        blocks = self.lead_blocks or (self.span_blocks or self.blocks) * bool(rounding.wide)
        blocks *= 1 if rounding.lead else rounding.wide
        return min(math.ceil(blocks / self.chunk_blocks), self.chunks)

    @cached_property
    def span_chunks(self) -> int:
        """Chunks that share an activation scale: group of chunk c = c // span_chunks, but for `lead_blocks`."""
        if self.rounding is None:
            return 1
        if self.vector:
            return 2**31 - 1  # all of them, whatever a kernel's chunks are
        return self.span_blocks // self.chunk_blocks or self.chunks

    @cached_property
    def rounding_problem(self) -> str | None:
        """Why `int8` products cannot have the groups of `activation` beside those of the weight, or None."""
        if self.rounding is not None and self.vector:
            return _vector_rounding_problem(self.vector, self.rounding, self.k, self.compute)
        if self.rounding is None or self.compute != "int8":
            return None
        if self.terms > 1 and (self.rounding.groups(self.k) > 1 or self.rounding.wide or self.rounding.static):
            return "weights that are sums take activations with one scale per token, found at run time"
        if self.rounding.wide and self.rounding.wide_bits > 8 and self.parts > 1:
            return f"activations of {self.rounding.wide_bits} bits need groups of {K_ALIGN} weights or more"
        if self.rounding.lead and not self._dense:
            return f"{self.rounding.lead} leading columns do not consist of whole groups of {self.group} weights"
        if self.rounding.groups(self.k) == 1 or self.rounding.lead:
            return None
        size = self.rounding.group_size(self.k)
        if self._dense and size % K_ALIGN:
            return f"groups of {size} activations are not a multiple of {K_ALIGN} columns"
        if not self._dense and size % self.group:
            return f"groups of {size} activations do not consist of whole groups of {self.group} weights"
        return None

    @property
    def _dense(self) -> bool:
        """True when groups are packed without padding between them: packed columns stand where columns do."""
        return self.groups == 1 or self.parts > 1 or self.group % K_ALIGN == 0

    @property
    def chunks(self) -> int:
        """Chunks of a row: activation scales per token, unless an `activation` format says how many there are."""
        return math.ceil(self.blocks / self.chunk_blocks)

    @property
    def scale_dtype(self) -> str:
        """Type of packed scales or codebooks: `f16`, `f32`, or in layouts of bytes also `e8m0` and `e4m3`; `u8` for
        codebooks of bytes where kernels read them as such."""
        fmt = self.weight_format
        if not isinstance(fmt, Format):
            if self.vector and self.vector.scaled:
                return "u8" if byte_rows(self.layout_) else "f32"
            return "f16" if fmt.scale_dtype == torch.float16 else "f32"
        packed = fmt.packed_scale_dtype(self.layout_.side_container)
        return next(name for name, dtype in SCALE_DTYPES.items() if dtype == packed)

    def key(self) -> str:
        """Canonical JSON: equal specs, equal text. What is not rounded, rotated, normalised ... does not say so."""
        silent = ("activation", "rotate", "norm_eps", "invariant", "out_activation")
        values = {name: value for name, value in asdict(self).items() if value or name not in silent}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """16 hex digits that name the kernel in generated source: never a string from a checkpoint."""
        return hashlib.sha256(self.key().encode()).hexdigest()[:16]
