"""VPTQ's checkpoint layout: the config, and which formats it holds. Tensors are in `vptq_tensors`.

`quantization_config` has the settings of every layer under `config_for_layers` (by module path), or of every layer of
one name under `shared_layer_config`. vptq's own loader passes a layer's settings to its constructor as they are: a key
that it does not know (`norm_dim`), or gives itself (`enable_proxy_error`), stops it, so neither is written per layer.
Layers that stay as they are have to be named, because transformers replaces all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lowbit.compiler.errors import CheckpointError, FormatError
from lowbit.compiler.io.safetensors_file import SafetensorsFile, TensorInfo
from lowbit.quantizers.formats import WIDE_DTYPES, Outliers, VectorFormat, WeightFormat

__all__ = ["SUFFIXES", "VPTQLayer", "can_express", "exact_format", "quantization_config", "read_layers"]

SUFFIXES = (
    "indices", "centroids.weight", "res_indices", "res_centroids.weight", "outlier_indices", "outlier_centroids.weight",
    "perm", "weight_scale", "weight_bias",
)  # fmt: skip
"""Names of a module's tensors, of which it has some."""

_MIN_ROW_BITS = 17
_TABLES = {dtype: name for name, dtype in WIDE_DTYPES.items()}
_SHORT = (torch.int16, torch.uint16, torch.float16)
"""Types that hold 16 unsigned bits: some tools refuse the honest one."""


@dataclass(frozen=True, slots=True)
class VPTQLayer:
    """One [n, k] layer. packed: main and residual indices share a bit stream; permuted: its columns have an order."""

    fmt: VectorFormat
    n: int
    k: int
    packed: bool = True
    permuted: bool = False


def can_express(fmt: WeightFormat, n: int | None = None, k: int | None = None) -> str | None:
    """None when the vptq package reads `fmt` (for an [n, k] matrix, when given) from this layout, else the reason."""
    if not isinstance(fmt, VectorFormat):
        return "VPTQ's layout holds vector formats only"
    if fmt.axis == "in":
        return "vptq's vectors run along the outputs, not along the inputs"
    if fmt.scaled:
        return "vptq's codebooks are floats, not bytes with a scale"
    if fmt.norm == "row":
        return "vptq scales input columns, not output rows"
    if fmt.residual_bits > fmt.index_bits:
        return "vptq reads residual indices with the width of the main ones"
    if fmt.outliers and fmt.outliers.dim < 2:
        return "vptq takes outlier vectors of one element for none"
    if k is not None and fmt.partition(k)[1] * (fmt.index_bits + fmt.residual_bits) < _MIN_ROW_BITS:
        return f"vptq cannot unpack rows of fewer than {_MIN_ROW_BITS} bits"
    if k is not None and fmt.ordered and k > 2**16:
        return "vptq stores column orders in 16 bits"
    return None


def exact_format(fmt: WeightFormat, k: int) -> WeightFormat:
    """`fmt` with the number of outliers of a matrix with `k` columns in place of a percentage."""
    if not isinstance(fmt, VectorFormat) or fmt.outliers is None:
        return fmt
    return replace(fmt, outliers=replace(fmt.outliers, count=fmt.partition(k)[0], percent=0))


def quantization_config(
    formats: Mapping[str, WeightFormat],
    shapes: Mapping[str, tuple[int, int]],
    biased: Iterable[str],
    kept: Iterable[str],
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint; biased: layers with a bias, kept: linear layers left as they are."""
    with_bias = set(biased)
    return {
        "quant_method": "vptq",
        "enable_proxy_error": False,
        "config_for_layers": {path: _settings(fmt, *shapes[path], path in with_bias) for path, fmt in formats.items()},
        "shared_layer_config": {},
        "modules_to_not_convert": sorted(kept),
    }


def _settings(fmt: WeightFormat, n: int, k: int, bias: bool) -> dict[str, Any]:
    assert isinstance(fmt, VectorFormat), f"{fmt} is no vector format"
    count, size = fmt.partition(k)
    o = fmt.outliers
    return {
        "in_features": k,
        "out_features": n,
        "vector_lens": [o.dim if o else -1, fmt.dim],
        "num_centroids": [o.centroids if o else -1, fmt.centroids],
        "num_res_centroids": [-1, fmt.residual or -1],
        "group_num": fmt.groups,
        "group_size": size,
        "outlier_size": count,
        "enable_norm": fmt.norm == "col",
        "enable_perm": fmt.ordered,
        "bias": bias,
        "is_indice_packed": True,
        "indices_as_float": False,
    }


def read_layers(config: Mapping[str, Any], files: Mapping[str, SafetensorsFile], where: str) -> dict[str, VPTQLayer]:
    """Every quantized layer, its tensors' types and shapes checked against the config.

    Raises CheckpointError: LB0114 config and tensors contradict each other, LB0118 a kind that is not supported.
    """
    by_path, by_name = (_table(config, key, where) for key in ("config_for_layers", "shared_layer_config"))
    kept = config.get("modules_to_not_convert") or []
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise CheckpointError("LB0114", "modules_to_not_convert must be a list of names", where=where)
    paths = [name.removesuffix(".centroids.weight") for name in files if name.endswith(".centroids.weight")]
    lost = [path for path in by_path if path not in set(paths) and not _is_kept(path, kept)]
    if lost:
        raise CheckpointError("LB0114", "has settings, but no codebook", where=f"{where}: {lost[0][:200]}")
    layers = {}
    for path in paths:
        place = f"{where}: {path[:200]}"
        settings = by_path.get(path, by_name.get(path.rpartition(".")[2]))
        if not isinstance(settings, dict) or _is_kept(path, kept):
            why = "has a codebook, but no settings" if settings is None else "has a codebook, but settings that deny it"
            raise CheckpointError("LB0114", why, where=place)
        names = {name: files[f"{path}.{name}"] for name in SUFFIXES if f"{path}.{name}" in files}
        infos = {name: file.header.tensors[f"{path}.{name}"] for name, file in names.items()}
        layers[path] = _layer(settings, infos, place)
    return layers


def _table(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    values = config.get(key) or {}
    if not isinstance(values, dict):
        raise CheckpointError("LB0114", f"{key} must be an object", where=where)
    return values


def _is_kept(path: str, kept: list[str]) -> bool:
    """As transformers reads the list, but for regular expressions: a path, the start of one, or the end of one."""
    return any(path == name or path.startswith(f"{name}.") or path.endswith(f".{name}") for name in kept)


def _layer(settings: Mapping[str, Any], infos: Mapping[str, TensorInfo], where: str) -> VPTQLayer:
    n, k, groups, size = (
        _whole(settings, key, 1, where) for key in ("out_features", "in_features", "group_num", "group_size")
    )
    outliers = _whole(settings, "outlier_size", 0, where)
    if outliers + groups * size != k:
        why = f"{outliers} outliers and {groups} groups of {size} columns are not {k} input columns"
        raise CheckpointError("LB0114", why, where=where)
    packed, permuted = _flag(settings, "is_indice_packed", True), _flag(settings, "enable_perm", False)
    table = _table_type(infos, where)
    layer = VPTQLayer(_format(settings, groups, outliers, table, where), n, k, packed, permuted)
    _check_tensors(layer, infos, where)
    return layer


def _format(settings: Mapping[str, Any], groups: int, outliers: int, table: str, where: str) -> VectorFormat:
    lens, books, residuals = (
        _pair(settings, key, where) for key in ("vector_lens", "num_centroids", "num_res_centroids")
    )
    if settings.get("vector_quant_dim", "out") != "out" or residuals[0] > 0:
        raise _refused("vectors along the inputs, or outliers with residuals, are not supported", where)
    norm: Literal["none", "col", "row"] = "none"
    if _flag(settings, "enable_norm", False):
        dim = settings.get("norm_dim", 0)
        if type(dim) is not int or dim not in (0, 1):
            raise _refused(f"norm_dim {str(dim)[:40]} is neither 0 nor 1", where)
        norm = "row" if dim else "col"
    try:
        first = Outliers(lens[0], books[0], count=outliers) if outliers else None
        return VectorFormat(lens[1], books[1], max(residuals[1], 0), groups, first, norm, table)
    except FormatError as e:
        raise _refused(e.message, where) from e


def _refused(why: str, where: str) -> CheckpointError:
    return CheckpointError("LB0118", why, where=where, hint="quantize the original model with lowbit")


def _whole(settings: Mapping[str, Any], key: str, least: int, where: str) -> int:
    value = settings.get(key)
    if type(value) is not int or not least <= value < 2**31:
        raise CheckpointError("LB0114", f"{key} must be a number from {least}, not {str(value)[:40]}", where=where)
    return value


def _pair(settings: Mapping[str, Any], key: str, where: str) -> tuple[int, int]:
    value = settings.get(key)
    if not isinstance(value, list) or len(value) != 2 or any(type(v) is not int for v in value):
        raise CheckpointError("LB0114", f"{key} must be two integers, not {str(value)[:40]}", where=where)
    return value[0], value[1]


def _flag(settings: Mapping[str, Any], key: str, default: bool) -> bool:
    return bool(settings.get(key, default))


def _table_type(infos: Mapping[str, TensorInfo], where: str) -> str:
    """The type that holds all codebooks and norms exactly."""
    names = [name for name in infos if name.endswith(".weight") or name in ("weight_scale", "weight_bias")]
    dtypes = {infos[name].dtype for name in names}
    if not dtypes <= set(_TABLES):
        raise _refused(f"codebooks are {', '.join(sorted(map(str, dtypes)))}, not 16 or 32 bit floats", where)
    common = next(iter(dtypes))
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)
    return _TABLES[common]


def _check_tensors(layer: VPTQLayer, infos: Mapping[str, TensorInfo], where: str) -> None:
    """Every tensor the settings ask for is there with its type and shape, and no other."""
    expected = _expected(layer)
    for name, (dtypes, shape) in expected.items():
        info = infos.get(name)
        if info is None or info.dtype not in dtypes or info.shape != shape:
            got = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
            why = f"{name} of {layer.fmt} {layer.n}x{layer.k} must be {dtypes[0]} {list(shape)}, but is {got}"
            raise CheckpointError("LB0114", why, where=where)
    for name in infos:
        # An outlier codebook without outliers is how VPTQ writes some layers; it stands for nothing.
        if name not in expected and not name.startswith("outlier_"):
            raise CheckpointError("LB0114", f"{name} is stored, but the settings deny it", where=where)


def _expected(layer: VPTQLayer) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
    """Types and shape of every tensor of the layer."""
    fmt, floats = layer.fmt, tuple(_TABLES)
    count, size = fmt.partition(layer.k)
    width = fmt.index_bits + fmt.residual_bits
    main = (fmt.groups, fmt.vectors(layer.n), -(-size * width // 32) if layer.packed else size)
    found: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "indices": ((torch.int32,) if layer.packed else _SHORT, main),
        "centroids.weight": (floats, (fmt.groups, fmt.centroids * fmt.dim)),
    }
    if fmt.residual:
        found["res_centroids.weight"] = (floats, (fmt.groups, fmt.residual * fmt.dim))
        if not layer.packed:
            found["res_indices"] = (_SHORT, main)
    if o := fmt.outliers:
        found["outlier_centroids.weight"] = (floats, (1, o.centroids * o.dim))
        found["outlier_indices"] = (_SHORT, (1, -(-layer.n // o.dim), count))
    if layer.permuted:
        found["perm"] = ((torch.int16, torch.uint16, torch.int64), (layer.k,))
    if fmt.norm != "none":
        norm = (floats, (layer.k if fmt.norm == "col" else layer.n,))
        found |= {"weight_scale": norm, "weight_bias": norm}
    return found
