"""Reading FP8 checkpoints with scales of blocks, as DeepSeek-V3 and Qwen3 are published (`quant_method: fp8`).

Per linear layer [N, K]: `weight` float8_e4m3fn [N, K], and `weight_scale_inv` float32 [N/b, K/b] (rounded up), which
the weights of a block of b x b are multiplied with (despite its name). After "DeepSeek-V3 Technical Report". Here a
scale belongs to a row and a group of b columns, so each is held once for every row of its block; activations, which
servers round to FP8 in groups, stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.safetensors_file import SafetensorsFile
from lowbit.quantizers.formats import Format, Granularity, WeightFormat, scalar_format
from lowbit.quantizers.qtensor import QTensor

__all__ = ["BlockReader", "read_layers"]

_SCALE = "weight_scale_inv"


@dataclass(frozen=True)
class BlockReader:
    """Tensors of each layer -> its weight. formats, shapes ((N, K)): by module path. block: rows and columns."""

    formats: Mapping[str, Format]
    shapes: Mapping[str, tuple[int, int]]
    block: tuple[int, int]

    def suffixes(self, path: str) -> tuple[str, ...]:
        """Names of a module's tensors."""
        return ("weight", _SCALE)

    def shape(self, path: str) -> tuple[int, int] | None:
        """(N, K)."""
        return self.shapes[path]

    def weight(self, path: str, tensors: Mapping[str, torch.Tensor], where: str) -> QTensor:
        """The weight, exactly as stored; raises CheckpointError (LB0122) for tensors that do not fit."""
        (n, k), (rows, columns) = self.shapes[path], self.block
        scale, want = tensors[_SCALE], (math.ceil(n / rows), math.ceil(k / columns))
        if not scale.is_floating_point() or tuple(scale.shape) != want:
            raise _refused(f"{_SCALE} must be {list(want)} floats, not {scale.dtype} {list(scale.shape)}", where)
        codes = tensors["weight"].view(torch.uint8)
        if bool(((codes & 0x7F) == 0x7F).any()) or not bool(scale.isfinite().all()):
            raise _refused("a weight or a scale is not a number", where)
        return QTensor(self.formats[path], codes, scale.float().repeat_interleave(rows, 0)[:n].contiguous(), None)


def read_layers(
    config: Mapping[str, Any], files: Mapping[str, SafetensorsFile], where: str
) -> tuple[BlockReader, dict[str, WeightFormat]]:
    """All quantized layers; raises CheckpointError (LB0122) for kinds that are not supported."""
    block = config.get("weight_block_size") or (128, 128)
    if len(block) != 2 or any(type(b) is not int or b < 1 for b in block):
        raise _refused(f"blocks of {str(block)[:40]} are not two positive numbers", where)
    if config.get("fmt", "e4m3") != "e4m3":
        raise _refused(f"weights are {str(config['fmt'])[:20]}, not e4m3", where)
    formats: dict[str, Format] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for path in [name.removesuffix(f".{_SCALE}") for name in files if name.endswith(f".{_SCALE}")]:
        name = f"{path}.weight"
        info = files[name].header.tensors[name] if name in files else None
        if info is None or info.dtype != torch.float8_e4m3fn or len(info.shape) != 2:
            raise _refused("weight must be a matrix of float8_e4m3fn", f"{where}: {path}")
        shapes[path] = (info.shape[0], info.shape[1])
        granularity = Granularity("g", block[1]) if info.shape[1] > block[1] else Granularity("ch")
        formats[path] = Format(scalar_format("e4m3.ch").element, granularity, "f32")
    if not formats:
        raise _refused("no tensor is quantized", where)
    return BlockReader(formats, shapes, (block[0], block[1])), dict(formats)


def _refused(why: str, where: str) -> CheckpointError:
    return CheckpointError("LB0122", why, where=where, hint="quantize the original model with lowbit")
