"""Writing GPTQ's layout (see `compiler.io.gptq`, of which this is the inverse).

Symmetric weights of 2, 4 and 8 bits are written as v1, which every program reads. Others are written as v2, because
GPTQModel (7.7) refuses v1 with zero points unless it made the file itself, and adds other numbers than one to the 3-bit
zero points of v1.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lowbit.compiler.io.column_groups import grouped_columns
from lowbit.quantizers.bitstream import pack_bits
from lowbit.quantizers.formats import Format, IntElement, WeightFormat
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.weights import QWeight

__all__ = ["can_express", "checkpoint_format", "quantization_config", "tensor_shapes", "to_tensors"]

_BITS = (2, 3, 4, 8)
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM calls layers that it runs as one: the name it looks for when all of them stay as they are."""


def can_express(fmt: WeightFormat, n: int, k: int) -> str | None:
    """None when GPTQ's layout holds an [n, k] matrix in `fmt`, else the reason."""
    if not isinstance(fmt, Format):
        return "GPTQ's layout holds one code per weight"
    return _values_problem(fmt) or _sides_problem(fmt) or _size_problem(fmt, n, k)


def _values_problem(fmt: Format) -> str | None:
    if fmt.terms > 1:
        return "GPTQ's layout holds one number per weight, no sums"
    if not isinstance(fmt.element, IntElement):
        return f"GPTQ's layout holds integers, not {fmt.element.name}"
    if fmt.bits not in _BITS:
        return f"GPTQ's layout holds 2, 3, 4 or 8 bits, not {fmt.bits}"
    return "GPTQ's layout has integer zero points only" if fmt.offset else None


def _sides_problem(fmt: Format) -> str | None:
    if fmt.tensor or fmt.channel:
        return "GPTQ's layout has one scale for a weight, not a product of two"
    if fmt.granularity.kind == "t":
        return "GPTQ's layout needs scales per channel or per group"
    if fmt.scale != "f16":
        return (
            f"GPTQ's scales are float16, not {fmt.scale}: quantize the original model with {replace(fmt, scale='f16')}"
        )
    return None


def _size_problem(fmt: Format, n: int, k: int) -> str | None:
    group = fmt.granularity.group_size(k)
    if k % group:
        return f"groups of {group} do not divide {k} columns"
    for name, count in (("rows", n), ("columns", k)):
        if count * fmt.bits % 32:
            return f"{count} {name} of {fmt.bits} bits do not fill words of 32"
    return None


def checkpoint_format(fmt: Format) -> str:
    """`gptq` (v1) or `gptq_v2`: what layers in `fmt` are written as."""
    return "gptq_v2" if fmt.zero or fmt.bits == 3 else "gptq"


def tensor_shapes(fmt: WeightFormat, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each stored tensor of an [n, k] matrix in `fmt`, by name."""
    assert isinstance(fmt, Format)
    groups = fmt.granularity.groups(k)
    return {
        "qweight": (torch.int32, (k * fmt.bits // 32, n)),
        "qzeros": (torch.int32, (groups, n * fmt.bits // 32)),
        "scales": (torch.float16, (groups, n)),
        "g_idx": (torch.int32, (k,)),
    }


def to_tensors(q: QWeight, zero_offset: int | None = None) -> dict[str, torch.Tensor]:
    """The stored tensors of `q`, a QTensor in a format that `can_express` takes.

    zero_offset: what is subtracted from zero points, 1 in v1 and 0 in v2; that of `checkpoint_format` when None.
    """
    assert isinstance(q, QTensor)
    n, bits = q.shape[0], q.fmt.bits
    offset = int(checkpoint_format(q.fmt) == "gptq") if zero_offset is None else zero_offset
    zero = torch.full(q.scale.shape, 2 ** (bits - 1), dtype=torch.uint8) if q.zero is None else q.zero
    ones = pack_bits(torch.full((1, n), offset, dtype=torch.uint8), bits)
    codes, g_idx = grouped_columns(q)
    return {
        "qweight": pack_bits(codes, bits).t().contiguous(),
        "qzeros": pack_bits(zero.t().contiguous(), bits) - ones,  # whole words: what is below zero borrows
        "scales": q.scale.t().contiguous(),
        "g_idx": g_idx,
    }


def quantization_config(formats: Mapping[str, WeightFormat], kept: Iterable[str], head: str) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint, which is its quantize_config.json too.

    formats: by module path, all the same but for whether columns have an order. kept: linear layers left as they are,
    without the output layer. head: the output layer's path.
    """
    fmt = next(iter(formats.values()))
    assert isinstance(fmt, Format)
    version = checkpoint_format(fmt)
    dynamic: dict[str, dict[str, Any]] = {_exclusion(path): {} for path in _with_fused(kept)}
    return {
        "bits": fmt.bits,
        "group_size": fmt.granularity.group or -1,
        "desc_act": any(isinstance(f, Format) and f.ordered for f in formats.values()),
        "sym": not fmt.zero,
        "lm_head": head in formats,
        "quant_method": "gptq",
        "checkpoint_format": version,
        "format": version,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"lowbit:{importlib.metadata.version('lowbit')}"]},
    }


def _with_fused(kept: Iterable[str]) -> list[str]:
    """`kept` in order, and the names of what vLLM fuses from them."""
    paths = set(kept)
    parents = {path.rpartition(".")[0] for path in paths}
    found = {
        f"{parent}.{name}"
        for parent in parents
        for name, parts in _FUSED.items()
        if all(f"{parent}.{part}" in paths for part in parts)
    }
    return sorted(paths | found)


def _exclusion(path: str) -> str:
    return f"-:^{re.escape(path)}$"
