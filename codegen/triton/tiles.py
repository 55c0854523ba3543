"""Statements that load one K step of packed words, side values and activations, and decode the weights.

A step covers `step_blocks` blocks of 32 columns. Every plane of `w` bits has `w` words a block, so one load per word
gives a [rows, blocks] tile that is coalesced over rows, and each of the 32 columns of a block sits at a constant
shift of one of these tiles: words are loaded once and decoded with immediate shifts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from lowbit.codegen.decode import decode_program, extract_program, trellis_program
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.table import Printer
from lowbit.compiler.ir.layout import plane_bits
from lowbit.quantizers.formats import K_ALIGN

__all__ = ["Tiles", "tiles_of"]


@dataclass(frozen=True)
class Tiles:
    """The tile arithmetic of one (spec, schedule), and printers of loads and decodes.

    Sources index rows with `n_<a>` / `n_<a>_ok` (a = accumulator: 1 is the `up` half of a gated MLP), blocks with
    `block` / `block_ok`; loop variable `step`.
    """

    spec: KernelSpec
    schedule: Schedule

    @cached_property
    def integer(self) -> bool:
        """Products of integers (activations rounded to int8) instead of floats."""
        return self.spec.compute == "int8"

    @cached_property
    def whole(self) -> bool:
        """Integer products whose sums run over all columns, because no scale changes on the way."""
        spec = self.spec
        one = spec.rounding is not None and spec.rounding.groups(spec.k) == 1 and spec.groups == 1
        return self.integer and one and spec.blocks * K_ALIGN * 2**14 < 2**31

    @cached_property
    def needs_sums(self) -> bool:
        """Whether sums of activations are multiplied with something."""
        fmt = self.spec.fmt
        return fmt.zero or fmt.offset or fmt.element.bias != 2 ** (fmt.bits - 1)

    @cached_property
    def prepared_columns(self) -> int:
        """Columns that one program of the preparing kernel of float products takes."""
        return self.spec.rounding.group_size(self.spec.k) if self.spec.rounding else min(self.spec.k, 1024)

    @cached_property
    def prepared_groups(self) -> int:
        """Programs of the preparing kernel per token."""
        if self.integer:
            return -(-self.steps // min(self.spec.span_chunks, self.steps))
        return -(-self.spec.k // self.prepared_columns)

    @cached_property
    def stride_blocks(self) -> int:
        """Blocks one step covers: for integer products one activation chunk."""
        return self.spec.chunk_blocks if self.integer else self.schedule.tile_k // K_ALIGN

    @cached_property
    def step_blocks(self) -> int:
        """`stride_blocks` rounded up to a power of two: the tile's width in blocks."""
        return 1 << (self.stride_blocks - 1).bit_length()

    @cached_property
    def step_columns(self) -> int:
        """Columns of a step's tile."""
        return self.step_blocks * K_ALIGN

    @cached_property
    def steps(self) -> int:
        """Steps that cover the packed matrix."""
        return -(-self.spec.blocks // self.stride_blocks)

    @cached_property
    def accumulators(self) -> tuple[int, ...]:
        """Output tiles held at once: two for a gated MLP."""
        return (0, 1) if "silu_mul" in self.spec.epilogue else (0,)

    @property
    def n_acc(self) -> int:
        """Rows of the weight that one accumulator ranges over."""
        return self.spec.n_out

    @cached_property
    def n_tiles(self) -> int:
        """Tiles that cover the rows."""
        return -(-self.n_acc // self.schedule.tile_n)

    @cached_property
    def block_mask(self) -> bool:
        """Whether some step has blocks beyond its own or beyond the matrix."""
        return self.step_blocks != self.stride_blocks or self.spec.blocks % self.step_blocks != 0

    @cached_property
    def row_mask(self) -> bool:
        """Whether the last row tile is partial."""
        return self.n_acc % self.schedule.tile_n != 0

    @cached_property
    def one_group(self) -> bool:
        """Whether all blocks of a step share a scale."""
        whole = self.spec.group_blocks % self.stride_blocks == 0 and self.spec.parts == 1
        return self.spec.groups == 1 or whole

    @cached_property
    def scale_after(self) -> bool:
        """Whether scales multiply sums instead of weights; beside matrix instructions not where there are offsets,
        which would need sums of the activation tile."""
        wanted = bool(self.schedule.get("scale_after", 0))
        return wanted and self.one_group and not (self.spec.fmt.offset and not self.schedule.get("gemv", 0))

    @cached_property
    def offset_after(self) -> bool:
        """Whether offsets meet sums of activations instead of weights."""
        return self.scale_after and self.spec.fmt.offset

    @cached_property
    def words(self) -> tuple[tuple[int, int], ...]:
        """(plane, word of the block), in the order of loads."""
        return tuple((p, v) for p, width in enumerate(plane_bits(self.spec.fmt.bits)) for v in range(width))

    def _mask(self, a: int, block: bool, row: str = "[:, None]") -> str:
        parts = ([f"n_{a}_ok{row}"] if self.row_mask else []) + (["block_ok[None, :]"] if block else [])
        return f", mask={' & '.join(parts)}, other=0" if parts else ""

    def blocks(self) -> list[str]:
        """Block numbers of the current step."""
        out = [f"block = step * {self.stride_blocks} + tl.arange(0, {self.step_blocks})"]
        if self.block_mask:
            own = (
                f" & (tl.arange(0, {self.step_blocks}) < {self.stride_blocks})"
                if self.step_blocks != self.stride_blocks
                else ""
            )
            out.append(f"block_ok = (block < {self.spec.blocks}){own}")
        return out

    def load_words(self, a: int) -> list[str]:
        """Words of accumulator `a` as uint32 tiles `w<plane>_<word>`."""
        hint = ', eviction_policy="evict_first"' if self.schedule.get("evict_first", 0) else ""
        out, widths = [], plane_bits(self.spec.fmt.bits)
        for p, v in self.words:
            if v == 0:
                out.append(f"at{p} = block[None, :] * {widths[p] * self.spec.rows} + n_{a}[:, None]")
            where = f"at{p}" if v == 0 else f"at{p} + {v * self.spec.rows}"
            load = f"tl.load(w{p}_ptr + {where}{self._mask(a, self.block_mask)}{hint})"
            out.append(f"w{p}_{v} = {load}.to(tl.uint32, bitcast=True)")
        return out + (self._load_before(a) if self.spec.fmt.element.window > 1 else [])

    def _load_before(self, a: int) -> list[str]:
        """The word before each block's first one of every plane, `p<plane>`: 0 before a row's first block."""
        rows, guards = self.spec.rows, [f"n_{a}_ok[:, None]"] * self.row_mask + ["block_ok[None, :]"] * self.block_mask
        mask = " & ".join([*guards, "(block > 0)[None, :]"])
        return [
            f"p{p} = tl.load(w{p}_ptr + at{p} - {rows}, mask={mask}, other=0).to(tl.uint32, bitcast=True)"
            for p in range(len(plane_bits(self.spec.fmt.bits)))
        ]

    def load_sides(self, a: int) -> list[str]:
        """`scale`, `zero`, `offset` as float32 tiles [rows, 1], or [rows, blocks] where a step crosses groups; where
        blocks have several groups `scale_<part>` and so on."""
        spec = self.spec
        if spec.parts > 1:
            return [line for part in range(spec.parts) for line in self._load_part(a, part)]
        if self.one_group:
            group = "0" if spec.groups == 1 else f"step // {spec.group_blocks // self.stride_blocks}"
            where, mask = f"({group}) * {spec.rows} + n_{a}[:, None]", self._mask(a, block=False)
        else:
            where = f"(block // {spec.group_blocks})[None, :] * {spec.rows} + n_{a}[:, None]"
            mask = self._mask(a, self.block_mask)
        out = [f"scale = tl.load(scale_ptr + {where}{mask}).to(tl.float32)"]
        for name in ["zero"] * spec.fmt.zero + ["offset"] * spec.fmt.offset:
            out.append(f"{name} = tl.load({name}_ptr + {where}{mask}).to(tl.float32)")
        return out

    def _load_part(self, a: int, part: int) -> list[str]:
        """The side values of one part of every block. Parts after the last group read none: they are zero."""
        spec, out = self.spec, []
        group = f"block * {spec.parts} + {part}"
        guards = [f"n_{a}_ok[:, None]"] * self.row_mask + ["block_ok[None, :]"] * self.block_mask
        guards += [f"({group} < {spec.groups})[None, :]"] * (spec.groups % spec.parts != 0)
        mask = f", mask={' & '.join(guards)}, other=0" if guards else ""
        for name in self._sides:
            where = f"({group})[None, :] * {spec.rows} + n_{a}[:, None]"
            out.append(f"{name}_{part} = tl.load({name}_ptr + {where}{mask}).to(tl.float32)")
        return out

    @property
    def _sides(self) -> list[str]:
        return ["scale", *["zero"] * self.spec.fmt.zero, *["offset"] * self.spec.fmt.offset]

    def columns(self) -> list[str]:
        """`col` and, where needed, `col_ok`: columns of x that meet the step's padded columns."""
        spec = self.spec
        group, padded = spec.group, spec.group if spec.parts > 1 else spec.group_blocks * K_ALIGN
        lines = [f"col = step * {self.stride_blocks * K_ALIGN} + tl.arange(0, {self.step_columns})"]
        if spec.groups > 1 and group != padded:
            lines += [
                f"in_group = col % {padded}",
                f"col = col // {padded} * {group} + in_group",
                f"col_ok = (in_group < {group}) & (col < {spec.k})",
            ]
        elif self.steps * self.stride_blocks * K_ALIGN != spec.k:
            lines.append(f"col_ok = col < {spec.k}")
        if self.step_blocks != self.stride_blocks:
            own = f"tl.arange(0, {self.step_columns}) < {self.stride_blocks * K_ALIGN}"
            lines.append(f"col_ok = col_ok & ({own})" if "col_ok" in lines[-1] else f"col_ok = {own}")
        return lines

    @property
    def column_mask(self) -> bool:
        """Whether `columns` defines `col_ok`."""
        return any(line.startswith("col_ok") for line in self.columns())

    def word_args(self, column: int) -> dict[str, str]:
        """Arguments of the extraction program for a column (0..31) of every block."""
        args = {}
        for p, width in enumerate(plane_bits(self.spec.fmt.bits)):
            per = 32 // width
            args[f"w{p}"], args[f"s{p}"] = f"w{p}_{column // per}", str(column % per * width)
        return args

    def decode(self, printer: Printer, column: int) -> str:
        """Expression [rows, blocks] of one column of every block: float32, or the signed int32 code if `integer`."""
        if self.spec.fmt.element.window > 1:
            return self._decode_state(printer, column)
        args = self.word_args(column)
        if self.integer:
            code = printer.run(extract_program(*plane_bits(self.spec.fmt.bits)), args)
            return f"({code}.to(tl.int32, bitcast=True) - {2 ** (self.spec.fmt.bits - 1)})"
        if self.spec.parts > 1:
            part = column // (K_ALIGN // self.spec.parts)
            return printer.run(decode_program(self.spec.fmt), args | {s: f"{s}_{part}" for s in self._sides})
        args["scale"] = "1.0" if self.scale_after else "scale"
        if self.spec.fmt.zero:
            args["zero"] = "zero"
        if self.spec.fmt.offset:
            args["offset"] = "0.0" if self.offset_after else "offset"
        return printer.run(decode_program(self.spec.fmt), args)

    def _decode_state(self, printer: Printer, column: int) -> str:
        """The same of a trellis, whose state also has codes of the word before."""
        args, shifts = {"scale": "1.0" if self.scale_after else "scale"}, []
        for p, width in enumerate(plane_bits(self.spec.fmt.bits)):
            word, place = divmod(column, 32 // width)
            args |= {f"w{p}": f"w{p}_{word}", f"p{p}": f"w{p}_{word - 1}" if word else f"p{p}"}
            shifts.append(place * width)
        return printer.run(trellis_program(self.spec.fmt, tuple(shifts)), args)


@lru_cache(maxsize=4096)
def tiles_of(spec: KernelSpec, schedule: Schedule) -> Tiles:
    """`Tiles(spec, schedule)`, remembered: choosing a schedule asks for thousands, several times each."""
    return Tiles(spec, schedule)
