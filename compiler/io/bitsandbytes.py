"""Reading bitsandbytes checkpoints without the package: NF4 with or without nested scales, and LLM.int8.

Per NF4 linear layer [N, K]: `weight` uint8 [N*K/2, 1], two codes a byte, the first in the upper half;
`weight.absmax`, one scale per block of consecutive weights, float32, or a byte that is an index into
`weight.nested_quant_map` [256], times the float32 `weight.nested_absmax` of its block of blocks, plus an offset
("double quantization"); `weight.quant_map` [16], the levels; and a JSON text in the bytes of
`weight.quant_state.bitsandbytes__nf4`. Per int8 layer: `weight` int8 [N, K] and `SCB` float32 [N], the largest
magnitude of each row. After "QLoRA: Efficient Finetuning of Quantized LLMs" and "LLM.int8(): 8-bit Matrix
Multiplication for Transformers at Scale" (both Dettmers et al.); weights are read exactly, and what LLM.int8 does to
outliers in activations is not done: they stay as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.safetensors_file import SafetensorsFile
from lowbit.quantizers.formats import Format, Granularity, WeightFormat, scalar_format
from lowbit.quantizers.formats.levels import NORMAL_FLOAT4
from lowbit.quantizers.qtensor import QTensor

__all__ = ["BitsAndBytesReader", "read_layers"]

_STATE = "weight.quant_state.bitsandbytes__"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_FOUR = ("weight", "weight.absmax", "weight.quant_map", *_NESTED, f"{_STATE}nf4")
_EIGHT = ("weight", "SCB", "weight_format")


@dataclass(frozen=True)
class _Block4:
    """What the text of an NF4 layer says. size: weights per scale. nested: scales per nested scale, 0 without."""

    n: int
    k: int
    size: int
    nested: int
    offset: float


@dataclass(frozen=True)
class BitsAndBytesReader:
    """Tensors of each layer -> its weight. formats: by module path. states: of the NF4 ones."""

    formats: Mapping[str, Format]
    states: Mapping[str, _Block4]
    rows: Mapping[str, tuple[int, int]]

    def suffixes(self, path: str) -> tuple[str, ...]:
        """Names of a module's tensors."""
        return _FOUR if path in self.states else _EIGHT

    def shape(self, path: str) -> tuple[int, int] | None:
        """(N, K)."""
        state = self.states.get(path)
        return (state.n, state.k) if state else self.rows[path]

    def weight(self, path: str, tensors: Mapping[str, torch.Tensor], where: str) -> QTensor:
        """The weight, exactly as stored; raises CheckpointError (LB0122) for tensors that do not fit."""
        fmt = self.formats[path]
        return _four(fmt, self.states[path], tensors, where) if path in self.states else _eight(fmt, tensors, where)


def read_layers(
    config: Mapping[str, Any], files: Mapping[str, SafetensorsFile], where: str
) -> tuple[BitsAndBytesReader, dict[str, WeightFormat]]:
    """All quantized layers; raises CheckpointError (LB0122) for kinds that are not supported."""
    formats: dict[str, Format] = {}
    states: dict[str, _Block4] = {}
    rows: dict[str, tuple[int, int]] = {}
    for name, file in files.items():
        if f".{_STATE}" in name:
            path, _, kind = name.partition(f".{_STATE}")
            if kind != "nf4":
                raise _refused(f"weights are {kind[:20]}, not nf4", f"{where}: {path}")
            states[path] = state = _state(file.tensor(name), f"{where}: {path}")
            formats[path] = Format(scalar_format("nf4.g64").element, Granularity("g", state.size), "f32")
        elif name.endswith(".SCB"):
            path = name.removesuffix(".SCB")
            weight = f"{path}.weight"
            shape = files[weight].header.tensors[weight].shape if weight in files else ()
            if len(shape) != 2:
                raise _refused("weight must be a matrix", f"{where}: {path}")
            formats[path], rows[path] = scalar_format("int8.ch.sym.f32"), (shape[0], shape[1])
    if not formats:
        raise _refused("no tensor is quantized", where)
    return BitsAndBytesReader(formats, states, rows), dict(formats)


def _refused(why: str, where: str) -> CheckpointError:
    return CheckpointError("LB0122", why, where=where, hint="quantize the original model with lowbit")


def _state(text: torch.Tensor, where: str) -> _Block4:
    """The JSON text of a layer, checked."""
    try:
        values: dict[str, Any] = json.loads(bytes(text.to(torch.uint8).tolist()))
        n, k = (int(d) for d in values["shape"])
        size, nested = int(values["blocksize"]), int(values.get("nested_blocksize", 0))
        offset = float(values.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError) as e:
        raise _refused(f"its quant_state cannot be read: {str(e)[:100]}", where) from e
    if min(n, k, size) < 1 or nested < 0 or not math.isfinite(offset):
        raise _refused(f"its quant_state contradicts itself: {str(values)[:200]}", where)
    if k % size:
        raise _refused(f"blocks of {size} weights cross rows of {k}", where)
    return _Block4(n, k, size, nested, offset)


def _four(fmt: Format, state: _Block4, tensors: Mapping[str, torch.Tensor], where: str) -> QTensor:
    n, k, blocks = state.n, state.k, state.n * state.k // state.size
    packed = _tensor(tensors, "weight", torch.uint8, n * k // 2, where)
    levels = _tensor(tensors, "weight.quant_map", torch.float32, 16, where)
    if not torch.equal(levels, torch.tensor(NORMAL_FLOAT4)):
        raise _refused("its levels are not those of nf4", where)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(n, k)
    scale = _scales(state, blocks, tensors, where)
    if not bool(scale.isfinite().all()):
        raise _refused("a scale is not finite", where)
    return QTensor(fmt, codes, scale.reshape(n, k // state.size), None)


def _scales(state: _Block4, blocks: int, tensors: Mapping[str, torch.Tensor], where: str) -> torch.Tensor:
    """float32 [blocks], in the order and with the roundings of bitsandbytes."""
    if not state.nested:
        return _tensor(tensors, "weight.absmax", torch.float32, blocks, where)
    index = _tensor(tensors, "weight.absmax", torch.uint8, blocks, where).long()
    count = math.ceil(blocks / state.nested)
    outer = _tensor(tensors, _NESTED[0], torch.float32, count, where).repeat_interleave(state.nested)[:blocks]
    return _tensor(tensors, _NESTED[1], torch.float32, 256, where)[index] * outer + state.offset


def _eight(fmt: Format, tensors: Mapping[str, torch.Tensor], where: str) -> QTensor:
    weight = tensors["weight"]
    if weight.dtype != torch.int8:
        raise _refused(f"weight must be int8, not {weight.dtype}", where)
    if int(tensors.get("weight_format", torch.zeros(1)).max()) != 0:
        raise _refused("weight is in an order of tiles, not of rows", where)
    scale = _tensor(tensors, "SCB", torch.float32, weight.shape[0], where) / 127
    codes = (weight.to(torch.int16) + 128).to(torch.uint8)
    return QTensor(fmt, codes, scale.reshape(-1, 1), None)


def _tensor(tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype, count: int, where: str) -> torch.Tensor:
    """A tensor of `count` numbers of a type, as a vector."""
    got = tensors.get(name)
    if got is None or got.dtype != dtype or got.numel() != count:
        found = "nothing" if got is None else f"{got.numel()} of {got.dtype}"
        raise _refused(f"{name} must be {count} numbers of {dtype}, not {found}", where)
    return got.reshape(-1)
