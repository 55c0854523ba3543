"""Vector-quantized matrices: `VQTensor`, the exact meaning, and their packed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import Layout
from lowbit.quantizers.formats import VectorFormat
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["VQTensor", "decode_vectors", "pack_vectors", "unpack_vectors"]


@dataclass(frozen=True, eq=False)
class VQTensor:
    """One vector-quantized [n, k] matrix in canonical form.

    Columns are in *stored order*: outliers first, then group after group; `perm` int64 [k] says which column of the
    matrix stands at each place (None: in their own order). indices, residual: int32 [vectors, main columns]; centroids
    [groups, centroids, dim] and residual_centroids [groups, residual, dim]; outlier_indices int32 [outlier vectors,
    outlier columns], outlier_centroids [centroids, dim]. norm_scale, norm_bias: [k] in the matrix's own order, or [n].
    Float tensors have the format's table type; a tensor is present exactly when the format asks for it.
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

    def __post_init__(self) -> None:
        for name, shape in expected_shapes(self.fmt, self.n, self.k).items():
            value: Tensor | None = getattr(self, name)
            got = None if value is None else tuple(value.shape)
            if got != shape:
                raise FormatError("LB0226", f"{self.fmt} of {self.n}x{self.k} needs {name} {shape}, not {got}")
            if value is not None and value.is_floating_point() and value.dtype != self.fmt.scale_dtype:
                raise FormatError("LB0226", f"{self.fmt} needs {name} as {self.fmt.scale_dtype}, not {value.dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.n, self.k)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, codebooks and all."""
        return self.fmt.bits_per_weight(self.n, self.k)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The [N, K] matrix of numbers these indices stand for: the oracle every kernel is compared with."""
        return dequantize_with(self, {}).to(dtype)


def expected_shapes(fmt: VectorFormat, n: int, k: int) -> dict[str, tuple[int, ...] | None]:
    """Shape of every tensor of an [n, k] matrix, None for those the format does not have."""
    outliers, size = fmt.partition(k)
    main = (fmt.vectors(n), size * fmt.groups)
    o = fmt.outliers
    norm = {"none": None, "col": (k,), "row": (n,)}[fmt.norm]
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
    }


def decode_vectors(indices: Tensor, book: Tensor, n: int) -> Tensor:
    """[vectors, columns] indices into `book` [groups, size, dim] -> float32 [n, columns]; groups split the columns.

    Differentiable with respect to `book`: the gradient of a centroid is the sum over its occurrences.
    """
    vectors, columns = indices.shape
    groups, size, dim = book.shape
    base = torch.arange(groups, device=indices.device).repeat_interleave(columns // groups) * size
    values = torch.nn.functional.embedding(indices.long() + base, book.reshape(groups * size, dim).float())
    return values.transpose(1, 2).reshape(vectors * dim, columns)[:n]


def dequantize_with(q: VQTensor, tensors: dict[str, Tensor]) -> Tensor:
    """`q` as float32 [N, K] with some of its float tensors (by field name) replaced; differentiable in those."""

    def of(name: str) -> Tensor:
        value: Tensor = tensors[name] if name in tensors else getattr(q, name)
        return value.float()

    stored = decode_vectors(q.indices, of("centroids"), q.n)
    if q.residual is not None:
        stored = stored + decode_vectors(q.residual, of("residual_centroids"), q.n)
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
    [vectors, main columns]; `book` [S, groups, centroids, dim] and `residual_book`; `outlier_index` [vectors, outlier
    columns] and `outlier_book` [S, centroids, dim]; `columns` int32 [k], the matrix column at each stored place;
    `norm_scale`, `norm_bias` float32, in stored order for column norms, rows of all segments for row norms. Books are
    float16 or float32. Siblings must store their columns in the same order (formats that keep one pack alone).
    """
    fmt, k = tensors[0].fmt, tensors[0].k
    if any(t.fmt != fmt or t.k != k for t in tensors) or (len(tensors) > 1 and (fmt.ordered or fmt.norm == "col")):
        raise FormatError("LB0223", "matrices packed together must share format, input columns and their order")
    parts = {"index": _pack_index([t.indices for t in tensors], fmt.index_bits, layout)}
    parts["book"] = _book([t.centroids for t in tensors])
    if fmt.residual:
        parts["residual_index"] = _pack_index([_need(t.residual) for t in tensors], fmt.residual_bits, layout)
        parts["residual_book"] = _book([_need(t.residual_centroids) for t in tensors])
    if fmt.outliers:
        bits = fmt.outliers.centroids.bit_length() - 1
        parts["outlier_index"] = _pack_index([_need(t.outlier_indices) for t in tensors], bits, layout)
        parts["outlier_book"] = _book([_need(t.outlier_centroids) for t in tensors])
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
    main = _unpack_index(t["index"], fmt.dim, size * fmt.groups, packed)
    rest = _unpack_index(t["residual_index"], fmt.dim, size * fmt.groups, packed) if fmt.residual else [None] * count
    o = fmt.outliers
    first = _unpack_index(t["outlier_index"], o.dim, outliers, packed) if o else [None] * count
    perm = t["columns"].long() if fmt.ordered else None
    out, row = [], 0
    for i, n in enumerate(packed.segments):
        norms: list[Tensor | None] = [None, None]
        if fmt.norm != "none":
            norms = [_unpack_norm(t[name], fmt, perm, slice(row, row + n)) for name in ("norm_scale", "norm_bias")]
        books = [t[name][i].to(fmt.scale_dtype) if name in t else None for name in ("residual_book", "outlier_book")]
        out.append(
            VQTensor(
                fmt,
                n,
                k,
                main[i],
                t["book"][i].to(fmt.scale_dtype),
                rest[i],
                books[0],
                first[i],
                books[1],
                perm,
                *norms,
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


def _book(books: list[Tensor]) -> Tensor:
    """Codebooks of all segments; bfloat16 is widened (exactly), because kernels read float16 and float32."""
    stacked = torch.stack(books)
    return stacked.float() if stacked.dtype == torch.bfloat16 else stacked.contiguous()


def _pack_index(indices: list[Tensor], bits: int, layout: Layout) -> Tensor:
    tile, width = layout.row_tile, 8 if bits <= 8 else 16
    padded = [torch.nn.functional.pad(i, (0, 0, 0, -i.shape[0] % tile)) for i in indices]
    return layout.with_container(width).pack_plane(torch.cat(padded), width)


def _unpack_index(words: Tensor, dim: int, columns: int, packed: PackedWeight) -> list[Tensor]:
    counts = [math.ceil(n / dim) for n in packed.segments]
    tile = packed.layout.row_tile
    rows = [math.ceil(c / tile) * tile for c in counts]
    width = 8 * words.element_size()
    codes = packed.layout.with_container(width).unpack_plane(words, width, sum(rows), columns)
    return [part[:c].contiguous() for part, c in zip(codes.split(rows), counts, strict=True)]
