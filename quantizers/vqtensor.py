"""Vector-quantized matrices: `VQTensor`, the exact meaning, and their packed form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import Layout
from lowbit.quantizers.codebooks import to_levels
from lowbit.quantizers.formats import VectorFormat
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["BOOKS", "VQTensor", "decode_vectors", "pack_vectors", "unpack_vectors"]

BOOKS = ("centroids", "residual_centroids", "outlier_centroids")
"""Codebooks of a `VQTensor`."""
_SCALES = dict(zip(BOOKS, ("centroids_scale", "centroids_scale", "outlier_centroids_scale"), strict=True))
"""The scale of each, where they are bytes."""
_TOO_LARGE = "quantize again: residual codebooks used to have a scale of their own"


@dataclass(frozen=True, eq=False)
class VQTensor:
    """One vector-quantized [n, k] matrix in canonical form.

    Columns are in *stored order*: outliers first, then group after group; `perm` int64 [k] says which column of the
    matrix stands at each place (None: in their own order). indices, residual: int32 [vectors, main columns], or with
    vectors along the input [n, vectors]; centroids
    [groups, centroids, dim] and residual_centroids [groups, residual, dim]; outlier_indices int32 [outlier vectors,
    outlier columns], outlier_centroids [centroids, dim]. norm_scale, norm_bias: [k] in the matrix's own order, or [n].
    Codebooks have the format's table type, norms a float one; codebooks of bytes have float32 scales `<book>_scale`
    [groups], or [1] for outliers, residual ones the main one's, and their sums are bytes again. A tensor is present
    exactly when the format asks for it.
    """

    fmt: VectorFormat
    n: int
    k: int
    indices: Tensor
    centroids: Tensor
    residual: Tensor | None = None
    residual_centroids: Tensor | None = None
    outlier_indices: Tensor | None = None
    outlier_centroids: Tensor | None = None
    perm: Tensor | None = None
    norm_scale: Tensor | None = None
    norm_bias: Tensor | None = None
    centroids_scale: Tensor | None = None
    outlier_centroids_scale: Tensor | None = None

    def __post_init__(self) -> None:
        for name, shape in expected_shapes(self.fmt, self.n, self.k).items():
            value: Tensor | None = getattr(self, name)
            got = None if value is None else tuple(value.shape)
            if got != shape:
                raise FormatError("LB0226", f"{self.fmt} of {self.n}x{self.k} needs {name} {shape}, not {got}")
            dtype = float_type(self.fmt, name)
            if value is not None and dtype is not None and value.dtype != dtype:
                raise FormatError("LB0226", f"{self.fmt} needs {name} as {dtype}, not {value.dtype}")
        if self.fmt.scaled and self.residual_centroids is not None and not self._sums_fit(self.residual_centroids):
            raise FormatError("LB0226", f"{self.fmt} needs codebooks whose sums are signed bytes", hint=_TOO_LARGE)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.n, self.k)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, codebooks and all."""
        return self.fmt.bits_per_weight(self.n, self.k)

    def _sums_fit(self, residual: Tensor) -> bool:
        """Whether every sum of a main and a residual level is a byte."""
        if residual.is_meta:
            return True
        main, rest = self.centroids.int(), residual.int()
        low, high = main.amin(1) + rest.amin(1), main.amax(1) + rest.amax(1)
        return bool((low >= -128).all() and (high <= 127).all())

    def book(self, name: str) -> Tensor | None:
        """float32: the values of one of `BOOKS`, where there is one."""
        value: Tensor | None = getattr(self, name)
        if value is None or not self.fmt.scaled:
            return None if value is None else value.float()
        scale: Tensor = getattr(self, _SCALES[name])
        return value.float() * (scale if name == "outlier_centroids" else scale[:, None, None])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The [N, K] matrix of numbers these indices stand for: the oracle every kernel is compared with."""
        return dequantize_with(self, {}).to(dtype)


def expected_shapes(fmt: VectorFormat, n: int, k: int) -> dict[str, tuple[int, ...] | None]:
    """Shape of every tensor of an [n, k] matrix, None for those the format does not have."""
    outliers, size = fmt.partition(k)
    main = (fmt.vectors(n), fmt.positions(size) * fmt.groups)
    o = fmt.outliers
    norm = {"none": None, "col": (k,), "row": (n,)}[fmt.norm]
    scale = (fmt.groups,) if fmt.scaled else None
    return {
        "indices": main,
        "centroids": (fmt.groups, fmt.centroids, fmt.dim),
        "residual": main if fmt.residual else None,
        "residual_centroids": (fmt.groups, fmt.residual, fmt.dim) if fmt.residual else None,
        "outlier_indices": (math.ceil(n / o.dim), outliers) if o else None,
        "outlier_centroids": (o.centroids, o.dim) if o else None,
        "perm": (k,) if fmt.ordered else None,
        "norm_scale": norm,
        "norm_bias": norm,
        "centroids_scale": scale,
        "outlier_centroids_scale": (1,) if o and fmt.scaled else None,
    }


def float_type(fmt: VectorFormat, name: str) -> torch.dtype | None:
    """Type of a tensor whose values are numbers, None for indices and orders."""
    if name in BOOKS:
        return fmt.book_dtype
    if name.endswith("_centroids_scale") or name == "centroids_scale":
        return torch.float32
    return fmt.scale_dtype if name in ("norm_scale", "norm_bias") else None


def book_tensors(fmt: VectorFormat, books: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that books (by field name, float values) are stored as: themselves, or levels and scales."""
    if not fmt.scaled:
        return {name: book.to(fmt.scale_dtype) for name, book in books.items()}
    found: dict[str, Tensor] = {}
    for scale, names in added_books(books):
        levels, scales = to_levels([books[name] for name in names])
        found |= {**dict(zip(names, levels, strict=True)), scale: scales.reshape(-1)}
    return found


def added_books(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Those of `BOOKS` among `names`, by the scale that they have where they are bytes: together where centroids are
    added up."""
    found: dict[str, list[str]] = {}
    for name in BOOKS:
        if name in names:
            found.setdefault(_SCALES[name], []).append(name)
    return list(found.items())


def decode_vectors(indices: Tensor, book: Tensor, n: int, axis: Literal["out", "in"] = "out") -> Tensor:
    """[vectors, columns] indices into `book` [groups, size, dim] -> float32 [n, columns]; groups split the columns.
    Along the input: [n, vectors] indices -> [n, vectors * dim].

    Differentiable with respect to `book`: the gradient of a centroid is the sum over its occurrences.
    """
    vectors, columns = indices.shape
    groups, size, dim = book.shape
    base = torch.arange(groups, device=indices.device).repeat_interleave(columns // groups) * size
    values = torch.nn.functional.embedding(indices.long() + base, book.reshape(groups * size, dim).float())
    if axis == "in":
        return values.reshape(vectors, columns * dim)
    return values.transpose(1, 2).reshape(vectors * dim, columns)[:n]


def dequantize_with(q: VQTensor, tensors: dict[str, Tensor]) -> Tensor:
    """`q` as float32 [N, K] with some of its float tensors (by field name) replaced; differentiable in those."""

    def of(name: str) -> Tensor:
        value = tensors[name] if name in tensors else q.book(name) if name in BOOKS else getattr(q, name)
        return _need(value).float()

    stored = decode_vectors(q.indices, of("centroids"), q.n, q.fmt.axis)
    if q.residual is not None:
        stored = stored + decode_vectors(q.residual, of("residual_centroids"), q.n, q.fmt.axis)
    if q.outlier_indices is not None:
        first = decode_vectors(q.outlier_indices, of("outlier_centroids")[None], q.n)
        stored = torch.cat([first, stored], dim=1)
    if q.perm is not None:
        stored = stored[:, torch.argsort(q.perm)]
    if q.norm_scale is None:
        return stored
    scale, bias = of("norm_scale"), of("norm_bias")
    return stored * scale + bias if q.fmt.norm == "col" else stored * scale[:, None] + bias[:, None]


def pack_vectors(tensors: list[VQTensor], layout: Layout) -> PackedWeight:
    """Pack sibling matrices for kernels that use `layout`.

    Operands, with S = segments and rows of vectors padded to the layout's row tile (with index 0): `index` and
    `residual_index`, one container per index (uint8 up to 256 centroids, else 16 bits), laid out by the layout as
    [vectors, main columns] or [n, vectors]; `book` [S, groups, centroids, dim] and `residual_book`; `outlier_index`
    [vectors, outlier columns] and `outlier_book` [S, centroids, dim]; `columns` int32 [k], the matrix column at each
    stored place; `norm_scale`, `norm_bias` float32, in stored order for column norms, rows of all segments for row
    norms. Books are float16 or float32. Those of bytes have a scale `<book>_scale` [S, groups], residual ones the main
    one's, and become what `_book` says. Siblings must store their columns in the same order (formats that keep one pack
    alone).
    """
    fmt, k = tensors[0].fmt, tensors[0].k
    if any(t.fmt != fmt or t.k != k for t in tensors) or (len(tensors) > 1 and (fmt.ordered or fmt.norm == "col")):
        raise FormatError("LB0223", "matrices packed together must share format, input columns and their order")
    parts = {"index": _pack_index([t.indices for t in tensors], fmt.index_bits, layout)}
    parts |= _book("book", [t.centroids for t in tensors], [t.centroids_scale for t in tensors], layout)
    if fmt.residual:
        parts["residual_index"] = _pack_index([_need(t.residual) for t in tensors], fmt.residual_bits, layout)
        rest = [_need(t.residual_centroids) for t in tensors]
        parts |= _book("residual_book", rest, [t.centroids_scale for t in tensors], layout)
    if fmt.outliers:
        bits = fmt.outliers.centroids.bit_length() - 1
        parts["outlier_index"] = _pack_index([_need(t.outlier_indices) for t in tensors], bits, layout)
        scales = [t.outlier_centroids_scale for t in tensors]
        parts |= _book("outlier_book", [_need(t.outlier_centroids) for t in tensors], scales, layout)
    if fmt.ordered:
        parts["columns"] = _need(tensors[0].perm).to(torch.int32)
    if fmt.norm != "none":
        for name in ("norm_scale", "norm_bias"):
            values = [_need(getattr(t, name)).float() for t in tensors]
            parts[name] = values[0][_need(tensors[0].perm)] if fmt.norm == "col" and fmt.ordered else torch.cat(values)
    return PackedWeight(fmt, layout, tuple(t.n for t in tensors), k, parts)


def unpack_vectors(packed: PackedWeight) -> list[VQTensor]:
    """Inverse of `pack_vectors`, bit-exact."""
    fmt, k = packed.fmt, packed.k
    assert isinstance(fmt, VectorFormat)
    t, count = packed.tensors, len(packed.segments)
    outliers, size = fmt.partition(k)
    rows, columns = [fmt.vectors(n) for n in packed.segments], fmt.positions(size) * fmt.groups
    main = _unpack_index(t["index"], rows, columns, packed)
    rest = _unpack_index(t["residual_index"], rows, columns, packed) if fmt.residual else [None] * count
    o = fmt.outliers
    outlier_rows = [math.ceil(n / o.dim) for n in packed.segments] if o else []
    first = _unpack_index(t["outlier_index"], outlier_rows, outliers, packed) if o else [None] * count
    perm = t["columns"].long() if fmt.ordered else None
    out, row = [], 0
    for i, n in enumerate(packed.segments):
        norms: list[Tensor | None] = [None, None]
        if fmt.norm != "none":
            norms = [_unpack_norm(t[name], fmt, perm, slice(row, row + n)) for name in ("norm_scale", "norm_bias")]
        books = {field: _unpack_book(packed, name, i) for field, name in zip(BOOKS, _PACKED, strict=True)}
        scales = {f"{field}_scale": t[f"{name}_scale"][i] for field, name in zip(BOOKS, _PACKED, strict=True)
                  if f"{name}_scale" in t}  # fmt: skip
        out.append(
            VQTensor(
                fmt,
                n,
                k,
                main[i],
                _need(books["centroids"]),
                rest[i],
                books["residual_centroids"],
                first[i],
                books["outlier_centroids"],
                perm,
                *norms,
                **scales,
            )
        )
        row += n
    return out


def _unpack_norm(values: Tensor, fmt: VectorFormat, perm: Tensor | None, rows: slice) -> Tensor:
    if fmt.norm == "row":
        return values[rows].to(fmt.scale_dtype)
    return (values if perm is None else values[torch.argsort(perm)]).to(fmt.scale_dtype)


def _need(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


_PACKED = ("book", "residual_book", "outlier_book")
"""Operands that hold `BOOKS`."""


def has_scale(book: str) -> bool:
    """Whether an operand that holds codebooks of bytes has scales: residual ones share those of the main ones."""
    return book != "residual_book"


def scale_of(book: str) -> str:
    """The operand with the scales of an operand that holds codebooks of bytes."""
    return f"{book if has_scale(book) else 'book'}_scale"


def byte_of_zero(book: str) -> int:
    """What packed bytes of an operand exceed levels by, modulo 256. Kernels multiply bytes that are never negative, and
    add residual ones to them: these exceed nothing."""
    return 0 if book == "residual_book" else 128


def byte_rows(layout: Layout) -> bool:
    """True for layouts whose kernels read codebooks of bytes as they are: those of CPUs."""
    return layout.row_tile > 1


def row_bytes(dim: int) -> int:
    """Bytes that a packed centroid of bytes takes: 4, 8 or 16."""
    return 4 if dim <= 4 else 8 if dim <= 8 else 16


def _book(name: str, books: list[Tensor], scales: list[Tensor | None], layout: Layout) -> dict[str, Tensor]:
    """Codebooks of all segments, and their scales; bfloat16 is widened (exactly), because kernels read float16 and
    float32.

    Of bytes: level + `byte_of_zero` in rows of `row_bytes`, padded with level 0, where layouts are read by bytes;
    elsewhere float32 values.
    """
    stacked = torch.stack(books)
    if stacked.dtype != torch.int8:
        return {name: stacked.float() if stacked.dtype == torch.bfloat16 else stacked.contiguous()}
    scale = torch.stack([_need(s) for s in scales])
    side = {f"{name}_scale": scale} if has_scale(name) else {}
    if byte_rows(layout):
        padding = (0, row_bytes(stacked.shape[-1]) - stacked.shape[-1])
        packed = torch.nn.functional.pad(stacked.to(torch.int16), padding) + byte_of_zero(name)
        return {name: packed.to(torch.uint8), **side}
    wide = scale if name == "outlier_book" else scale[:, :, None]
    return {name: stacked.float() * wide[..., None], **side}


def _unpack_book(packed: PackedWeight, name: str, i: int) -> Tensor | None:
    """The stored codebook of segment `i`; inverse of `_book`."""
    fmt, t = packed.fmt, packed.tensors
    assert isinstance(fmt, VectorFormat)
    if name not in t or not fmt.scaled:
        return t[name][i].to(fmt.scale_dtype) if name in t else None
    if byte_rows(packed.layout):
        dim = fmt.outliers.dim if name == "outlier_book" and fmt.outliers else fmt.dim
        return (t[name][i][..., :dim].to(torch.int16) - byte_of_zero(name)).to(torch.int8).contiguous()
    scale = t[scale_of(name)][i].reshape([-1] + [1] * (t[name].ndim - 2))
    return (t[name][i] / scale).round().to(torch.int8)


def _pack_index(indices: list[Tensor], bits: int, layout: Layout) -> Tensor:
    tile, width = layout.row_tile, 8 if bits <= 8 else 16
    padded = [torch.nn.functional.pad(i, (0, 0, 0, -i.shape[0] % tile)) for i in indices]
    return layout.with_container(width).pack_plane(torch.cat(padded), width)


def _unpack_index(words: Tensor, counts: list[int], columns: int, packed: PackedWeight) -> list[Tensor]:
    tile = packed.layout.row_tile
    rows = [math.ceil(c / tile) * tile for c in counts]
    width = 8 * words.element_size()
    codes = packed.layout.with_container(width).unpack_plane(words, width, sum(rows), columns)
    return [part[:c].contiguous() for part, c in zip(codes.split(rows), counts, strict=True)]
