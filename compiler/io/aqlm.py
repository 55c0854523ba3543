"""Reading AQLM checkpoints without its package: one or two codebooks, vectors along the inputs of one output row.

Per linear layer [N, K] with vectors of g columns and B codebooks of 2^b centroids: `codes` [N, K/g, B], a signed view
(int8 up to 8 bits, else int16) of b unsigned bits; `codebooks` [B, 2^b, 1, g]; `scales` [N, 1, 1, 1]; the value of a
vector is the sum of its B centroids, times the scale of its row. After "Extreme Compression of Large Language Models
via Additive Quantization" (Egiazarian et al.).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError, FormatError
from lowbit.compiler.io.safetensors_file import SafetensorsFile, TensorInfo
from lowbit.quantizers.formats import WIDE_DTYPES, VectorFormat, WeightFormat
from lowbit.quantizers.vqtensor import VQTensor

__all__ = ["AQLMReader", "read_layers"]

_SUFFIXES = ("codes", "codebooks", "scales")
_BOOKS, _BITS = (1, 2), (1, 16)
_TABLES = {dtype: name for name, dtype in WIDE_DTYPES.items()}
_DEFAULTS = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 16}
"""Settings that a config may leave out, with what transformers then takes."""


@dataclass(frozen=True)
class AQLMReader:
    """Tensors of each layer -> its weight. formats, shapes ((N, K)): by module path."""

    formats: Mapping[str, VectorFormat]
    shapes: Mapping[str, tuple[int, int]]

    def suffixes(self, path: str) -> tuple[str, ...]:
        """Names of a module's tensors."""
        return _SUFFIXES

    def shape(self, path: str) -> tuple[int, int] | None:
        """(N, K)."""
        return self.shapes[path]

    def weight(self, path: str, tensors: Mapping[str, torch.Tensor], where: str) -> VQTensor:
        """The weight, exactly as stored; raises CheckpointError (LB0122) for numbers that stand for none."""
        fmt, (n, k) = self.formats[path], self.shapes[path]
        books = [book[:, 0].to(fmt.book_dtype).contiguous() for book in tensors["codebooks"]]
        scale = tensors["scales"].reshape(n).to(fmt.scale_dtype)
        if not all(bool(values.isfinite().all()) for values in (scale, *books)):
            raise _refused("a scale or a centroid is not finite", where)
        codes = _unsigned(tensors["codes"], fmt.index_bits, where)
        found = {"indices": codes[..., 0].contiguous(), "centroids": books[0][None]}
        if fmt.residual:
            found |= {"residual": codes[..., 1].contiguous(), "residual_centroids": books[1][None]}
        return VQTensor(fmt, n, k, **found, norm_scale=scale, norm_bias=torch.zeros_like(scale))


def read_layers(
    config: Mapping[str, Any], files: Mapping[str, SafetensorsFile], where: str
) -> tuple[AQLMReader, dict[str, WeightFormat]]:
    """All quantized layers, their tensors' types and shapes checked against the config.

    Raises CheckpointError (LB0122) for kinds that are not supported, and for tensors that contradict the config.
    """
    sizes = _settings(config, where)
    kept = config.get("linear_weights_not_to_quantize") or []
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise _refused("linear_weights_not_to_quantize must be a list of names", where)
    formats: dict[str, VectorFormat] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in files if name.endswith((".codes", ".codebooks"))):
        place = f"{where}: {path[:200]}"
        if f"{path}.weight" in kept:
            raise _refused("has codes, but the config says that it is not quantized", place)
        names = {name: files[f"{path}.{name}"] for name in _SUFFIXES if f"{path}.{name}" in files}
        infos = {name: file.header.tensors[f"{path}.{name}"] for name, file in names.items()}
        formats[path], shapes[path] = _layer(sizes, infos, place)
    if not formats:
        raise _refused("no tensor is quantized", where)
    return AQLMReader(formats, shapes), dict(formats)


def _refused(why: str, where: str) -> CheckpointError:
    return CheckpointError("LB0122", why, where=where, hint="quantize the original model with lowbit")


def _settings(config: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """(columns of a vector, codebooks, bits of an index) of a supported kind."""
    values = {key: config.get(key, usual) for key, usual in _DEFAULTS.items()}
    columns, rows, books, bits = values.values()
    whole = all(type(value) is int for value in values.values())
    if not whole or rows != 1 or books not in _BOOKS or not _BITS[0] <= bits <= _BITS[1] or columns < 1:
        found = ", ".join(f"{key} {str(value)[:40]}" for key, value in values.items())
        raise _refused(f"only one or two codebooks of 1 to 16 bits with vectors of one row are read: {found}", where)
    return columns, books, bits


def _layer(
    sizes: tuple[int, int, int], infos: Mapping[str, TensorInfo], where: str
) -> tuple[VectorFormat, tuple[int, int]]:
    """Format and (N, K) of a layer, from the headers of its tensors."""
    columns, books, bits = sizes
    shape = infos["codes"].shape if "codes" in infos else ()
    n, groups = (shape[0], shape[1]) if len(shape) == 3 and min(shape) > 0 else (0, 0)
    floats = tuple(_TABLES)
    expected = {
        "codes": ((torch.int8,) if bits <= 8 else (torch.int16,), (n, groups, books)),
        "codebooks": (floats, (books, 2**bits, 1, columns)),
        "scales": (floats, (n, 1, 1, 1)),
    }
    for name, (dtypes, want) in expected.items():
        info = infos.get(name)
        if info is None or info.dtype not in dtypes or info.shape != want or not n:
            got = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
            wanted = f"{' or '.join(map(str, dtypes))} {list(want) if n else [f'N, K / {columns}', books]}"
            raise _refused(f"{name} must be {wanted}, but is {got}", where)
    table = _TABLES[torch.promote_types(infos["codebooks"].dtype, infos["scales"].dtype)]
    try:
        size = 2**bits
        fmt = VectorFormat(columns, size, size if books == 2 else 0, norm="row", table=table, axis="in")
    except FormatError as e:
        raise _refused(e.message, where) from e
    return fmt, (n, groups * columns)


def _unsigned(codes: torch.Tensor, bits: int, where: str) -> torch.Tensor:
    """int32: what the signed view of numbers of `bits` bits stands for."""
    wide = codes.to(torch.int32)
    if bool((wide < -(2 ** (bits - 1))).any()) or bool((wide >= 2**bits).any()):
        raise _refused(f"a code does not fit {bits} bits", where)
    return wide.bitwise_and(2**bits - 1)
