"""Any quantized matrix: packing, and the tensors it is stored as, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, cast

import torch
from torch import Tensor

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import Layout
from lowbit.quantizers.bitstream import pack_bits, unpack_bits
from lowbit.quantizers.formats import Format, VectorFormat, WeightFormat
from lowbit.quantizers.qtensor import PackedWeight, QTensor, pack, unpack
from lowbit.quantizers.scales import largest_level, stored_scale
from lowbit.quantizers.vqtensor import BOOKS, VQTensor, expected_shapes, float_type, pack_vectors, unpack_vectors

__all__ = [
    "QWeight",
    "from_stored",
    "pack_weights",
    "random_weight",
    "stored",
    "stored_names",
    "stored_shapes",
    "unpack_weights",
]

QWeight: TypeAlias = QTensor | VQTensor
"""A quantized matrix in canonical form."""


def pack_weights(weights: Sequence[QWeight], layout: Layout) -> PackedWeight:
    """Pack sibling matrices of one format; raises FormatError (LB0223) when they cannot share a kernel."""
    if all(isinstance(w, VQTensor) for w in weights):
        return pack_vectors(cast("list[VQTensor]", list(weights)), layout)
    if all(isinstance(w, QTensor) for w in weights):
        return pack(cast("list[QTensor]", list(weights)), layout)
    raise FormatError("LB0223", "matrices packed together must share format and input columns")


def unpack_weights(packed: PackedWeight) -> list[QWeight]:
    """Inverse of `pack_weights`, bit-exact."""
    return [*unpack_vectors(packed)] if isinstance(packed.fmt, VectorFormat) else [*unpack(packed)]


def stored(q: QWeight) -> dict[str, Tensor]:
    """The tensors `q` is stored as on disk, by name.

    Scalar formats, in compressed-tensors' terms: `weight_packed` int32 [N, ceil(K*b/32)] (dense bit stream per row; the
    b bits of a sum are those of its terms), `weight_scale` [N or 1, groups * terms], `weight_zero_point` int32
    [ceil(rows*b/32), groups] (packed along the rows), `weight_offset` like the scales, `weight_tensor_scale` float32
    [1], `weight_channel_scale` float16 [N, 1], `weight_perm` int16 [K] (16 bits, unsigned), `weight_shape` int64 [2].
    Vector formats:
    `indices` int32 [groups * vectors, words], one dense stream per row of vectors and column group with the residual
    index above the main one, `centroids`, `residual_centroids`, `outlier_indices` int16, `outlier_centroids`, `perm`
    int16 (16 bits, unsigned), `norm_scale`, `norm_bias`, and float32 `centroids_scale` and `outlier_centroids_scale`
    beside codebooks of bytes, `weight_shape`.
    """
    return _stored_vectors(q) if isinstance(q, VQTensor) else _stored_scalar(q)


def _stored_scalar(q: QTensor) -> dict[str, Tensor]:
    tensors = {"weight_packed": pack_bits(q.codes, q.fmt.code_bits), "weight_scale": q.scale.contiguous()}
    if q.zero is not None:
        tensors["weight_zero_point"] = pack_bits(q.zero.t().contiguous(), q.fmt.bits).t().contiguous()
    if q.offset is not None:
        tensors["weight_offset"] = q.offset.contiguous()
    if q.tensor_scale is not None:
        tensors["weight_tensor_scale"] = q.tensor_scale
    if q.channel_scale is not None:
        tensors["weight_channel_scale"] = q.channel_scale
    if q.perm is not None:
        tensors["weight_perm"] = q.perm.to(torch.int16)
    return {**tensors, "weight_shape": torch.tensor(list(q.shape))}


def _stored_vectors(q: VQTensor) -> dict[str, Tensor]:
    fmt = q.fmt
    codes = q.indices.long()
    if q.residual is not None:
        codes = codes | q.residual.long() << fmt.index_bits
    by_group = torch.cat(list(codes.chunk(fmt.groups, dim=1)))
    tensors = {"indices": pack_bits(by_group, fmt.index_bits + fmt.residual_bits), "centroids": q.centroids}
    for name in expected_shapes(fmt, *q.shape):
        value: Tensor | None = getattr(q, name)
        if value is not None and name not in (*tensors, "residual"):
            tensors[name] = value.contiguous() if float_type(fmt, name) else value.to(torch.int16)
    return {**tensors, "weight_shape": torch.tensor(list(q.shape))}


def stored_shapes(fmt: WeightFormat, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor in `stored` for an [n, k] matrix."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if isinstance(fmt, VectorFormat):
        _, size = fmt.partition(k)
        width = fmt.index_bits + fmt.residual_bits
        for name, shape in expected_shapes(fmt, n, k).items():
            if name == "indices":
                shapes[name] = (torch.int32, (fmt.groups * fmt.vectors(n), _words(fmt.positions(size) * width)))
            elif shape is not None and name != "residual":
                shapes[name] = (float_type(fmt, name) or torch.int16, shape)
    else:
        assert isinstance(fmt, Format)
        side = fmt.side_shape(n, k)
        shapes["weight_packed"] = (torch.int32, (n, _words(k * fmt.code_bits)))
        shapes["weight_scale"] = (fmt.scale_dtype, side)
        if fmt.zero:
            shapes["weight_zero_point"] = (torch.int32, (_words(side[0] * fmt.bits), side[1]))
        if fmt.offset:
            shapes["weight_offset"] = (fmt.scale_dtype, side)
        if fmt.tensor:
            shapes["weight_tensor_scale"] = (torch.float32, (1,))
        if fmt.channel:
            shapes["weight_channel_scale"] = (torch.float16, (n, 1))
        if fmt.ordered:
            shapes["weight_perm"] = (torch.int16, (k,))
    return {**shapes, "weight_shape": (torch.int64, (2,))}


def stored_names(fmt: WeightFormat) -> tuple[str, ...]:
    """Names of the tensors in `stored`: the same for every size."""
    if isinstance(fmt, VectorFormat):
        return tuple(stored_shapes(fmt, fmt.dim, 100 * fmt.groups + (fmt.outliers.count if fmt.outliers else 0)))
    return tuple(stored_shapes(fmt, 1, 1))


def _words(bits: int) -> int:
    return -(-bits // 32)


def from_stored(fmt: WeightFormat, n: int, k: int, tensors: Mapping[str, Tensor]) -> QWeight:
    """Inverse of `stored`; raises FormatError (LB0227) when a tensor is missing or does not fit the format."""
    for name, (dtype, shape) in stored_shapes(fmt, n, k).items():
        value = tensors.get(name)
        if value is None or tuple(value.shape) != shape or (value.dtype != dtype and not dtype.is_floating_point):
            got = "nothing" if value is None else f"{value.dtype} {tuple(value.shape)}"
            raise FormatError("LB0227", f"{fmt} of {n}x{k} needs {name} as {dtype} {shape}, not {got}")
    if isinstance(fmt, VectorFormat):
        return _vectors_from(fmt, n, k, tensors)
    assert isinstance(fmt, Format)
    side = {"scale": tensors["weight_scale"].to(fmt.scale_dtype)}
    if fmt.scale_dtype.itemsize == 1 and bool(side["scale"].float().isnan().any()):
        # Kernels read the byte's bits, where NaN would silently be another number.
        raise FormatError("LB0227", f"weight_scale of {fmt} holds NaN")
    if fmt.tensor:
        side["tensor_scale"] = tensors["weight_tensor_scale"].float()
    if fmt.zero:
        rows, _ = fmt.side_shape(n, k)
        side["zero"] = unpack_bits(tensors["weight_zero_point"].t().contiguous(), fmt.bits, rows).t().contiguous()
    if fmt.offset:
        side["offset"] = tensors["weight_offset"].to(fmt.scale_dtype)
    if fmt.channel:
        side["channel_scale"] = tensors["weight_channel_scale"].half()
    if fmt.ordered:
        side["perm"] = _order(tensors["weight_perm"], "weight_perm", k).to(torch.int32)
    return QTensor(fmt, unpack_bits(tensors["weight_packed"], fmt.code_bits, k), **side)


def _vectors_from(fmt: VectorFormat, n: int, k: int, tensors: Mapping[str, Tensor]) -> VQTensor:
    _, size = fmt.partition(k)
    if fmt.axis == "in" and k % fmt.dim:
        raise FormatError("LB0227", f"{k} columns are no vectors of {fmt.dim}")
    codes = unpack_bits(tensors["indices"], fmt.index_bits + fmt.residual_bits, fmt.positions(size))
    codes = torch.cat(list(codes.chunk(fmt.groups)), dim=1).to(torch.int64)
    found: dict[str, Tensor] = {"indices": (codes & (fmt.centroids - 1)).to(torch.int32)}
    if fmt.residual:
        found["residual"] = (codes >> fmt.index_bits).to(torch.int32)
    for name in stored_shapes(fmt, n, k):
        if (dtype := float_type(fmt, name)) is not None:
            found[name] = tensors[name].to(dtype)
    if fmt.outliers:
        found["outlier_indices"] = tensors["outlier_indices"].to(torch.int32) & 0xFFFF
        if bool((found["outlier_indices"] >= fmt.outliers.centroids).any()):
            limit = fmt.outliers.centroids
            raise FormatError("LB0227", f"outlier_indices points beyond the codebook of {limit} centroids")
    if fmt.ordered:
        found["perm"] = _order(tensors["perm"], "perm", k)
    return VQTensor(fmt, n, k, **found)


def _order(stored: Tensor, name: str, k: int) -> Tensor:
    """int64 [k]: an order of columns from its 16-bit form; raises FormatError (LB0227) when it is none."""
    perm = stored.to(torch.int64) & 0xFFFF
    if not torch.equal(perm.sort().values, torch.arange(k, device=perm.device)):
        raise FormatError("LB0227", f"{name} is not a permutation of {k} columns")
    return perm


def random_weight(fmt: WeightFormat, n: int, k: int, rng: torch.Generator) -> QWeight:
    """Random codes, scales and codebooks in `fmt`, for checks and measurements."""
    if isinstance(fmt, VectorFormat):
        return _random_vectors(fmt, n, k, rng)
    assert isinstance(fmt, Format)
    side = fmt.side_shape(n, k)
    used = torch.ones(2**fmt.bits) if fmt.element.window > 1 else fmt.element.levels().isfinite()
    finite = used.nonzero().flatten().to(torch.uint8)
    codes = finite[torch.randint(0, len(finite), (n, k), generator=rng)]
    for i in range(1, fmt.terms):
        codes |= finite[torch.randint(0, len(finite), (n, k), generator=rng)] << i * fmt.bits
    whole = torch.full((1,), 1e-4 + 1e-3 * float(torch.rand((), generator=rng))) if fmt.tensor else None
    size = 100.0 if fmt.tensor else 0.02 * min(1.0, 128 / largest_level(fmt.element))  # sums must fit float16
    channel = (torch.rand((n, 1), generator=rng) * 0.002 + 1e-4).half() if fmt.channel else None
    if fmt.channel:
        scale = torch.randint(1, 17, side, generator=rng).to(torch.int8)
    else:
        scale = stored_scale((torch.rand(side, generator=rng) + 0.05) * size, replace(fmt, tensor=False))
        scale = scale.to(fmt.scale_dtype)
    zero = torch.randint(0, 2**fmt.bits, side, generator=rng).to(torch.uint8) if fmt.zero else None
    offset = (torch.randn(side, generator=rng) * 0.02).to(fmt.scale_dtype) if fmt.offset else None
    perm = torch.randperm(k, generator=rng).to(torch.int32) if fmt.ordered else None
    return QTensor(fmt, codes, scale, zero, offset, whole, perm, channel)


_ADDED = {"centroids": (-96, 97), "residual_centroids": (-32, 32)}  # sums are bytes, from the first to the last


def _random_vectors(fmt: VectorFormat, n: int, k: int, rng: torch.Generator) -> VQTensor:
    limits = {"indices": fmt.centroids, "residual": fmt.residual}
    limits["outlier_indices"] = fmt.outliers.centroids if fmt.outliers else 0
    found: dict[str, Tensor] = {}
    for name, shape in expected_shapes(fmt, n, k).items():
        if shape is None:
            continue
        if name in limits:
            found[name] = torch.randint(0, limits[name], shape, generator=rng).to(torch.int32)
        elif name == "perm":
            found[name] = torch.randperm(k, generator=rng)
        elif name in BOOKS and fmt.scaled:
            low, high = (-128, 128) if not fmt.residual or name == "outlier_centroids" else _ADDED[name]
            found[name] = torch.randint(low, high, shape, generator=rng).to(torch.int8)
        elif float_type(fmt, name) == torch.float32 and fmt.scaled:
            found[name] = torch.rand(shape, generator=rng) * 0.002 + 1e-4
        else:
            found[name] = (torch.randn(shape, generator=rng) * 0.1 + (name == "norm_scale")).to(fmt.scale_dtype)
    return VQTensor(fmt, n, k, **found)
