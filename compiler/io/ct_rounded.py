"""The `int-quantized` and `float-quantized` layouts of compressed-tensors: 8-bit weights for 8-bit activations.

Per linear layer [N, K]: `weight` int8 or float8_e4m3fn, and `weight_scale` [N, 1]. Activations are rounded to the same
kind of number as they come, one scale per token; this is what vLLM runs on its 8-bit kernels. lowbit writes it where
every layer is `int8.ch.sym` with `int8.token`, or `e4m3.ch` with `e4m3.token`, and nothing else is done to inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.native import StoredInput
from lowbit.quantizers.formats import WIDE_DTYPES, Format, WeightFormat, scalar_format
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.weights import QWeight

__all__ = [
    "SUFFIXES",
    "RoundedReader",
    "can_hold",
    "formats_from_config",
    "from_tensors",
    "quantization_config",
    "tensor_shapes",
    "to_tensors",
]

SUFFIXES = ("weight", "weight_scale")
"""Names of a layer's tensors."""

_VERSION = "0.18.0"
_KINDS = {"int8": ("int", "int-quantized", torch.int8), "e4m3": ("float", "float-quantized", torch.float8_e4m3fn)}
"""Element -> its type's name, the layout's, and the dtype of the stored weight."""

_SCALES = {dtype: name for name, dtype in WIDE_DTYPES.items()}


def can_hold(formats: Mapping[str, WeightFormat], inputs: Mapping[str, StoredInput]) -> bool:
    """Whether all modules, by path, can be in one such checkpoint."""
    kinds = {_kind(fmt, inputs.get(path)) for path, fmt in formats.items()}
    return len(kinds) == 1 and None not in kinds


def _kind(fmt: WeightFormat, given: StoredInput | None) -> str | None:
    """The element that weights and activations share, None where this layout cannot hold them."""
    if not isinstance(fmt, Format) or fmt.ordered or fmt.offset or fmt.zero or fmt.granularity.kind != "ch":
        return None
    name = fmt.element.name
    rounded = given is not None and given.activation == f"{name}.token" and not given.rotate
    return name if name in _KINDS and fmt.scale in WIDE_DTYPES and rounded else None


def tensor_shapes(fmt: WeightFormat, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each stored tensor of an [n, k] matrix in `fmt`, by name."""
    assert isinstance(fmt, Format)
    return {"weight": (_KINDS[fmt.element.name][2], (n, k)), "weight_scale": (fmt.scale_dtype, (n, 1))}


def to_tensors(q: QWeight) -> dict[str, torch.Tensor]:
    """The stored tensors of `q`."""
    assert isinstance(q, QTensor)
    if q.fmt.element.name == "int8":
        weight = (q.codes.to(torch.int16) - 128).to(torch.int8)
    else:
        weight = q.codes.view(torch.float8_e4m3fn)
    return {"weight": weight.contiguous(), "weight_scale": q.scale.contiguous()}


@dataclass(frozen=True)
class RoundedReader:
    """Tensors of each layer -> its weight. formats, shapes: by module path; shapes of the stored `weight`."""

    formats: Mapping[str, WeightFormat]
    shapes: Mapping[str, tuple[int, ...]]

    def suffixes(self, path: str) -> tuple[str, ...]:
        """Names of a module's tensors."""
        return SUFFIXES

    def shape(self, path: str) -> tuple[int, int] | None:
        """(N, K), None where `weight` is no matrix or not there, which `weight` refuses."""
        n, k, *rest = (*self.shapes.get(path, ()), 0, 0)
        return (n, k) if len(rest) == 2 else None

    def weight(self, path: str, tensors: Mapping[str, torch.Tensor], where: str) -> QTensor:
        """As `from_tensors`."""
        return from_tensors(self.formats[path], tensors, where)


def from_tensors(fmt: WeightFormat, tensors: Mapping[str, torch.Tensor], where: str) -> QTensor:
    """Inverse of `to_tensors`, bit-exact; raises CheckpointError (LB0114), naming `where`, for tensors that do not
    fit."""
    assert isinstance(fmt, Format)
    weight = tensors.get("weight")
    shape = tuple(weight.shape) if weight is not None and weight.dim() == 2 else (0, 0)
    for name, (dtype, want) in tensor_shapes(fmt, *shape).items():
        got = tensors.get(name)
        if got is None or got.dtype != dtype or tuple(got.shape) != want or 0 in shape:
            found = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
            raise CheckpointError("LB0114", f"{name} of {fmt} must be {dtype} {list(want)}, not {found}", where=where)
    assert weight is not None
    codes = weight.view(torch.uint8) if fmt.element.name == "e4m3" else (weight.to(torch.int16) + 128).to(torch.uint8)
    return QTensor(fmt, codes, tensors["weight_scale"])


def quantization_config(formats: Mapping[str, WeightFormat], kept: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint: `formats` by module path, and the linear layers kept as they are."""
    fmt = next(iter(formats.values()))
    assert isinstance(fmt, Format)
    kind, layout, _ = _KINDS[fmt.element.name]
    common = {"num_bits": 8, "type": kind, "symmetric": True, "group_size": None}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(kept),
        "kv_cache_scheme": None,
        "version": _VERSION,
    }


def formats_from_config(
    config: Mapping[str, Any], scales: Mapping[str, torch.dtype], where: str
) -> tuple[dict[str, WeightFormat], dict[str, StoredInput]] | None:
    """Formats and inputs of the modules that have `scales` (their dtype by path); None when the config has another
    layout. Raises CheckpointError (LB0114) for schemes of 8 bits that lowbit does not run."""
    element = next((name for name, (_, layout, _) in _KINDS.items() if config.get("format") == layout), None)
    if element is None:
        return None
    groups = config.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) and len(groups) == 1 else None
    weights, inputs = (group.get(k) for k in ("weights", "input_activations")) if isinstance(group, dict) else (0, 0)
    if not _is(weights, element, "channel", False) or not _is(inputs, element, "token", True):
        why = f"{config['format']} is read with scales per channel and dynamic ones per token, in one group"
        raise CheckpointError("LB0114", why, where=where)
    unknown = [path for path, dtype in scales.items() if dtype not in _SCALES]
    if unknown:
        raise CheckpointError("LB0114", "weight_scale must be a float", where=f"{where}: {unknown[0]}")
    symmetry = ".sym" if element == "int8" else ""
    formats: dict[str, WeightFormat] = {
        path: scalar_format(f"{element}.ch{symmetry}.{_SCALES[dtype]}") for path, dtype in scales.items()
    }
    return formats, dict.fromkeys(formats, StoredInput(f"{element}.token"))


def _is(values: Any, element: str, strategy: str, dynamic: bool) -> bool:
    """Whether one side of a config group is what this layout means here."""
    if not isinstance(values, dict):
        return False
    kind = values.get("type", "int") == _KINDS[element][0] and values.get("num_bits") == 8
    how = values.get("strategy") == strategy and bool(values.get("dynamic")) == dynamic
    return kind and how and values.get("symmetric", True) is True
