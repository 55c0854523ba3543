"""The layouts of compressed-tensors for small floats, written and read without the package.

    mxfp4-pack-quantized  weight_packed uint8 [N, K/2], weight_scale uint8 [N, K/32] (e8m0 bytes)
    nvfp4-pack-quantized  weight_packed uint8 [N, K/2], weight_scale e4m3 [N, K/16], weight_global_scale float32 [1]
    naive-quantized       weight e4m3 [N, K], weight_scale [N, 1] (with rounded activations it is `ct_rounded.py`'s)

Two e2m1 codes share a byte, the even column's in the low half. A weight is code * scale / weight_global_scale: the
reciprocal of lowbit's scale per tensor, which is chosen so that this loses nothing (`scales.tensor_scale_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.compiler.errors import CheckpointError, FormatError
from lowbit.quantizers.formats import WIDE_DTYPES, FloatElement, Format, Granularity, WeightFormat, scalar_format
from lowbit.quantizers.qtensor import QTensor

__all__ = ["from_tensors", "group_weights", "layout_of", "parse_weights", "scale_note", "tensor_shapes", "to_tensors"]

_MXFP4, _NVFP4 = scalar_format("mxfp4"), scalar_format("nvfp4")
_E4M3 = FloatElement(4, 3, "fn")


def layout_of(fmt: WeightFormat) -> str | None:
    """The compressed-tensors `format` that holds `fmt`, or None when none of these does."""
    if fmt == _MXFP4:
        return "mxfp4-pack-quantized"
    if fmt == _NVFP4:
        return "nvfp4-pack-quantized"
    if not isinstance(fmt, Format) or fmt.element != _E4M3 or fmt.granularity.kind != "ch" or fmt.tensor:
        return None
    return "naive-quantized" if fmt.scale in WIDE_DTYPES and not fmt.ordered and not fmt.channel else None


def misfit(fmt: Format, k: int) -> str | None:
    """Why a matrix with `k` columns does not fit the layout of `fmt`, or None."""
    group = fmt.granularity.group
    return f"groups of {group} do not divide {k} columns" if group and k % group else None


def scale_note(fmt: WeightFormat, dtype: torch.dtype) -> str | None:
    """What transformers (5.23) cannot do: it decodes e2m1 weights to bfloat16 whatever the model's dtype is."""
    if isinstance(fmt, Format) and fmt.bits == 4 and layout_of(fmt) and dtype != torch.bfloat16:
        return f"transformers runs {fmt} in bfloat16 models only"
    return None


def tensor_shapes(fmt: WeightFormat, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each stored tensor of an [n, k] matrix in `fmt`, by name."""
    assert isinstance(fmt, Format)
    if layout_of(fmt) == "naive-quantized":
        return {"weight": (torch.float8_e4m3fn, (n, k)), "weight_scale": (fmt.scale_dtype, (n, 1))}
    groups = fmt.granularity.groups(k)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight_packed": (torch.uint8, (n, k // 2))}
    shapes["weight_scale"] = (torch.float8_e4m3fn if fmt.tensor else torch.uint8, (n, groups))
    return shapes | ({"weight_global_scale": (torch.float32, (1,))} if fmt.tensor else {})


def to_tensors(q: Any) -> dict[str, Tensor]:
    """The stored tensors of `q`, a QTensor in a format that `layout_of` knows."""
    assert isinstance(q, QTensor)
    if layout_of(q.fmt) == "naive-quantized":
        return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": q.scale.contiguous()}
    packed = q.codes[:, 0::2] | q.codes[:, 1::2] << 4
    if q.tensor_scale is None:
        return {"weight_packed": packed, "weight_scale": q.scale.contiguous().view(torch.uint8)}
    return {"weight_packed": packed, "weight_scale": q.scale.contiguous(), "weight_global_scale": 1 / q.tensor_scale}


def from_tensors(fmt: WeightFormat, tensors: Mapping[str, Tensor], where: str) -> QTensor:
    """Inverse of `to_tensors`, bit-exact.

    Raises CheckpointError (LB0114), naming `where`, when a tensor is missing, has the wrong shape or type, or holds
    what stands for no number.
    """
    assert isinstance(fmt, Format)
    name = "weight" if layout_of(fmt) == "naive-quantized" else "weight_packed"
    codes = tensors.get(name)
    if codes is None or codes.ndim != 2 or not codes.numel():
        raise CheckpointError("LB0114", f"{name} must be a matrix", where=where)
    n, k = codes.shape[0], codes.shape[1] * (1 if name == "weight" else 2)
    for name, (dtype, shape) in tensor_shapes(fmt, n, k).items():
        actual = tensors.get(name)
        if actual is None or actual.dtype != dtype or tuple(actual.shape) != shape:
            found = "missing" if actual is None else f"{actual.dtype} {list(actual.shape)}"
            raise CheckpointError("LB0114", f"{name} of {fmt} must be {dtype} {list(shape)}, not {found}", where=where)
    if not bool(_numbers(fmt, tensors)):
        raise CheckpointError("LB0114", f"weights or scales of {fmt} hold NaN or infinity", where=where)
    try:
        return _qtensor(fmt, tensors)
    except FormatError as e:
        raise CheckpointError("LB0114", e.message, where=where) from e


def _numbers(fmt: Format, tensors: Mapping[str, Tensor]) -> bool:
    floats = [t.float() for t in tensors.values() if t.is_floating_point()]
    finite = all(bool(t.isfinite().all()) for t in floats)
    whole = tensors.get("weight_global_scale")
    powers = fmt.scale != "e8m0" or not bool((tensors["weight_scale"] == 255).any())
    return finite and powers and (whole is None or bool((whole > 0).all()))


def _qtensor(fmt: Format, tensors: Mapping[str, Tensor]) -> QTensor:
    if layout_of(fmt) == "naive-quantized":
        return QTensor(fmt, tensors["weight"].view(torch.uint8), tensors["weight_scale"])
    packed = tensors["weight_packed"]
    codes = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
    if fmt.tensor:
        return QTensor(fmt, codes, tensors["weight_scale"], tensor_scale=1 / tensors["weight_global_scale"])
    return QTensor(fmt, codes, tensors["weight_scale"].view(torch.float8_e8m0fnu))


def group_weights(fmt: Format) -> dict[str, Any]:
    """The `weights` of a config group: what compressed-tensors calls FP8, MXFP4A16 and NVFP4A16."""
    values: dict[str, Any] = {"num_bits": fmt.bits, "type": "float", "symmetric": True, "dynamic": False}
    if layout_of(fmt) == "naive-quantized":
        return values | {"strategy": "channel", "group_size": None}
    scale = "torch.float8_e4m3fn" if fmt.tensor else "torch.uint8"
    strategy = "tensor_group" if fmt.tensor else "group"
    return values | {"strategy": strategy, "group_size": fmt.granularity.group, "scale_dtype": scale}


def parse_weights(weights: Mapping[str, Any], scale: torch.dtype, where: str) -> Format:
    """Inverse of `group_weights`, for configs that any tool wrote; raises CheckpointError (LB0114)."""
    bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    found = None
    if bits == 4:
        pairs = {(16, torch.float8_e4m3fn): _NVFP4, (32, torch.uint8): _MXFP4}
        found = pairs.get((size, scale)) if isinstance(size, int) else None
    names = {dtype: name for name, dtype in WIDE_DTYPES.items()}
    if bits == 8 and strategy == "channel" and scale in names:
        found = Format(_E4M3, Granularity("ch"), names[scale])
    if found is None or not weights.get("symmetric", True):
        raise CheckpointError(
            "LB0114", f"{bits!r}-bit floats, strategy {strategy!r}, group size {size!r}: not supported", where=where
        )
    return found
