"""Where each code's bits lie: an invertible map from (row n, column k, bit) to (plane, address, bit).

A layout is a mixed-radix rearrangement. Rows and columns are split into digits, most significant first; `memory` lists
the digits from the slowest to the fastest varying address; the digit `packed` is not an address but the position
inside a container (a byte or a 32-bit word). Codes wider than a power of two are split into *planes* of 4, 2, 1 (or 8)
bits, low bits in the first plane, so that no code ever straddles two containers.

Text form, which round-trips: `n=p.r16 k=b.v.s.j4 mem=p.b.v.r.j pack=s/8 block=32`. A digit without a number takes
what is left: the first digit of a dimension its number of tiles, the packed digit `container / plane bits`, and one
more column digit whatever completes `block` columns.

The position inside a container may have several digits, most significant first (`pack=e.c/32`). When all of them have
numbers, the fastest digits of `mem` complete it: as many as a plane's width leaves room for. An optional field,
`side=g.w.h`, lists the row digits of a tile in the order in which side values lie in memory.

With the optional last field `whole=4` there is one plane, in which most codes are not split: as many codes of a
container of one-bit planes as there are bits in it lie in `bits` containers, each of which holds as many whole codes as
it has room for, from its lowest bit on; where that is one, its bits above the lowest 4 fill the container from its top
down. Bits that are left over, container after container, hold further codes as soon as there are enough of them. A mask
takes most codes out of their containers then, where codes of several planes have to be put together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.parts import Part, place, plane_bits, plane_parts, whole_parts

__all__ = ["CANONICAL_PLANES", "LAYOUTS", "Layout", "plane_bits"]


_WORDS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
CANONICAL_PLANES = {bits: plane_bits(bits) for bits in range(1, 9)}


@dataclass(frozen=True)
class Layout:
    """One packed layout; see the module's docstring for the fields' meaning."""

    n: tuple[tuple[str, int], ...]
    k: tuple[tuple[str, int], ...]
    memory: tuple[str, ...]
    packed: tuple[str, ...]
    container: int
    block: int
    side: tuple[str, ...] = ()
    whole: int = 0

    def __post_init__(self) -> None:
        names = [d for d, _ in (*self.n, *self.k)]
        if sorted(names) != sorted((*self.memory, *self.packed)):
            raise FormatError("LB0202", f"layout digits {names} and memory order {self.memory} do not match")
        if self.side and sorted(self.side) != sorted(d for d, _ in self.n[1:]):
            raise FormatError("LB0202", f"side values of layout digits {names} cannot be ordered {self.side}")
        if self.container not in _WORDS:
            raise FormatError("LB0203", f"container must be 8, 16 or 32 bits, not {self.container}")
        free = {d for d, size in self.k[1:] if not size}
        if self.whole and (len(self.packed) != 1 or self.packed[0] not in free or len(free) != 2):
            raise FormatError("LB0202", f"whole codes need one digit of positions and one of containers, not {self.k}")

    @staticmethod
    def parse(text: str) -> Layout:
        """The layout written as `text`; raises FormatError (LB0204) with the expected form."""
        form = r"n=(\S+) k=(\S+) mem=(\S+) pack=([\w.]+)/(\d+) block=(\d+)(?: side=(\S+))?(?: whole=(\d+))?"
        m = re.fullmatch(form, text.strip())
        if not m:
            raise FormatError(
                "LB0204",
                f"cannot read layout {text!r}",
                hint="write 'n=p.r16 k=b.s mem=p.b.r pack=s/8 block=32'",
            )
        order, packed, side = (tuple(part.split(".")) if part else () for part in (m[3], m[4], m[7]))
        container, block, whole = (int(m[i] or 0) for i in (5, 6, 8))
        return Layout(_parse_digits(m[1]), _parse_digits(m[2]), order, packed, container, block, side, whole)

    def __str__(self) -> str:
        return (
            f"n={_digits_text(self.n)} k={_digits_text(self.k)} mem={'.'.join(self.memory)} "
            f"pack={'.'.join(self.packed)}/{self.container} block={self.block}"
            + (f" side={'.'.join(self.side)}" if self.side else "")
            + (f" whole={self.whole}" if self.whole else "")
        )

    @cached_property
    def row_tile(self) -> int:
        """Rows are padded to a multiple of this."""
        return math.prod(size for _, size in self.n if size)

    @property
    def side_container(self) -> int:
        """The narrowest type of side values, in bits: bytes where containers are, or where they have an own order."""
        return 8 if self.side else self.container

    @property
    def word_dtype(self) -> torch.dtype:
        """dtype of a packed plane."""
        return _WORDS[self.container]

    def with_container(self, bits: int) -> Layout:
        """The same order with containers of `bits` bits."""
        return replace(self, container=bits)

    def widths(self, bits: int) -> tuple[int, ...]:
        """Bits that each stored plane has of a `bits`-wide code."""
        return (bits,) if self.whole else plane_bits(bits)

    def parts(self, bits: int) -> tuple[tuple[Part, ...], ...]:
        """Where a code is, low bits first, for every position that a container of one-bit planes has."""
        return whole_parts(bits, self.container, self.whole) if self.whole else plane_parts(bits, self.container)

    def plane_sizes(self, bits: int, rows: int, cols: int) -> dict[str, int]:
        """Size of every digit for a plane of `bits` bits over `rows` x `cols` padded codes; of a plane of whole codes
        those of one bit, but of containers there are `bits`."""
        if self.whole:
            return self._plane_sizes(1, rows, cols) | {self._containers: bits}
        return self._plane_sizes(bits, rows, cols)

    @property
    def _containers(self) -> str:
        """The digit of the containers that whole codes share."""
        return next(d for d, size in self.k[1:] if not size and d not in self.packed)

    def _plane_sizes(self, bits: int, rows: int, cols: int) -> dict[str, int]:
        per = self.container // bits
        sizes = dict((*self.n, *self.k))
        for name in self.packed:
            if not sizes[name]:
                sizes[name] = per // math.prod(sizes[other] for other in self.packed if other != name)
        sizes[self.n[0][0]] = rows // self.row_tile
        sizes[self.k[0][0]] = cols // self.block
        known = math.prod(sizes[name] for name, _ in self.k[1:] if sizes[name])
        for name, size in self.k[1:]:
            if not size and name not in self.packed:
                if self.block % known:
                    raise FormatError("LB0205", f"block {self.block} does not hold {per} codes a container: {self}")
                sizes[name] = self.block // known
        return sizes

    def order(self, bits: int, sizes: dict[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(digits of the address, digits of the position in a container), slowest first, of a `bits`-wide plane."""
        memory, slots, per = list(self.memory), list(self.packed), self.container // (1 if self.whole else bits)
        while memory and math.prod(sizes[d] for d in slots) < per:
            slots.insert(len(self.packed), memory.pop())
        if math.prod(sizes[d] for d in slots) != per:
            raise FormatError("LB0205", f"the digits {slots} are not {per} codes a container: {self}")
        return tuple(memory), tuple(slots)

    def pack_plane(self, codes: torch.Tensor, bits: int) -> torch.Tensor:
        """Pack `codes` ([rows, cols], padded, values below 2**bits) into a 1-D tensor of containers."""
        sizes, digits, memory, slots = self._digits(codes.shape, bits)
        grid = codes.reshape([sizes[d] for d in digits]).permute([digits.index(d) for d in (*memory, *slots)])
        grid = grid.reshape(-1, self.container // bits)
        words = torch.zeros(grid.shape[0], dtype=self.word_dtype)
        for slot in range(grid.shape[1]):
            words |= grid[:, slot].to(self.word_dtype) << (slot * bits)
        return words

    def unpack_plane(self, words: torch.Tensor, bits: int, rows: int, cols: int) -> torch.Tensor:
        """Inverse of `pack_plane`: codes [rows, cols] of one plane, uint8 up to 8 bits, else int32."""
        sizes, digits, memory, slots = self._digits(torch.Size((rows, cols)), bits)
        wide = words if bits <= 8 else words.to(torch.int32)  # a mask of all bits of a signed word would keep its sign
        shifts = torch.arange(self.container // bits, dtype=wide.dtype, device=words.device) * bits
        grid: torch.Tensor = ((wide[:, None] >> shifts) & (2**bits - 1)).to(torch.uint8 if bits <= 8 else torch.int32)
        source = (*memory, *slots)
        grid = grid.reshape([sizes[d] for d in source]).permute([source.index(d) for d in digits])
        return grid.reshape(rows, cols)

    def address(self, bits: int, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the `bits`-wide part of each code lies in its plane: container index and shift, int64 [rows, cols]."""
        sizes, digits, memory, slots = self._digits(torch.Size((rows, cols)), bits)
        per, source = self.container // bits, (*memory, *slots)
        at = torch.arange(rows * cols).reshape([sizes[d] for d in source])
        at = at.permute([source.index(d) for d in digits]).reshape(rows, cols)
        return at // per, at % per * bits

    def places(self, bits: int, rows: int, cols: int) -> list[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Where all bits of `bits`-wide codes lie, low ones first: (plane, how many, container index, shift), the last
        two int64 [rows, cols]."""
        if not self.whole:
            return [(i, w, *self.address(w, rows, cols)) for i, w in enumerate(plane_bits(bits))]
        sizes, outer, inner = self._whole_digits(torch.Size((rows, cols)), bits)
        at = torch.arange(rows * cols * bits // self.container).reshape([sizes[d] for d in self.memory])
        at = at.movedim(self.memory.index(self._containers), -1)
        found = []
        for bit in range(bits):
            where = [place(parts, bit) for parts in self.parts(bits)]
            index = at[..., [container for container, _ in where]]
            shift = torch.tensor([shift for _, shift in where]).expand_as(index)
            index, shift = (t.permute([outer.index(d) for d in inner]).reshape(rows, cols) for t in (index, shift))
            found.append((0, 1, index, shift))
        return found

    def pack(self, codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
        """Pack `bits`-wide uint8 codes [rows, cols] (padded) into one tensor of containers per plane."""
        if self.whole:
            return [self._pack_whole(codes, bits)]
        planes, low = [], 0
        for width in plane_bits(bits):
            planes.append(self.pack_plane((codes >> low) & (2**width - 1), width))
            low += width
        return planes

    def unpack(self, planes: list[torch.Tensor], bits: int, rows: int, cols: int) -> torch.Tensor:
        """Inverse of `pack`: uint8 codes [rows, cols]."""
        if self.whole:
            self._check(torch.Size((rows, cols)))
            return self.whole_reader(bits, cols)(planes[0])
        codes, low = torch.zeros(rows, cols, dtype=torch.uint8, device=planes[0].device), 0
        for width, words in zip(plane_bits(bits), planes, strict=True):
            codes |= self.unpack_plane(words, width, rows, cols) << low
            low += width
        return codes

    def _pack_whole(self, codes: torch.Tensor, bits: int) -> torch.Tensor:
        sizes, outer, inner = self._whole_digits(codes.shape, bits)
        grid = codes.to(torch.uint8).reshape([sizes[d] for d in inner]).permute([inner.index(d) for d in outer])
        words = [torch.zeros(grid.shape[:-1], dtype=self.word_dtype, device=codes.device) for _ in range(bits)]
        for code, parts in enumerate(self.parts(bits)):
            low = 0
            for _, container, shift, width in parts:
                part = ((grid[..., code] >> low) & (2**width - 1)).to(self.word_dtype)
                words[container] |= part << shift
                low += width
        return torch.stack(words, self.memory.index(self._containers)).flatten()

    def whole_reader(self, bits: int, cols: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """A pure function of tensors alone: whole tiles of rows of a plane of whole codes, in any shape -> uint8 codes
        [rows, cols]."""
        sizes, outer, inner = self._whole_digits(torch.Size((self.row_tile, cols)), bits)
        grid = [-1 if d == self.n[0][0] else sizes[d] for d in self.memory]
        at, order, codes = self.memory.index(self._containers), [outer.index(d) for d in inner], self.parts(bits)

        def read(words: torch.Tensor) -> torch.Tensor:
            containers, found = words.reshape(grid).movedim(at, -1), []
            for parts in codes:
                code, low = torch.zeros_like(containers[..., 0], dtype=torch.uint8), 0
                for _, container, shift, width in parts:
                    part = (containers[..., container] >> shift) & (2**width - 1)
                    code = code | (part.to(torch.uint8) << low)
                    low += width
                found.append(code)
            return torch.stack(found, -1).permute(order).reshape(-1, cols)

        return read

    def _whole_digits(self, shape: torch.Size, bits: int) -> tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]:
        """Sizes of all digits; the digits of addresses, but for that of containers which whole codes share, and of
        positions; those of rows, then columns."""
        self._check(shape)
        sizes = self.plane_sizes(bits, *shape)
        outer = (*(d for d in self.memory if d != self._containers), *self.packed)
        return sizes, outer, tuple(d for d, _ in (*self.n, *self.k) if d != self._containers)

    def pack_side(self, values: torch.Tensor) -> torch.Tensor:
        """Lay per-row side values [rows, groups] (scales, zero points) beside the codes: row tile fastest.

        The result is [rows / row_tile, groups, row_tile]; with an untiled row dimension [groups, rows].
        """
        rows, groups = values.shape
        if self.row_tile == 1:
            return values.t().contiguous()
        tiled = values.reshape(rows // self.row_tile, self.row_tile, groups).transpose(1, 2)
        return (tiled[..., self.side_order] if self.side else tiled).contiguous()

    def unpack_side(self, packed: torch.Tensor) -> torch.Tensor:
        """Inverse of `pack_side`."""
        if self.row_tile == 1:
            return packed.t().contiguous()
        packed = packed[..., torch.argsort(self.side_order)] if self.side else packed
        return packed.transpose(1, 2).reshape(packed.shape[0] * self.row_tile, -1).contiguous()

    @property
    def side_order(self) -> torch.Tensor:
        """int64 [row_tile]: the row of the tile at each place of its side values."""
        names = [d for d, _ in self.n[1:]]
        rows = torch.arange(self.row_tile).reshape([size for _, size in self.n[1:]])
        return rows.permute([names.index(d) for d in self.side or names]).reshape(-1)

    def _digits(
        self, shape: torch.Size, bits: int
    ) -> tuple[dict[str, int], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Sizes of all digits; the digits of rows, then columns; of the address; of the position in a container."""
        self._check(shape)
        if self.whole:
            raise FormatError("LB0205", f"whole codes do not lie in planes of {bits} bits: {self}")
        sizes = self.plane_sizes(bits, *shape)
        return sizes, tuple(d for d, _ in (*self.n, *self.k)), *self.order(bits, sizes)

    def _check(self, shape: torch.Size) -> None:
        rows, cols = shape
        if rows % self.row_tile or cols % self.block:
            raise FormatError("LB0206", f"{rows}x{cols} codes are not padded to {self.row_tile}x{self.block}")


def _parse_digits(text: str) -> tuple[tuple[str, int], ...]:
    digits = []
    for part in text.split("."):
        m = re.fullmatch(r"([a-z]+)(\d*)", part)
        if not m:
            raise FormatError("LB0204", f"cannot read layout digit {part!r}")
        digits.append((m[1], int(m[2] or 0)))
    return tuple(digits)


def _digits_text(digits: tuple[tuple[str, int], ...]) -> str:
    return ".".join(f"{name}{size or ''}" for name, size in digits)


# Named layouts, one per target family.
#   panel16: x86 byte dot products. A 64-byte vector holds 16 rows x 4 consecutive columns; a byte's packed codes are
#            4 columns apart, so a mask (and shift) yields operands for `vpdpbusd` without any shuffle.
#   whole16: the same with codes of 3, 5, 6 and 7 bits whole, for AVX2, where putting planes together costs most.
#   signs16: the same for codes that are looked up by their lowest four bits, a fifth and a sign apart: where the fifth
#            is the byte's highest bit, the byte is an index of `vpshufb` as it is.
#   runs16:  for codes whose values depend on those before them: a 32-bit lane has a row's columns in their order.
#   fragments: tensor cores (sm_80 on), weights as left operand. A block of 64 rows x 64 columns is contiguous; a lane
#            of a warp finds its registers of 16 rows x 64 columns side by side, `bits` words. Row = w16 + h8 + g,
#            column = s32 + q16 + c8 + t2 + e, lane = 4g + t: `c`, `h` and `e` are those of an operand of m16n8k16 (or
#            of a warp's part of a wgmma). `e` lies 16 and `c` 8 bits apart: words are pairs of halves, or four bytes.
#   words:   other GPU kernels. 32-bit words run along K, neighbouring rows N lie side by side (coalesced across N).
#   vectors8, vectors: codebook indices, one container each (rows are rows of vectors): 8 rows of a column together for
#            CPUs, all rows of a column side by side for GPUs.
#   rows64: indices of vectors along the input, for CPUs: those of 64 rows together, which share a table of sums.
LAYOUTS = {
    "panel16": Layout.parse("n=p.r16 k=b.v.s.j4 mem=p.b.v.r.j pack=s/8 block=32"),
    "whole16": Layout.parse("n=p.r16 k=b.v.s.j4 mem=p.b.v.r.j pack=s/8 block=32 whole=8"),
    "runs16": Layout.parse("n=p.r16 k=b.v.j4.s mem=p.b.v.r.j pack=s/8 block=32"),
    "signs16": Layout.parse("n=p.r16 k=b.v.s.j4 mem=p.b.v.r.j pack=s/8 block=32 whole=4"),
    "fragments": Layout.parse("n=p.w4.h2.g8 k=b.s2.q2.c2.t4.e2 mem=p.b.w.g.t.s.q.h pack=e.c/32 block=64 side=g.w.h"),
    "words": Layout.parse("n=n k=b.v.s mem=b.v.n pack=s/32 block=32"),
    "vectors8": Layout.parse("n=p.r8 k=b.s mem=p.b.r pack=s/16 block=1"),
    "vectors": Layout.parse("n=n k=b.s mem=b.n pack=s/16 block=1"),
    "rows64": Layout.parse("n=p.r64 k=b.s mem=p.b.r pack=s/16 block=1"),
}
