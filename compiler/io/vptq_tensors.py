"""The tensors of one layer in VPTQ's checkpoint layout, both ways, without the package.

Per [N, K] layer with G column groups: `indices` int32 [G, vectors, words], one dense little-endian stream per row of
vectors whose elements have the residual index above the main one; `centroids.weight` and `res_centroids.weight`
[G, centroids * dim]; `outlier_indices` [1, outlier vectors, outliers] 16 bits each; `outlier_centroids.weight`
[1, centroids * dim]; `perm` [K], the column at each stored place; `weight_scale` and `weight_bias` [K], in the matrix's
own order. Unpacked files have `indices` and `res_indices` [G, vectors, columns] of 16 bits each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.vptq import SUFFIXES, VPTQLayer
from lowbit.quantizers.bitstream import unpack_bits
from lowbit.quantizers.formats import VectorFormat, WeightFormat
from lowbit.quantizers.vqtensor import VQTensor
from lowbit.quantizers.weights import QWeight, stored, stored_shapes

__all__ = ["VPTQReader", "tensor_shapes", "to_tensors", "to_vqtensor"]

_NAMES = {
    "indices": "indices",
    "centroids": "centroids.weight",
    "residual_centroids": "res_centroids.weight",
    "outlier_indices": "outlier_indices",
    "outlier_centroids": "outlier_centroids.weight",
    "perm": "perm",
    "norm_scale": "weight_scale",
    "norm_bias": "weight_bias",
}
"""lowbit's name of a stored tensor -> VPTQ's."""


def tensor_shapes(fmt: WeightFormat, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each stored tensor of an [n, k] matrix in `fmt`, by VPTQ's name."""
    assert isinstance(fmt, VectorFormat), f"{fmt} is no vector format"
    ours = stored_shapes(fmt, n, k)
    return {
        theirs: (ours[name][0], _their_shape(fmt, name, ours[name][1]))
        for name, theirs in _NAMES.items()
        if name in ours
    }


def to_tensors(q: QWeight) -> dict[str, Tensor]:
    """The stored tensors of `q`, by VPTQ's name."""
    fmt = q.fmt
    assert isinstance(fmt, VectorFormat), f"{fmt} is no vector format"
    ours = stored(q)
    return {
        theirs: ours[name].reshape(_their_shape(fmt, name, tuple(ours[name].shape)))
        for name, theirs in _NAMES.items()
        if name in ours
    }


def _their_shape(fmt: VectorFormat, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name == "indices":
        return (fmt.groups, shape[0] // fmt.groups, shape[1])
    if name in ("centroids", "residual_centroids"):
        return (shape[0], shape[1] * shape[2])
    if name == "outlier_centroids":
        return (1, shape[0] * shape[1])
    return (1, *shape) if name == "outlier_indices" else shape


@dataclass(frozen=True)
class VPTQReader:
    """Tensors of each layer -> its weight. layers: by module path."""

    layers: Mapping[str, VPTQLayer]

    def suffixes(self, path: str) -> tuple[str, ...]:
        """Names of a module's tensors."""
        return SUFFIXES

    def shape(self, path: str) -> tuple[int, int] | None:
        """(N, K)."""
        return (self.layers[path].n, self.layers[path].k)

    def weight(self, path: str, tensors: Mapping[str, Tensor], where: str) -> VQTensor:
        """As `to_vqtensor`."""
        return to_vqtensor(self.layers[path], tensors, where)


def to_vqtensor(layer: VPTQLayer, tensors: Mapping[str, Tensor], where: str) -> VQTensor:
    """The weight, exactly as stored; a column order that no group or outlier needs is applied to the indices.

    `tensors` have the types and shapes that `read_layers` checked. Raises CheckpointError (LB0114) for indices beyond
    their codebook and for a `perm` that is no permutation.
    """
    fmt, k = layer.fmt, layer.k
    found = _books(layer, tensors)
    found["indices"], rest = _indices(layer, tensors, where)
    if rest is not None:
        found["residual"] = rest
    if o := fmt.outliers:
        found["outlier_indices"] = _below(
            _unsigned(tensors["outlier_indices"])[0], o.centroids, "outlier_indices", where
        )
    perm = _perm(tensors["perm"], k, where) if layer.permuted else torch.arange(k)
    if fmt.ordered:
        found["perm"] = perm
    elif layer.permuted:
        inverse = torch.argsort(perm)
        found |= {name: found[name][:, inverse] for name in ("indices", "residual") if name in found}
    return VQTensor(fmt, layer.n, k, **found)


def _books(layer: VPTQLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Codebooks and norms in the format's table type."""
    fmt = layer.fmt
    shapes = {"centroids": (fmt.groups, fmt.centroids, fmt.dim)}
    if fmt.residual:
        shapes["residual_centroids"] = (fmt.groups, fmt.residual, fmt.dim)
    found = {name: tensors[_NAMES[name]].reshape(shape) for name, shape in shapes.items()}
    if o := fmt.outliers:
        found["outlier_centroids"] = tensors["outlier_centroids.weight"].reshape(o.centroids, o.dim)
    if fmt.norm != "none":
        found |= {name: tensors[_NAMES[name]] for name in ("norm_scale", "norm_bias")}
    return {name: value.to(fmt.scale_dtype) for name, value in found.items()}


def _indices(layer: VPTQLayer, tensors: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor | None]:
    """Main and residual indices, int32 [vectors, main columns]."""
    fmt, words = layer.fmt, tensors["indices"]
    if not layer.packed:
        main = _below(_columns(_unsigned(words)), fmt.centroids, "indices", where)
        if not fmt.residual:
            return main, None
        return main, _below(_columns(_unsigned(tensors["res_indices"])), fmt.residual, "res_indices", where)
    _, size = fmt.partition(layer.k)
    flat = unpack_bits(words.flatten(0, 1), fmt.index_bits + fmt.residual_bits, size)
    codes = _columns(flat.reshape(fmt.groups, -1, size))
    main = (codes & (fmt.centroids - 1)).to(torch.int32)
    return main, (codes >> fmt.index_bits).to(torch.int32) if fmt.residual else None


def _columns(codes: Tensor) -> Tensor:
    """[groups, vectors, columns] -> [vectors, groups * columns]."""
    return codes.transpose(0, 1).flatten(1)


def _unsigned(values: Tensor) -> Tensor:
    """16 unsigned bits under any name (int16, uint16, float16) -> int32."""
    return values.view(torch.int16).to(torch.int32) & 0xFFFF


def _below(indices: Tensor, limit: int, name: str, where: str) -> Tensor:
    if bool((indices >= limit).any()):
        raise CheckpointError("LB0114", f"{name} points beyond its codebook of {limit} centroids", where=where)
    return indices


def _perm(values: Tensor, k: int, where: str) -> Tensor:
    perm = values if values.dtype == torch.int64 else _unsigned(values).to(torch.int64)
    if not torch.equal(perm.sort().values, torch.arange(k)):
        raise CheckpointError("LB0114", f"perm is not a permutation of {k} columns", where=where)
    return perm
