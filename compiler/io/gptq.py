"""Reading GPTQ checkpoints (format v1 and v2, as AutoGPTQ and GPTQModel write them) without their packages.

Per linear layer [N, K] with b-bit codes and groups of g columns: `qweight` int32 [K*b/32, N], a dense stream along K;
`qzeros` int32 [K/g, N*b/32], a dense stream along N; `scales` [K/g, N]; `g_idx` int32 [K], the group of each column.
v1 stores every zero point minus one (subtracted from whole words, so that a zero point of 0 borrows from its
neighbour), v2 the zero point. With activation order (`desc_act`) and no static groups, g_idx is not ascending: groups
are contiguous only after a permutation of the columns, which is what ordered formats store (`int4.g128.sym.perm`).
`dynamic` of the config may name modules that are not quantized: patterns with `-:` before them, which match from the
start of a path. Other settings for some modules are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError, FormatError
from lowbit.compiler.io.column_groups import column_order
from lowbit.compiler.io.safetensors_file import SafetensorsFile
from lowbit.quantizers.bitstream import pack_bits, unpack_bits
from lowbit.quantizers.formats import WIDE_DTYPES, Format, Granularity, IntElement, WeightFormat
from lowbit.quantizers.qtensor import QTensor

__all__ = ["SUFFIXES", "GPTQLayout", "GPTQReader", "formats", "layout", "read_layers", "to_qtensor"]

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
"""Names of a module's tensors; g_idx may be absent."""

_BITS = (2, 3, 4, 8)
_MOST_PATTERNS = 10_000


@dataclass(frozen=True, slots=True)
class GPTQLayout:
    """What the config says of every layer. group: columns per group, 0 for one group. zero_offset: 1 in v1, 0 in v2.
    ordered: columns may be in activation order. excluded: what the paths of modules that are not quantized match."""

    bits: int
    group: int
    symmetric: bool
    zero_offset: int
    ordered: bool = False
    excluded: tuple[re.Pattern[str], ...] = ()


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
    excluded = _excluded(config.get("dynamic") or {}, where)
    symmetric, ordered = bool(config.get("sym", True)), bool(config.get("desc_act", False))
    return GPTQLayout(bits, max(group, 0), symmetric, offsets[kind], ordered, excluded)


def _excluded(dynamic: Any, where: str) -> tuple[re.Pattern[str], ...]:
    """The patterns of `dynamic`, all of which have to exclude modules."""
    if not isinstance(dynamic, dict) or len(dynamic) > _MOST_PATTERNS:
        raise _refused(f"settings by module (`dynamic`) must be an object of at most {_MOST_PATTERNS} patterns", where)
    found = []
    for key in dynamic:
        pattern = key.removeprefix("-:")
        if pattern == key:
            raise _refused(f"settings by module are not supported (`dynamic` has {key[:80]!r})", where)
        if not _quick(pattern):
            raise _refused(f"the pattern {key[:80]!r} of `dynamic` can take too long to match", where)
        try:
            found.append(re.compile(pattern))
        except (re.error, OverflowError, RecursionError) as e:
            raise _refused(f"the pattern {key[:80]!r} of `dynamic` cannot be read: {str(e)[:80]}", where) from e
    return tuple(found)


def _quick(pattern: str) -> bool:
    """Whether matching takes a bounded time: patterns come from the checkpoint, and some never end. Groups that are
    repeated are what makes them, or many repetitions in a row."""
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern, flags=re.DOTALL)  # escapes and sets stand for one character
    few = len(re.findall(r"[*+{]", bare)) <= 3 and bare.count("(") <= 4
    return len(pattern) <= 500 and few and not re.search(r"\)[*+{]", bare)


def _refused(why: str, where: str) -> CheckpointError:
    return CheckpointError("LB0113", why, where=where, hint="quantize the original model with lowbit")


def formats(layout: GPTQLayout, files: Mapping[str, SafetensorsFile], where: str) -> dict[str, Format]:
    """Format by module path, for every module with a `qweight`; `g_idx` is read where columns may have an order."""
    names = {dtype: name for name, dtype in WIDE_DTYPES.items()}
    granularity = Granularity("g", layout.group) if layout.group else Granularity("ch")
    found = {}
    for path in [n.removesuffix(".qweight") for n in files if n.endswith(".qweight")]:
        if any(pattern.match(path) for pattern in layout.excluded):
            raise _refused("has a qweight, but `dynamic` says that it is not quantized", f"{where}: {path[:200]}")
        scales = f"{path}.scales"
        dtype = files[scales].header.tensors[scales].dtype if scales in files else None
        if dtype not in names:
            raise _refused(f"scales are {dtype}, not a float type", f"{where}: {path}")
        g_idx = files[f"{path}.g_idx"].tensor(f"{path}.g_idx") if layout.ordered and f"{path}.g_idx" in files else None
        ordered = _order(layout, g_idx, f"{where}: {path}") is not None
        element = IntElement(layout.bits, layout.symmetric)
        found[path] = Format(element, granularity, names[dtype], ordered=ordered)
    return found


def read_layers(
    config: Mapping[str, Any], files: Mapping[str, SafetensorsFile], where: str
) -> tuple[GPTQReader, dict[str, WeightFormat]]:
    """All quantized layers; raises CheckpointError as `layout` and `formats`."""
    found = layout(config, where)
    reader = GPTQReader(found, formats(found, files, where))
    return reader, dict(reader.formats)


def to_qtensor(layout: GPTQLayout, fmt: Format, tensors: Mapping[str, torch.Tensor], where: str) -> QTensor:
    """The weight, exactly as stored; raises CheckpointError (LB0113) for tensors that do not fit layout and format."""
    n, k = _shape(layout, tensors, where)
    codes = unpack_bits(tensors["qweight"].t().contiguous(), layout.bits, k)
    ones = pack_bits(torch.full((1, n), layout.zero_offset, dtype=torch.uint8), layout.bits)
    zero = unpack_bits(tensors["qzeros"] + ones, layout.bits, n).t().contiguous()
    scale = tensors["scales"].t().contiguous()
    if layout.symmetric and not bool((zero == 2 ** (layout.bits - 1)).all()):
        raise _refused("the config says symmetric, but the zero points are not in the middle", where)
    order = _order(layout, tensors.get("g_idx"), where)
    if (order is not None) != fmt.ordered:
        raise _refused("g_idx puts columns in an order, and the config has no `desc_act`", where)
    codes = codes if order is None else codes[:, order]
    q = QTensor(replace(fmt, ordered=False), codes, scale, None if layout.symmetric else zero)
    return q if order is None else q.in_order(order)


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


def _order(layout: GPTQLayout, g_idx: torch.Tensor | None, where: str) -> torch.Tensor | None:
    """int64 [K]: the columns in the order that makes groups contiguous, or None when they are already."""
    if g_idx is None or not layout.group:
        return None
    try:
        return column_order(g_idx, layout.group)
    except FormatError as e:
        raise _refused(e.message, where) from e
