"""Rows of a packed matrix as numbers, by torch on the device they are on.

The steps are those of a format's decode program, on whole tensors: extract codes from planes, map them to values, apply
zero points, scales and offsets. `row_decoder` gives one pure function of tensors, which Inductor can fuse as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowbit.compiler.ir.layout import Layout, plane_bits
from lowbit.quantizers.formats import Format
from lowbit.quantizers.qtensor import PackedWeight, column_map, one_matrix, padded_columns

__all__ = ["RowDecoder", "dense_rows", "row_decoder", "take_rows"]

RowDecoder = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""What `take_rows` gives -> [rows, K] in the matrix's own order of columns; rows of the padded last tile included."""


def dense_rows(weight: PackedWeight, segment: int, first: int, count: int) -> torch.Tensor:
    """float32 [count, K]: rows `first` on of one segment; `first` is a multiple of the layout's row tile."""
    decode = row_decoder(weight.fmt, weight.layout, weight.k, torch.float32)  # type: ignore[arg-type]
    return decode(take_rows(weight, segment, first, count))[:count]


def take_rows(weight: PackedWeight, segment: int, first: int, count: int) -> dict[str, torch.Tensor]:
    """Views of a packed matrix's tensors, for the tiles that hold rows `first` to `first + count` of a segment."""
    layout, tile = weight.layout, weight.layout.row_tile
    assert isinstance(weight.fmt, Format)
    start = sum(math.ceil(n / tile) for n in weight.segments[:segment]) + first // tile
    tiles = math.ceil(count / tile)
    found = {}
    for i, (bits, words) in enumerate(zip(layout.widths(weight.fmt.bits), weight.planes, strict=True)):
        sizes = layout.plane_sizes(bits, weight.rows, words.numel() * layout.container // bits // weight.rows)
        memory = layout.order(bits, sizes)[0]
        grid = words.view([sizes[d] for d in memory])
        found[f"plane{i}"] = grid.narrow(memory.index(layout.n[0][0]), start, tiles)
    for name in ("scale", "zero", "offset"):
        if name in weight.tensors:
            found[name] = weight.tensors[name].narrow(1 if tile == 1 else 0, start, tiles)
    if weight.scale.element_size() == 1 and weight.fmt.tensor:  # wider scales have the tensor's in them
        found["tensor_scale"] = weight.tensors["tensor_scale"][segment]
    if "columns" in weight.tensors:
        found["order"] = torch.argsort(weight.tensors["columns"])
    return found


def row_decoder(fmt: Format, layout: Layout, k: int, dtype: torch.dtype) -> RowDecoder:
    """A function of tensors alone that decodes rows of [N, k] matrices in `fmt` and `layout` to `dtype`."""
    if fmt.terms > 1:
        return _sum_decoder(fmt, layout, k, dtype)
    element, levels = fmt.element, fmt.element.levels()
    affine = bool((levels == levels[0] + torch.arange(len(levels))).all())
    lowest, where, size = float(levels[0]), column_map(fmt, k), fmt.granularity.group_size(k)
    extract = _extractor(fmt, layout, k)
    dense = int(where[-1]) + 1 == k  # no padding between groups

    def decode(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        codes = extract(parts)
        codes = codes[:, :k] if dense else codes.index_select(1, where.to(codes.device))
        table, states = levels.to(codes.device), element.windows(codes) if element.window > 1 else codes
        values = codes.float() + lowest if affine else table.index_select(0, states.flatten().int()).view(codes.shape)
        if "zero" in parts:
            values = values - _spread(layout, parts["zero"].float(), k, size)
        scale = parts["scale"].float()
        scale = scale * parts["tensor_scale"] if "tensor_scale" in parts else scale
        values = values * _spread(layout, scale, k, size)
        if "offset" in parts:
            values = values + _spread(layout, parts["offset"].float(), k, size)
        return (values[:, parts["order"]] if "order" in parts else values).to(dtype)

    return decode


def _sum_decoder(fmt: Format, layout: Layout, k: int, dtype: torch.dtype) -> RowDecoder:
    """The same for sums: the plain matrix of all terms, then what each weight's terms add up to."""
    plain, columns = one_matrix(fmt, k)
    whole = row_decoder(plain, layout, columns, torch.float32)

    def decode(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        values = whole(parts).unflatten(1, (-1, fmt.terms, plain.granularity.group))
        total: torch.Tensor = values[:, :, 0]
        for i in range(1, fmt.terms):
            total = total + values[:, :, i]
        return total.flatten(1)[:, :k].to(dtype)

    return decode


def _extractor(fmt: Format, layout: Layout, k: int) -> RowDecoder:
    """A function of what `take_rows` gives -> uint8 codes [rows, padded columns]."""
    if layout.whole:
        read = layout.whole_reader(fmt.bits, padded_columns(fmt, k, layout.block))
        return lambda parts: read(parts["plane0"])
    planes = _planes(fmt, layout, k)

    def split(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        codes = planes[0].codes(parts["plane0"], layout.container)
        for i, plane in enumerate(planes[1:], 1):
            codes = codes | plane.codes(parts[f"plane{i}"], layout.container)
        return codes

    return split


@dataclass(frozen=True)
class _Plane:
    """How words of one plane become codes. grid: sizes of digits as they lie in memory, -1 for tiles of rows; order:
    those digits as rows and columns want them; low: the code's bits below this plane's."""

    bits: int
    low: int
    grid: tuple[int, ...]
    order: tuple[int, ...]
    cols: int

    def codes(self, words: torch.Tensor, container: int) -> torch.Tensor:
        """uint8 [rows, padded columns], each part in its place in the code."""
        shifts = torch.arange(container // self.bits, dtype=words.dtype, device=words.device) * self.bits
        grid = ((words[..., None] >> shifts) & (2**self.bits - 1)).to(torch.uint8).reshape(self.grid)
        found = grid.permute(self.order).reshape(-1, self.cols)
        return torch.bitwise_left_shift(found, self.low) if self.low else found


def _planes(fmt: Format, layout: Layout, k: int) -> list[_Plane]:
    found, low, cols = [], 0, padded_columns(fmt, k, layout.block)
    for bits in plane_bits(fmt.bits):
        sizes = layout.plane_sizes(bits, layout.row_tile, cols)
        source = [digit for part in layout.order(bits, sizes) for digit in part]
        sizes[layout.n[0][0]] = -1
        order = tuple(source.index(d) for d, _ in (*layout.n, *layout.k))
        found.append(_Plane(bits, low, tuple(sizes[d] for d in source), order, cols))
        low += bits
    return found


def _spread(layout: Layout, side: torch.Tensor, k: int, size: int) -> torch.Tensor:
    """[rows, k] of side values as they are packed, one for every group of `size` columns."""
    side = layout.unpack_side(side)
    return side.repeat_interleave(size, dim=1)[:, :k] if side.shape[1] > 1 else side
