"""Reading AWQ checkpoints (the `gemm` layout of AutoAWQ) without its package.

Per linear layer [N, K] with 4-bit codes and groups of g columns: `qweight` int32 [K, N/8], eight neighbouring rows of a
column in a word; `qzeros` int32 [K/g, N/8], packed likewise; `scales` [K/g, N]. value = (code - zero) * scale. After
"AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (Lin et al.), whose scaling of channels
is in the stored weights already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.safetensors_file import SafetensorsFile
from lowbit.quantizers.formats import WIDE_DTYPES, Format, Granularity, IntElement, WeightFormat
from lowbit.quantizers.qtensor import QTensor

__all__ = ["AWQReader", "read_layers"]

_SUFFIXES = ("qweight", "qzeros", "scales")
_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""The row that each nibble of a word holds, the lowest nibble first."""


@dataclass(frozen=True)
class AWQReader:
    """Tensors of each layer -> its weight. formats, shapes ((N, K)): by module path."""

    formats: Mapping[str, Format]
    shapes: Mapping[str, tuple[int, int]]

    def suffixes(self, path: str) -> tuple[str, ...]:
        """Names of a module's tensors."""
        return _SUFFIXES

    def shape(self, path: str) -> tuple[int, int] | None:
        """(N, K)."""
        return self.shapes[path]

    def weight(self, path: str, tensors: Mapping[str, torch.Tensor], where: str) -> QTensor:
        """The weight, exactly as stored; raises CheckpointError (LB0122) for tensors that do not fit."""
        (n, k), fmt = self.shapes[path], self.formats[path]
        groups = fmt.granularity.groups(k)
        want = {"qweight": (k, n // 8), "qzeros": (groups, n // 8), "scales": (groups, n)}
        for name, shape in want.items():
            got = tensors.get(name)
            if got is None or tuple(got.shape) != shape or (name != "scales" and got.dtype != torch.int32):
                found = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
                raise _refused(f"{name} of a {n}x{k} layer must be {list(shape)}, not {found}", where)
        codes, zero = (_nibbles(tensors[name]).t().contiguous() for name in ("qweight", "qzeros"))
        return QTensor(fmt, codes, tensors["scales"].t().contiguous(), zero)


def read_layers(
    config: Mapping[str, Any], files: Mapping[str, SafetensorsFile], where: str
) -> tuple[AWQReader, dict[str, WeightFormat]]:
    """All quantized layers; raises CheckpointError (LB0122) for kinds that are not supported."""
    group = config.get("group_size", config.get("q_group_size", 128))
    version = str(config.get("version", "gemm")).lower()
    if config.get("bits", config.get("w_bit", 4)) != 4 or version != "gemm" or not config.get("zero_point", True):
        raise _refused("only 4 bits with zero points in the layout `gemm` are supported", where)
    if type(group) is not int or group == 0 or group < -1:
        raise _refused(f"group size {group!r} is not a positive number or -1", where)
    names = {dtype: name for name, dtype in WIDE_DTYPES.items()}
    granularity = Granularity("g", group) if group > 0 else Granularity("ch")
    formats: dict[str, Format] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for path in [name.removesuffix(".qweight") for name in files if name.endswith(".qweight")]:
        words = files[f"{path}.qweight"].header.tensors[f"{path}.qweight"].shape
        scales = f"{path}.scales"
        dtype = files[scales].header.tensors[scales].dtype if scales in files else None
        if len(words) != 2 or dtype not in names:
            raise _refused(f"qweight {list(words)} with scales of {dtype}", f"{where}: {path}")
        formats[path] = Format(IntElement(4, False), granularity, names[dtype])
        shapes[path] = (words[1] * 8, words[0])
    if not formats:
        raise _refused("no tensor is quantized", where)
    return AWQReader(formats, shapes), dict(formats)


def _refused(why: str, where: str) -> CheckpointError:
    return CheckpointError("LB0122", why, where=where, hint="quantize the original model with lowbit")


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [A, B] -> uint8 [A, 8 * B], in order."""
    found = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for i, place in enumerate(_PLACES):
        found[..., place] = (words >> (4 * i) & 15).to(torch.uint8)
    return found.flatten(1)
