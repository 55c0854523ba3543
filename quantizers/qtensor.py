"""Scalar-quantized matrices: `QTensor`, the exact meaning, and `PackedWeight`, any weight in a kernel's layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import Layout
from lowbit.quantizers.formats import K_ALIGN, Format, Granularity, WeightFormat

__all__ = [
    "PackedWeight",
    "QTensor",
    "column_map",
    "full_scales",
    "one_matrix",
    "pack",
    "padded_columns",
    "padded_group",
    "unpack",
]


@dataclass(frozen=True, eq=False)
class QTensor:
    """One quantized [N, K] matrix in canonical form.

    codes: uint8 [N, K]; where a weight is a sum of terms, each one's code is in the bits above the one before. scale:
    [rows, groups] in the format's scale dtype, rows = N (1 for per-tensor formats); of sums [rows, groups * terms].
    zero: uint8 [rows, groups] (a code offset), present exactly when the format is asymmetric. offset: like `scale`,
    added to every value, present exactly when the format has offsets (`fz`). tensor_scale: float32 [1], multiplied
    into every scale, present exactly when the format has a second scale (`t32`). perm: int32 [K], which column of the
    matrix stands at each place of codes (and so which share a scale), present exactly when the format is `ordered`.
    channel_scale: float16 [N, 1], multiplied into the scales of every row, present exactly when those are `i8ch`.
    """

    fmt: Format
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    tensor_scale: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    channel_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        side = self.fmt.side_shape(n, k)
        if tuple(self.scale.shape) != side or self.scale.dtype != self.fmt.scale_dtype:
            raise FormatError(
                "LB0220", f"{self.fmt} of {n}x{k} needs {self.fmt.scale} scales {side}, "
                f"not {self.scale.dtype} {tuple(self.scale.shape)}",
            )  # fmt: skip
        if (self.zero is not None) != self.fmt.zero:
            raise FormatError("LB0221", f"{self.fmt} {'needs' if self.fmt.zero else 'has no'} zero points")
        if self.zero is not None and tuple(self.zero.shape) != side:
            raise FormatError("LB0222", f"{self.fmt} of {n}x{k} needs zero points {side}")
        given = None if self.offset is None else (tuple(self.offset.shape), self.offset.dtype)
        if given != ((side, self.fmt.scale_dtype) if self.fmt.offset else None):
            raise FormatError("LB0225", f"{self.fmt} of {n}x{k} needs {'' if self.fmt.offset else 'no '}offsets {side}")
        whole = self.tensor_scale
        given = None if whole is None else (tuple(whole.shape), whole.dtype)
        if given != (((1,), torch.float32) if self.fmt.tensor else None):
            raise FormatError(
                "LB0228", f"{self.fmt} {'needs one float32' if self.fmt.tensor else 'has no'} tensor scale"
            )
        self._check_order(k)
        given = None if self.channel_scale is None else (tuple(self.channel_scale.shape), self.channel_scale.dtype)
        if given != (((n, 1), torch.float16) if self.fmt.channel else None):
            raise FormatError(
                "LB0228",
                f"{self.fmt} {'needs float16 scales of rows' if self.fmt.channel else 'has no scales of rows'}",
            )

    def _check_order(self, k: int) -> None:
        given = None if self.perm is None else (tuple(self.perm.shape), self.perm.dtype)
        if given != (((k,), torch.int32) if self.fmt.ordered else None):
            raise FormatError(
                "LB0219", f"{self.fmt} {f'needs an int32 order of {k} columns' if self.fmt.ordered else 'has no order'}"
            )
        if self.perm is not None and self.perm.device.type != "meta":
            if not torch.equal(self.perm.sort().values, torch.arange(k, dtype=torch.int32, device=self.perm.device)):
                raise FormatError("LB0219", f"the order of {self.fmt} is not a permutation of {k} columns")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zero points included."""
        return self.fmt.bits_per_weight(*self.shape)

    @property
    def full_scale(self) -> torch.Tensor:
        """float32 [rows, groups]: what levels are multiplied with. The tensor's scale is in it, rounded once; the
        channel's exactly."""
        scale = self.scale.float()
        if self.channel_scale is not None:
            return scale * self.channel_scale.float()
        return scale if self.tensor_scale is None else scale * self.tensor_scale

    def in_order(self, perm: torch.Tensor) -> QTensor:
        """This matrix, understood as the columns `perm` [K] of another, as a matrix of an ordered format: for methods
        that quantize `weight[:, perm]`."""
        return replace(self, fmt=replace(self.fmt, ordered=True), perm=perm.to(torch.int32))

    def term(self, i: int) -> torch.Tensor:
        """uint8 [N, K]: the codes of the sum's term `i`, or all there is."""
        return self.codes if self.fmt.terms == 1 else self.codes >> i * self.fmt.bits & 2**self.fmt.bits - 1

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The [N, K] matrix of numbers these codes stand for: the oracle every kernel is compared with."""
        n, k = self.shape
        element, terms = self.fmt.element, self.fmt.terms
        values = element.values(self.term(0))
        if self.zero is not None:
            values = values - self._spread(self.zero.float(), n, k)
        values = values * self._spread(self.full_scale[:, ::terms], n, k)
        for i in range(1, terms):
            values = values + element.values(self.term(i)) * self._spread(self.full_scale[:, i::terms], n, k)
        if self.offset is not None:
            values = values + self._spread(self.offset.float(), n, k)
        if self.perm is not None:
            values = values[:, torch.argsort(self.perm)]
        return values.to(dtype)

    def _spread(self, side: torch.Tensor, n: int, k: int) -> torch.Tensor:
        wide = side.repeat_interleave(self.fmt.granularity.group_size(k), dim=1)[:, :k]
        return wide.expand(n, k)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Codes and side values in a kernel's layout, for one matrix or several siblings (segments).

    segments: rows of each sibling matrix, one after the other; each is padded to the layout's row tile. tensors: the
    operands of the kernel by name, in a fixed order. Scalar formats have `plane0`, `plane1` ... (1-D containers, low
    bits first), `scale`, and if stored `zero` (uint8) and `offset`, laid out by `Layout.pack_side`; scales and offsets
    are of type `Format.packed_scale_dtype`. A tensor's second scale is multiplied into scales wider than a byte, which
    is exact because `QTensor` rounds the product in the same way; `tensor_scale` [segments] is kept to undo it, and for
    kernels that read bytes; so is `channel_scale` [N]. Ordered formats have `columns` int32 [k], the matrix column at
    each place before padding; `input_scale` float32 [groups] joins them where activations have static scales. Padded
    columns hold code 0 and meet zero activations; padded rows hold any scale. Where weights are sums of terms, a group
    of columns stands once per term, one behind the other (`one_matrix`). Vector formats: see `quantizers.vqtensor`.
    """

    fmt: WeightFormat
    layout: Layout
    segments: tuple[int, ...]
    k: int
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def planes(self) -> tuple[torch.Tensor, ...]:
        """The bit planes of a scalar format."""
        return tuple(t for name, t in self.tensors.items() if name.startswith("plane"))

    @property
    def scale(self) -> torch.Tensor:
        """The scales of a scalar format."""
        return self.tensors["scale"]

    @property
    def zero(self) -> torch.Tensor | None:
        """The zero points, if stored."""
        return self.tensors.get("zero")

    @property
    def offset(self) -> torch.Tensor | None:
        """The offsets, if stored."""
        return self.tensors.get("offset")

    @property
    def n(self) -> int:
        """Output features of all segments together."""
        return sum(self.segments)

    @property
    def rows(self) -> int:
        """Rows with padding."""
        return sum(_round_up(n, self.layout.row_tile) for n in self.segments)

    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


_PARTS = (4, 8, 16)
"""Group sizes that fill K_ALIGN columns without padding; smaller ones do not fit byte dot products."""


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def padded_group(fmt: Format, k: int) -> int:
    """Columns one group takes in packed form: the group size rounded up to K_ALIGN, or the size itself where whole
    groups fill K_ALIGN columns."""
    g = fmt.granularity.group_size(k)
    return g if g in _PARTS and g < k else _round_up(min(g, k), K_ALIGN)


def padded_columns(fmt: Format, k: int, block: int = K_ALIGN) -> int:
    """Columns of the packed matrix, a multiple of K_ALIGN and of a layout's `block`: every group padded, the ragged
    last one as it needs. A group of sums has its columns once for every term, and the last one is no shorter."""
    full, rest = divmod(k, fmt.granularity.group_size(k))
    if fmt.terms > 1:
        full, rest = (full + bool(rest)) * fmt.terms, 0
    return _round_up(full * padded_group(fmt, k) + rest, max(K_ALIGN, block))


def one_matrix(fmt: Format, k: int) -> tuple[Format, int]:
    """Format and columns of the plain matrix whose packed form is that of sums: every group of columns once per term.
    `fmt` and `k` themselves where weights are no sums."""
    if fmt.terms == 1:
        return fmt, k
    size = min(fmt.granularity.group_size(k), k)
    plain = replace(fmt, terms=1, granularity=Granularity("g", size))
    return plain, fmt.granularity.groups(k) * fmt.terms * size


def column_map(fmt: Format, k: int) -> torch.Tensor:
    """int64 [k]: where each column of the matrix stands in the packed matrix; its term `i`, if it is a sum, stands `i`
    padded groups further on."""
    cols, g = torch.arange(k), fmt.granularity.group_size(k)
    return cols // g * fmt.terms * padded_group(fmt, k) + cols % g


def full_scales(packed: PackedWeight) -> torch.Tensor:
    """float32 [rows, groups]: what levels are multiplied with, the tensors' own scales included (see `QTensor`)."""
    assert isinstance(packed.fmt, Format)
    scale = packed.layout.unpack_side(packed.scale)
    if scale.element_size() > 1 or not packed.fmt.tensor:
        return scale.float()
    rows = [_round_up(n, packed.layout.row_tile) for n in packed.segments]
    whole = packed.tensors["tensor_scale"]
    return scale.float() * whole.repeat_interleave(torch.tensor(rows, device=whole.device))[:, None]


def pack(tensors: list[QTensor], layout: Layout) -> PackedWeight:
    """Pack sibling matrices (same format, same K; rows one after the other) for kernels that use `layout`."""
    fmt, (_, k) = tensors[0].fmt, tensors[0].shape
    if any(t.fmt != fmt or t.shape[1] != k or not _same_order(t, tensors[0]) for t in tensors):
        raise FormatError("LB0223", "matrices packed together must share format, input columns and their order")
    cols, where, step = padded_columns(fmt, k, layout.block), column_map(fmt, k), padded_group(fmt, k)
    codes = []
    for t in tensors:
        padded = torch.zeros(_round_up(t.shape[0], layout.row_tile), cols, dtype=torch.uint8)
        for i in range(fmt.terms):
            padded[: t.shape[0], where + i * step] = t.term(i)
        codes.append(padded)
    parts = {f"plane{i}": plane for i, plane in enumerate(layout.pack(torch.cat(codes), fmt.bits))}
    for name in ("scale", "zero", "offset"):
        dtype = torch.uint8 if name == "zero" else fmt.packed_scale_dtype(layout.side_container)
        wide = name == "scale" and dtype.itemsize > 1
        given = [(t.full_scale if wide else getattr(t, name), t.shape[0]) for t in tensors]
        sides = [_pad_side(side, n, layout, dtype) for side, n in given if side is not None]
        if sides:
            parts[name] = layout.pack_side(torch.cat(sides))
    if fmt.tensor:
        parts["tensor_scale"] = torch.cat([t.tensor_scale for t in tensors if t.tensor_scale is not None])
    if fmt.channel:
        parts["channel_scale"] = torch.cat([t.channel_scale.flatten() for t in tensors if t.channel_scale is not None])
    if (perm := tensors[0].perm) is not None:
        parts["columns"] = perm.contiguous()
    return PackedWeight(fmt, layout, tuple(t.shape[0] for t in tensors), k, parts)


def _same_order(a: QTensor, b: QTensor) -> bool:
    return a.perm is b.perm or (a.perm is not None and b.perm is not None and torch.equal(a.perm, b.perm))


def unpack(packed: PackedWeight) -> list[QTensor]:
    """Inverse of `pack`, bit-exact (per-tensor scales come back one per row, as a per-channel format)."""
    fmt, layout, k = packed.fmt, packed.layout, packed.k
    assert isinstance(fmt, Format)
    codes = layout.unpack(list(packed.planes), fmt.bits, packed.rows, padded_columns(fmt, k, layout.block))
    where, step, packed_codes = column_map(fmt, k), padded_group(fmt, k), codes
    codes = packed_codes[:, where]
    for i in range(1, fmt.terms):
        codes |= packed_codes[:, where + i * step] << i * fmt.bits
    sides = {
        name: layout.unpack_side(packed.tensors[name]) for name in ("scale", "zero", "offset") if name in packed.tensors
    }
    rows = 1 if fmt.granularity.kind == "t" else None
    out, start = [], 0
    for i, n in enumerate(packed.segments):
        part = {name: side[start : start + (rows or n)] for name, side in sides.items()}
        if fmt.tensor:
            part["tensor_scale"] = packed.tensors["tensor_scale"][i : i + 1]
            if part["scale"].element_size() > 1:
                part["scale"] = part["scale"] / part["tensor_scale"]  # off by less than rounding to e4m3 repairs
        if fmt.channel:
            first = sum(packed.segments[:i])
            part["channel_scale"] = packed.tensors["channel_scale"][first : first + n, None]
            part["scale"] = (part["scale"] / part["channel_scale"].float()).nan_to_num_(1.0).round()
        for name in part.keys() - {"zero", "tensor_scale", "channel_scale"}:
            part[name] = part[name].to(fmt.scale_dtype)
        if fmt.ordered:
            part["perm"] = packed.tensors["columns"]
        out.append(QTensor(fmt, codes[start : start + n], **part))
        start += _round_up(n, layout.row_tile)
    return out


def _pad_side(side: torch.Tensor, n: int, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """Side values of one matrix, [n or 1, groups] -> [padded n, groups] of `dtype`, zero in padded rows."""
    out = torch.zeros(_round_up(n, layout.row_tile), side.shape[1], dtype=dtype)
    out[:n] = side
    return out
