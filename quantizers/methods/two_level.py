"""Two levels of scales: rows become bytes, and groups of these bytes become codes, by whole numbers.

After "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving": a kernel turns codes into the bytes
with integer instructions and multiplies integers over whole rows. Bytes stay within 119, so that rounding to multiples
of a group's scale of up to 16, as four bits have, cannot leave [-128, 127].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.quantizers.formats import Format
from lowbit.quantizers.methods.grid import Grid
from lowbit.quantizers.qtensor import QTensor

__all__ = ["BYTE_LIMIT", "round_two_levels", "two_level_grid", "within_bytes"]

BYTE_LIMIT = 119
"""The largest magnitude of a row's bytes: 119 and half a group scale of 16 is 127."""


def round_two_levels(weight: Tensor, fmt: Format) -> QTensor:
    """float32 [N, K], rounded to nearest at both levels; every group covers its range. `fmt` has `i8ch` scales."""
    n, k = weight.shape
    size, groups = fmt.granularity.group_size(k), fmt.granularity.groups(k)
    rows = (weight.abs().amax(1, keepdim=True) / BYTE_LIMIT).half()
    rows = torch.where(rows > 0, rows, torch.ones_like(rows))
    level = (weight / rows.float()).round().clamp(-BYTE_LIMIT, BYTE_LIMIT)
    ragged = groups * size - k
    padded = torch.nn.functional.pad(level, (0, ragged), mode="replicate") if ragged else level
    units = padded.reshape(n, groups, size)
    top = 2**fmt.bits - 1
    if fmt.zero:
        low, high = units.amin(-1).clamp(max=0), units.amax(-1).clamp(min=0)  # zero stays a level
        scale = ((high - low) / top).round().clamp(min=1)
        zero = (-low / scale).round().clamp(0, top)
        middle = zero
    else:
        scale = (units.abs().amax(-1) / max(top // 2, 1)).round().clamp(min=1)
        zero, middle = None, torch.full_like(scale, float(fmt.element.bias))
    codes = ((units / scale[..., None]).round() + middle[..., None]).clamp(0, top)
    points = None if zero is None else zero.to(torch.uint8)
    found = codes.reshape(n, -1)[:, :k].to(torch.uint8)
    return within_bytes(QTensor(fmt, found, scale.to(torch.int8), points, channel_scale=rows))


def within_bytes(q: QTensor) -> QTensor:
    """`q` with the codes whose bytes would leave [-128, 127] moved to the nearest that do not.

    Few bits have large scales, and a symmetric format one level more below zero.
    """
    k, size = q.shape[1], q.fmt.granularity.group_size(q.shape[1])
    scale = q.scale.float()
    middle = torch.full_like(scale, float(q.fmt.element.bias)) if q.zero is None else q.zero.float()
    ends = (middle - (128 / scale).floor()).clamp(min=0), (middle + (127 / scale).floor()).clamp(max=2**q.fmt.bits - 1)
    least, most = (end.to(torch.uint8).repeat_interleave(size, 1)[:, :k] for end in ends)
    return replace(q, codes=torch.minimum(torch.maximum(q.codes, least), most))


def two_level_grid(weight: Tensor, fmt: Format) -> Grid:
    """The scales and zero points of `round_two_levels`, for methods that choose codes of their own."""
    q = round_two_levels(weight, fmt)
    channel = q.channel_scale.float() if q.channel_scale is not None else None
    return Grid(fmt, q.full_scale, None if q.zero is None else q.zero.float(), channel=channel)
