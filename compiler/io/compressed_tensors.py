"""The `pack-quantized` layout of compressed-tensors, written and read without the package, and which formats its
layouts hold (those of small floats are in `ct_floats.py`).

Per linear layer [N, K] with b-bit integers: `weight_packed` int32 [N, ceil(K*b/32)], a dense stream of offset-binary
codes per row, low bits first; `weight_scale` [N, groups]; for asymmetric formats `weight_zero_point` int32
[ceil(N*b/32), groups], the same stream along N; `weight_shape` int64 [2]. lowbit's native layout uses the same tensors
for every format, so only the config differs.

Readers differ. compressed-tensors before 0.18 spread 3, 5, 6 and 7 bit codes over words without straddling (10, 6, 5
and 4 codes a word), and refuses the dense stream by its shape; 2, 4 and 8 bits are the same in every version. From 0.18
on, transformers (5.23) cannot place packed zero points in a compressed module and refuses them by shape, so checkpoints
with zero points ask for `dequantize`, which decodes while loading. That path decodes every layer by the first group, so
zero points and several formats do not go together (`config_problem`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError, FormatError
from lowbit.compiler.io import ct_floats
from lowbit.compiler.io.column_groups import column_order
from lowbit.quantizers.formats import (
    WIDE_DTYPES,
    Format,
    Granularity,
    IntElement,
    VectorFormat,
    WeightFormat,
)
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.weights import QWeight, from_stored, stored, stored_shapes

__all__ = [
    "G_IDX",
    "can_express",
    "column_order_of",
    "config_problem",
    "formats_from_config",
    "from_tensors",
    "quantization_config",
    "scale_note",
    "tensor_shapes",
    "to_tensors",
]

_VERSION = "0.18.0"
"""The oldest compressed-tensors that reads every width densely packed."""

G_IDX = "weight_g_idx"
"""int32 [K], where columns are in activation order (`actorder`): the group of each. Only read."""

_SCALE_NAMES = {dtype: name for name, dtype in WIDE_DTYPES.items()}


def can_express(fmt: WeightFormat, n: int | None = None, k: int | None = None) -> str | None:
    """None when compressed-tensors can hold `fmt` (for an [n, k] matrix, when given), else the reason."""
    if not isinstance(fmt, Format):
        return "pack-quantized holds one code per weight"
    if ct_floats.layout_of(fmt):
        return ct_floats.misfit(fmt, k) if k is not None else None
    if fmt.terms > 1:
        return "pack-quantized holds one number per weight, no sums"
    if fmt.offset:
        return "pack-quantized has integer zero points only"
    if fmt.ordered:
        return "pack-quantized keeps columns in the matrix's order"
    if not isinstance(fmt.element, IntElement):
        return f"pack-quantized holds integers, not {fmt.element.name}"
    if fmt.scale not in WIDE_DTYPES:
        return f"pack-quantized with integers has no {fmt.scale} scales"
    if fmt.bits == 1 and fmt.element.symmetric:
        return "one-bit codes stand for -1 and 0 in compressed-tensors, not for -1 and +1"
    if fmt.granularity.kind == "t":
        return "pack-quantized needs scales per channel or per group"
    if k is not None and fmt.granularity.kind == "g" and k % fmt.granularity.group:
        return f"groups of {fmt.granularity.group} do not divide {k} columns"
    return None


def config_problem(formats: Iterable[WeightFormat]) -> str | None:
    """None when one checkpoint can hold all `formats` for every reader, else the reason."""
    distinct = set(formats)
    if len({ct_floats.layout_of(fmt) for fmt in distinct}) > 1:
        return "a checkpoint has one layout for all layers"
    if len(distinct) > 1 and any(isinstance(fmt, Format) and fmt.zero for fmt in distinct):
        return "transformers decodes all layers of a checkpoint with zero points by one format"
    return None


def scale_note(fmt: Format, dtype: torch.dtype) -> str | None:
    """What other loaders lose: they cast scales to the model's dtype, where lowbit keeps the stored one.

    Measured with transformers 5.23: the scales of a float32 model stay exact, those of a bfloat16 model are rounded
    to 8 significant bits unless the format stores bfloat16. Weights with zero points are decoded in the scales' dtype.
    """
    if ct_floats.layout_of(fmt) and fmt.scale not in WIDE_DTYPES:
        return ct_floats.scale_note(fmt, dtype)
    exact = fmt.scale_dtype == dtype if fmt.zero else torch.promote_types(fmt.scale_dtype, dtype) == dtype
    if exact:
        return None
    want, model = _SCALE_NAMES.get(dtype), str(dtype).removeprefix("torch.")
    hint = f"; with .{want} scales it loads exactly" if want else ""
    if fmt.zero:
        return f"transformers decodes {fmt} in {fmt.scale} before it casts to the model's {model}{hint}"
    return f"transformers casts the {fmt.scale} scales of {fmt} to the model's {model}{hint}"


def tensor_shapes(fmt: WeightFormat, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each stored tensor of an [n, k] matrix in `fmt`, by name."""
    return stored_shapes(fmt, n, k)


def to_tensors(q: QWeight) -> dict[str, torch.Tensor]:
    """The stored tensors of `q`."""
    return stored(q)


def from_tensors(fmt: WeightFormat, tensors: Mapping[str, torch.Tensor], where: str) -> QWeight:
    """Inverse of `to_tensors`, bit-exact.

    Raises CheckpointError (LB0114), naming `where`, when a tensor is missing or has the wrong shape or type.
    """
    if (g_idx := tensors.get(G_IDX)) is not None:
        return _ordered(fmt, g_idx, {name: t for name, t in tensors.items() if name != G_IDX}, where)
    n, k = _matrix_shape(fmt, tensors, where)
    for name, (dtype, shape) in stored_shapes(fmt, n, k).items():
        actual = tensors.get(name)
        if actual is None:
            raise CheckpointError("LB0114", f"{name} is missing", where=where)
        if actual.dtype != dtype or tuple(actual.shape) != shape:
            found = f"{actual.dtype} {list(actual.shape)}"
            raise CheckpointError(
                "LB0114", f"{name} of {fmt} {n}x{k} must be {dtype} {list(shape)}, not {found}", where=where
            )
    try:
        return from_stored(fmt, n, k, tensors)
    except FormatError as e:
        raise CheckpointError("LB0114", e.message, where=where) from e


def _ordered(fmt: WeightFormat, g_idx: torch.Tensor, tensors: Mapping[str, torch.Tensor], where: str) -> QWeight:
    """A weight whose columns are in place, with the group of each (`actorder`)."""
    assert isinstance(fmt, Format)
    q = from_tensors(replace(fmt, ordered=False), tensors, where)
    assert isinstance(q, QTensor)
    order = column_order_of(fmt, g_idx, where)
    if g_idx.numel() != q.shape[1] or (order is not None) != fmt.ordered:
        raise CheckpointError("LB0114", f"{G_IDX} does not fit {q.fmt} {q.shape[0]}x{q.shape[1]}", where=where)
    return q if order is None else replace(q, codes=q.codes[:, order]).in_order(order)


def column_order_of(fmt: Format, g_idx: torch.Tensor, where: str) -> torch.Tensor | None:
    """int64 [K]: the order of columns in which groups are contiguous, or None when they are; -1 is no group at all.

    Raises CheckpointError (LB0114) for what are no groups.
    """
    if fmt.granularity.kind != "g" or bool((g_idx == -1).all()):
        return None
    try:
        return column_order(g_idx, fmt.granularity.group)
    except FormatError as e:
        raise CheckpointError("LB0114", e.message, where=where) from e


def _matrix_shape(fmt: WeightFormat, tensors: Mapping[str, torch.Tensor], where: str) -> tuple[int, int]:
    shape = tensors.get("weight_shape")
    if shape is None or shape.numel() != 2 or shape.is_floating_point():
        raise CheckpointError("LB0114", "weight_shape must be two integers", where=where)
    n, k = (int(v) for v in shape.reshape(-1))
    name, rows, widest = "weight_packed", n, 32  # columns that one word may stand for
    if isinstance(fmt, VectorFormat):
        name, widest = "indices", 32 * (fmt.dim if fmt.axis == "in" else fmt.groups)
        rows = fmt.vectors(n) * fmt.groups
    packed = tensors.get(name)
    # Bounded by the tensor that is there, so that a lie cannot ask for memory.
    fits = packed is not None and packed.ndim == 2 and n > 0 and rows == packed.shape[0]
    rest = tensors["perm"].numel() if "perm" in tensors else 0
    if packed is None or not fits or not 0 < k <= max(packed.shape[1] * widest, rest):
        raise CheckpointError("LB0114", f"weight_shape {n}x{k} does not fit {name}", where=where)
    return n, k


def quantization_config(formats: Mapping[str, WeightFormat], kept: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint: `formats` by module path, and the paths of linear layers kept as is.

    One format is a group for every Linear, with the kept ones ignored; several formats are groups of named layers.
    """
    groups: dict[Format, list[str]] = {}
    for path, fmt in formats.items():
        assert isinstance(fmt, Format), f"compressed-tensors has no {fmt}"
        groups.setdefault(fmt, []).append(path)
    single = len(groups) == 1
    asymmetric = {"dequantize": True} if any(fmt.zero for fmt in groups) else {}
    layouts = {ct_floats.layout_of(fmt) or "pack-quantized" for fmt in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _group(fmt, ["Linear"] if single else paths) for i, (fmt, paths) in enumerate(groups.items())
        },
        "ignore": sorted(kept),
        "kv_cache_scheme": None,
        "version": _VERSION,
        **asymmetric,
    }


def _group(fmt: Format, targets: list[str]) -> dict[str, Any]:
    layout, by_group = ct_floats.layout_of(fmt), fmt.granularity.kind == "g"
    integers = {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": not fmt.zero,
        "strategy": "group" if by_group else "channel",
        "group_size": fmt.granularity.group if by_group else None,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": ct_floats.group_weights(fmt) if layout else integers,
        "input_activations": None,
        "output_activations": None,
        "format": layout or "pack-quantized",
    }


def formats_from_config(config: Mapping[str, Any], scales: Mapping[str, torch.dtype], where: str) -> dict[str, Format]:
    """Format of every packed module of a checkpoint that any tool wrote.

    scales: scale dtype by module path. Raises CheckpointError (LB0114) for what pack-quantized weights cannot be.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise CheckpointError("LB0114", "quantization_config has no config_groups", where=where)
    formats = {}
    for path, dtype in scales.items():
        group = next((g for match in (_named, _any_linear) for g in groups.values() if match(g, path)), None)
        if group is None:
            raise CheckpointError("LB0114", "no config group has this module as a target", where=f"{where}: {path}")
        formats[path] = _format(group, dtype, f"{where}: {path}")
    return formats


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    return [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []


def _named(group: Mapping[str, Any], path: str) -> bool:
    return any(t == path or (t.startswith("re:") and _regex(t[3:], path)) for t in _targets(group))


def _regex(pattern: str, path: str) -> bool:
    # Patterns come from the checkpoint: a long one is a way to hang the matcher.
    if len(pattern) > 500:
        return False
    try:
        return re.match(pattern, path) is not None
    except re.error:
        return False


def _any_linear(group: Mapping[str, Any], path: str) -> bool:
    return "Linear" in _targets(group)


def _format(group: Mapping[str, Any], scale: torch.dtype, where: str) -> Format:
    weights = group.get("weights")
    if group.get("input_activations") is not None:
        raise CheckpointError("LB0114", "quantized activations are not supported", where=where)
    if isinstance(weights, dict) and weights.get("type") == "float":
        return ct_floats.parse_weights(weights, scale, where)
    if not isinstance(weights, dict) or weights.get("type", "int") != "int" or scale not in _SCALE_NAMES:
        raise CheckpointError("LB0114", "only weights with float scales are supported", where=where)
    bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    if type(bits) is not int or not 1 <= bits <= 8:
        raise CheckpointError("LB0114", f"{bits!r} bits are not supported", where=where)
    if strategy is None:
        strategy = "group" if type(size) is int and size > 0 else "channel"
    if strategy not in ("group", "channel") or (strategy == "group" and type(size) is not int):
        raise CheckpointError("LB0114", f"strategy {strategy!r} with group size {size!r} is not supported", where=where)
    columns = size if isinstance(size, int) else 0
    granularity = Granularity("g", columns) if strategy == "group" else Granularity("ch")
    try:
        return Format(IntElement(bits, bool(weights.get("symmetric", True))), granularity, _SCALE_NAMES[scale])
    except FormatError as e:
        raise CheckpointError("LB0114", e.message, where=where) from e
