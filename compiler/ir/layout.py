"""Where each code's bits lie: an invertible map from (row n, column k, bit) to (plane, address, bit).

A layout is a mixed-radix rearrangement. Rows and columns are split into digits, most significant first; `memory` lists
the digits from the slowest to the fastest varying address; the digit `packed` is not an address but the position
inside a container (a byte or a 32-bit word). Codes wider than a power of two are split into *planes* of 4, 2, 1 (or 8)
bits, low bits in the first plane, so that no code ever straddles two containers.

Text form, which round-trips: `n=p.r16 k=b.v.s.j4 mem=p.b.v.r.j pack=s/8 block=32`. A digit without a number takes
what is left: the first digit of a dimension its number of tiles, the packed digit `container / plane bits`, and one
more column digit whatever completes `block` columns.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lowbit.compiler.errors import FormatError

__all__ = ["CANONICAL_PLANES", "LAYOUTS", "Layout", "plane_bits"]


def plane_bits(bits: int) -> tuple[int, ...]:
    """Plane widths that store a `bits`-wide code, low bits first: 3 -> (2, 1), 6 -> (4, 2), 8 -> (8,).

    Widths are powers of two, so each divides the container: the "4+2" split of FP6-LLM, for any width.
    """
    if not 1 <= bits <= 8:
        raise FormatError("LB0201", f"codes have 1 to 8 bits, not {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


_WORDS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
CANONICAL_PLANES = {bits: plane_bits(bits) for bits in range(1, 9)}


@dataclass(frozen=True)
class Layout:
    """One packed layout; see the module's docstring for the fields' meaning."""

    n: tuple[tuple[str, int], ...]
    k: tuple[tuple[str, int], ...]
    memory: tuple[str, ...]
    packed: str
    container: int
    block: int

    def __post_init__(self) -> None:
        names = [d for d, _ in (*self.n, *self.k)]
        if sorted(names) != sorted((*self.memory, self.packed)):
            raise FormatError("LB0202", f"layout digits {names} and memory order {self.memory} do not match")
        if self.container not in _WORDS:
            raise FormatError("LB0203", f"container must be 8, 16 or 32 bits, not {self.container}")

    @staticmethod
    def parse(text: str) -> Layout:
        """The layout written as `text`; raises FormatError (LB0204) with the expected form."""
        m = re.fullmatch(r"n=(\S+) k=(\S+) mem=(\S+) pack=(\w+)/(\d+) block=(\d+)", text.strip())
        if not m:
            raise FormatError(
                "LB0204",
                f"cannot read layout {text!r}",
                hint="write 'n=p.r16 k=b.s mem=p.b.r pack=s/8 block=32'",
            )
        return Layout(_parse_digits(m[1]), _parse_digits(m[2]), tuple(m[3].split(".")), m[4], int(m[5]), int(m[6]))

    def __str__(self) -> str:
        return (
            f"n={_digits_text(self.n)} k={_digits_text(self.k)} mem={'.'.join(self.memory)} "
            f"pack={self.packed}/{self.container} block={self.block}"
        )

    @cached_property
    def row_tile(self) -> int:
        """Rows are padded to a multiple of this."""
        return math.prod(size for _, size in self.n if size)

    @property
    def word_dtype(self) -> torch.dtype:
        """dtype of a packed plane."""
        return _WORDS[self.container]

    def with_container(self, bits: int) -> Layout:
        """The same order with containers of `bits` bits."""
        return replace(self, container=bits)

    def plane_sizes(self, bits: int, rows: int, cols: int) -> dict[str, int]:
        """Size of every digit for a plane of `bits` bits over `rows` x `cols` padded codes."""
        per = self.container // bits
        sizes = dict((*self.n, *self.k))
        sizes[self.n[0][0]] = rows // self.row_tile
        sizes[self.k[0][0]] = cols // self.block
        sizes[self.packed] = per
        known = math.prod(sizes[name] for name, _ in self.k[1:] if sizes[name])
        for name, size in self.k[1:]:
            if not size and name != self.packed:
                if self.block % known:
                    raise FormatError("LB0205", f"block {self.block} does not hold {per} codes a container: {self}")
                sizes[name] = self.block // known
        return sizes

    def pack_plane(self, codes: torch.Tensor, bits: int) -> torch.Tensor:
        """Pack `codes` ([rows, cols], padded, values below 2**bits) into a 1-D tensor of containers."""
        sizes, k_names, n_names = self._digits(codes.shape, bits)
        grid = codes.reshape([sizes[d] for d in (*n_names, *k_names)])
        order = [(*n_names, *k_names).index(d) for d in (*self.memory, self.packed)]
        grid = grid.permute(order).to(torch.int32)
        words = torch.zeros(grid.shape[:-1], dtype=self.word_dtype)
        for slot in range(sizes[self.packed]):
            words |= grid[..., slot].to(self.word_dtype) << (slot * bits)
        return words.reshape(-1)

    def unpack_plane(self, words: torch.Tensor, bits: int, rows: int, cols: int) -> torch.Tensor:
        """Inverse of `pack_plane`: codes [rows, cols] of one plane, uint8 up to 8 bits, else int32."""
        sizes, k_names, n_names = self._digits(torch.Size((rows, cols)), bits)
        shifts = torch.arange(sizes[self.packed], dtype=torch.int64) * bits
        spread = words.to(torch.int64).reshape([sizes[d] for d in self.memory])
        grid: torch.Tensor = (spread[..., None] >> shifts) & (2**bits - 1)
        source = (*self.memory, self.packed)
        grid = grid.permute([source.index(d) for d in (*n_names, *k_names)])
        return grid.reshape(rows, cols).to(torch.uint8 if bits <= 8 else torch.int32)

    def address(self, bits: int, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the `bits`-wide part of each code lies in its plane: container index and shift, int64 [rows, cols]."""
        sizes, k_names, n_names = self._digits(torch.Size((rows, cols)), bits)
        shape = [sizes[d] for d in self.memory]
        index = torch.arange(math.prod(shape)).reshape([*shape, 1]).expand([*shape, sizes[self.packed]])
        shift = (torch.arange(sizes[self.packed]) * bits).expand([*shape, sizes[self.packed]])
        source = (*self.memory, self.packed)
        order = [source.index(d) for d in (*n_names, *k_names)]
        return index.permute(order).reshape(rows, cols), shift.permute(order).reshape(rows, cols)

    def pack(self, codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
        """Pack `bits`-wide uint8 codes [rows, cols] (padded) into one tensor of containers per plane."""
        planes, low = [], 0
        for width in plane_bits(bits):
            part = (codes.to(torch.int32) >> low) & (2**width - 1)
            planes.append(self.pack_plane(part, width))
            low += width
        return planes

    def unpack(self, planes: list[torch.Tensor], bits: int, rows: int, cols: int) -> torch.Tensor:
        """Inverse of `pack`: uint8 codes [rows, cols]."""
        codes, low = torch.zeros(rows, cols, dtype=torch.int32), 0
        for width, words in zip(plane_bits(bits), planes, strict=True):
            codes |= self.unpack_plane(words, width, rows, cols).to(torch.int32) << low
            low += width
        return codes.to(torch.uint8)

    def pack_side(self, values: torch.Tensor) -> torch.Tensor:
        """Lay per-row side values [rows, groups] (scales, zero points) beside the codes: row tile fastest.

        The result is [rows / row_tile, groups, row_tile]; with an untiled row dimension [groups, rows].
        """
        rows, groups = values.shape
        if self.row_tile == 1:
            return values.t().contiguous()
        return values.reshape(rows // self.row_tile, self.row_tile, groups).transpose(1, 2).contiguous()

    def unpack_side(self, packed: torch.Tensor) -> torch.Tensor:
        """Inverse of `pack_side`."""
        if self.row_tile == 1:
            return packed.t().contiguous()
        return packed.transpose(1, 2).reshape(packed.shape[0] * self.row_tile, -1).contiguous()

    def _digits(self, shape: torch.Size, bits: int) -> tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]:
        rows, cols = shape
        if rows % self.row_tile or cols % self.block:
            raise FormatError("LB0206", f"{rows}x{cols} codes are not padded to {self.row_tile}x{self.block}")
        sizes = self.plane_sizes(bits, rows, cols)
        return sizes, tuple(d for d, _ in self.k), tuple(d for d, _ in self.n)


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
#   words:   GPU kernels. 32-bit words run along K, neighbouring rows N lie side by side (coalesced across N).
#   vectors8, vectors: codebook indices, one container each (rows are rows of vectors): 8 rows of a column together for
#            CPUs, all rows of a column side by side for GPUs.
LAYOUTS = {
    "panel16": Layout.parse("n=p.r16 k=b.v.s.j4 mem=p.b.v.r.j pack=s/8 block=32"),
    "words": Layout.parse("n=n k=b.v.s mem=b.v.n pack=s/32 block=32"),
    "vectors8": Layout.parse("n=p.r8 k=b.s mem=p.b.r pack=s/16 block=1"),
    "vectors": Layout.parse("n=n k=b.s mem=b.n pack=s/16 block=1"),
}
