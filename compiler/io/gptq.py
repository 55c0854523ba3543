"""Reading GPTQ checkpoints (format v1 and v2, as AutoGPTQ and GPTQModel write them) without their packages.

Per linear layer [N, K] with b-bit codes and groups of g columns: `qweight` int32 [K*b/32, N], a dense stream along K;
`qzeros` int32 [K/g, N*b/32], a dense stream along N; `scales` [K/g, N]; `g_idx` int32 [K], the group of each column.
v1 stores every zero point minus one (subtracted from whole words, so that a zero point of 0 borrows from its
neighbour), v2 the zero point. With activation order and no static groups, g_idx is not
ascending: the groups are contiguous only after a permutation of the columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.safetensors_file import SafetensorsFile
from lowbit.quantizers.bitstream import pack_bits, unpack_bits
from lowbit.quantizers.formats import WIDE_DTYPES, Format, Granularity, IntElement, WeightFormat
from lowbit.quantizers.qtensor import QTensor

__all__ = ["SUFFIXES", "GPTQLayout", "GPTQReader", "formats", "layout", "read_layers", "to_qtensor", "unpack"]

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
"""Names of a module's tensors; g_idx may be absent."""

_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class GPTQLayout:
    """What the config says of every layer. group: columns per group, 0 for one group. zero_offset: 1 in v1, 0 in v2."""

    bits: int
    group: int
    symmetric: bool
    zero_offset: int


@dataclass(frozen=True)
class GPTQReader:
    """Tensors of each layer -> its weight. formats: by module path."""

    layout: GPTQLayout
    formats: Mapping[str, Format]

    def suffixes(self, path: str) -> tuple[str, ...]:
        """Names of a module's tensors."""
        return SUFFIXES

    def shape(self, path: str) -> tuple[int, int] | None:
        """None: the weight has to be unpacked."""
        return None

    def weight(self, path: str, tensors: Mapping[str, torch.Tensor], where: str) -> QTensor:
        """As `to_qtensor`."""
        return to_qtensor(self.layout, self.formats[path], tensors, where)


def layout(config: Mapping[str, Any], where: str) -> GPTQLayout:
    """The layout a `quantization_config` describes; raises CheckpointError (LB0113) for one that is not supported."""
    bits, group = config.get("bits"), config.get("group_size", -1)
    if bits not in _BITS or type(bits) is not int:
        raise _refused(f"GPTQ with {bits!r} bits is not supported", where)
    if type(group) is not int or group == 0 or group < -1:
        raise _refused(f"group size {group!r} is not a positive number or -1", where)
    kind = config.get("checkpoint_format") or config.get("format") or "gptq"
    offsets = {"gptq": 1, "gptq_v2": 0}
    if kind not in offsets:
        raise _refused(f"checkpoint format {str(kind)[:40]!r} is not supported", where)
    if config.get("pack_dtype", "int32") != "int32":
        raise _refused("codes must be packed in int32", where)
    if config.get("dynamic"):
        raise _refused("settings by module (`dynamic`) are not supported", where)
    return GPTQLayout(bits, max(group, 0), bool(config.get("sym", True)), offsets[kind])


def _refused(why: str, where: str) -> CheckpointError:
    return CheckpointError("LB0113", why, where=where, hint="quantize the original model with lowbit")


def formats(layout: GPTQLayout, files: Mapping[str, SafetensorsFile], where: str) -> dict[str, Format]:
    """Format by module path, for every module that has a `qweight`."""
    names = {dtype: name for name, dtype in WIDE_DTYPES.items()}
    granularity = Granularity("g", layout.group) if layout.group else Granularity("ch")
    found = {}
    for path in [n.removesuffix(".qweight") for n in files if n.endswith(".qweight")]:
        scales = f"{path}.scales"
        dtype = files[scales].header.tensors[scales].dtype if scales in files else None
        if dtype not in names:
            raise _refused(f"scales are {dtype}, not a float type", f"{where}: {path}")
        found[path] = Format(IntElement(layout.bits, layout.symmetric), granularity, names[dtype])
    return found


def read_layers(
    config: Mapping[str, Any], files: Mapping[str, SafetensorsFile], where: str
) -> tuple[GPTQReader, dict[str, WeightFormat]]:
    """All quantized layers; raises CheckpointError as `layout` and `formats`."""
    found = layout(config, where)
    reader = GPTQReader(found, formats(found, files, where))
    return reader, dict(reader.formats)


def unpack(
    layout: GPTQLayout, fmt: Format, tensors: Mapping[str, torch.Tensor], where: str
) -> tuple[QTensor, torch.Tensor | None]:
    """The weight, and the permutation of its columns: int64 [K] `order`, or None when they are in place.

    Column j of the result is column order[j] of the layer, so that y = Q @ x[order]. Raises CheckpointError (LB0113).
    """
    n, k = _shape(layout, tensors, where)
    codes = unpack_bits(tensors["qweight"].t().contiguous(), layout.bits, k)
    ones = pack_bits(torch.full((1, n), layout.zero_offset, dtype=torch.uint8), layout.bits)
    zero = unpack_bits(tensors["qzeros"] + ones, layout.bits, n).t().contiguous()
    scale = tensors["scales"].t().contiguous()
    if layout.symmetric:
        if not bool((zero == 2 ** (layout.bits - 1)).all()):
            raise _refused("the config says symmetric, but the zero points are not in the middle", where)
        zero_or_none = None
    else:
        zero_or_none = zero
    order = _order(layout, tensors.get("g_idx"), k, where)
    return QTensor(fmt, codes if order is None else codes[:, order], scale, zero_or_none), order


def to_qtensor(layout: GPTQLayout, fmt: Format, tensors: Mapping[str, torch.Tensor], where: str) -> QTensor:
    """As `unpack`, for weights whose columns are in place; raises CheckpointError (LB0113) when they are permuted."""
    q, order = unpack(layout, fmt, tensors, where)
    if order is not None:
        raise _refused("columns are in activation order without static groups (`desc_act`)", where)
    return q


def _shape(layout: GPTQLayout, tensors: Mapping[str, torch.Tensor], where: str) -> tuple[int, int]:
    """(N, K), after checking that all tensors agree about them."""
    missing = [name for name in SUFFIXES[:3] if name not in tensors]
    if missing:
        raise _refused(f"{missing[0]} is missing", where)
    qweight, qzeros, scales = (tensors[name] for name in SUFFIXES[:3])
    if (
        qweight.dtype != torch.int32
        or qzeros.dtype != torch.int32
        or {t.ndim for t in (qweight, qzeros, scales)} != {2}
    ):
        raise _refused("qweight and qzeros must be int32 matrices, scales a matrix", where)
    g_idx, n = tensors.get("g_idx"), qweight.shape[1]
    k = g_idx.numel() if g_idx is not None else qweight.shape[0] * 32 // layout.bits
    groups = math.ceil(k / layout.group) if layout.group else 1
    expected = {
        "qweight": (math.ceil(k * layout.bits / 32), n),
        "qzeros": (groups, math.ceil(n * layout.bits / 32)),
        "scales": (groups, n),
    }
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise _refused(f"{name} of a {n}x{k} layer must be {list(shape)}, not {list(tensors[name].shape)}", where)
    return n, k


def _order(layout: GPTQLayout, g_idx: torch.Tensor | None, k: int, where: str) -> torch.Tensor | None:
    """The column permutation that makes groups contiguous, or None when they are already."""
    if g_idx is None or not layout.group:
        return None
    straight = torch.arange(k) // layout.group
    if torch.equal(g_idx.long(), straight):
        return None
    order = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[order], straight):
        raise _refused(f"g_idx does not divide the columns into groups of {layout.group}", where)
    return order
