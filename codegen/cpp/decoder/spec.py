"""`DecoderSpec`: the fixed numbers of one decoder-only transformer, from which its program is generated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lowbit.codegen.attend import AttendSpec
from lowbit.codegen.cpp.table import table_problem
from lowbit.codegen.spec import DTYPES
from lowbit.codegen.table import TableSpec, parse_table_spec
from lowbit.compiler.errors import FormatError, KernelError
from lowbit.quantizers.formats.kv import parse_kv_format

__all__ = ["ACTIVATIONS", "PARTS", "Activation", "DecoderSpec"]

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS = ("silu", "gelu_tanh")
PARTS = ("embedding", "norms", "qkv", "rope and cache", "attention", "output", "feed forward", "head")
"""What a step's time is divided into, in the order of the program's clock."""


@dataclass(frozen=True)
class DecoderSpec:
    """Pre-norm blocks of grouped-query attention with rotary positions and a gated feed-forward part.

    hidden, inner: features of the residual stream and, at most, between gate and down. head_dim: of queries, keys and
    values.
    rotary: pairs of entries of a head that are rotated. scale: what scores are multiplied with. embed_scale: what
    embeddings are multiplied with. embedding: element type of the embedding table, or the key of a `TableSpec`. cache:
    of keys and values, a type or the text of a `KVFormat`. experts, active: the most of a layer, and how many of them
    a token goes to; 0 where all layers are dense. wide_norms: queries and keys are normed all heads at once.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    vocab: int
    eps: float
    scale: float
    activation: Activation = "silu"
    embed_scale: float = 1.0
    embedding: str = "f32"
    cache: str = "f16"
    experts: int = 0
    active: int = 0
    wide_norms: bool = False

    def __post_init__(self) -> None:
        sizes = (self.layers, self.hidden, self.inner, self.heads, self.kv_heads, self.head_dim, self.vocab)
        fits = all(n > 0 for n in sizes) and self.heads % self.kv_heads == 0 and 2 * self.rotary <= self.head_dim
        fits &= 0 <= self.active <= self.experts and bool(self.active) == bool(self.experts)
        if not fits or self.activation not in ACTIVATIONS or not self._table_fits:
            raise KernelError("LB0430", f"no decoder program has these sizes: {self}")
        fmt = self.packed.fmt if self.packed is not None else None
        if fmt is not None and (fmt.gear is not None or (fmt.rotate and self.head_dim & (self.head_dim - 1))):
            why = "a correction" if fmt.gear is not None else f"a rotation of {self.head_dim} dimensions"
            raise KernelError(
                "LB0430", f"no decoder program has a cache with {why}", hint="use mode='modules' or cache='f16'"
            )

    @cached_property
    def packed(self) -> AttendSpec | None:
        """The packed cache, or None for one of plain numbers; raises KernelError (LB0430) when it is neither."""
        if self.cache in ("f32", "f16"):
            return None
        try:
            return AttendSpec(str(parse_kv_format(self.cache)), self.head_dim)
        except FormatError as e:
            raise KernelError(
                "LB0430", f"a cache of {self.cache} is not supported: {e.message}", hint="use f16, f32 or kv4"
            ) from e

    @property
    def _table_fits(self) -> bool:
        if self.embedding in DTYPES:
            return True
        return self.embedding.startswith("{") and self.table is not None and table_problem(self.table) is None

    @cached_property
    def table(self) -> TableSpec | None:
        """The quantized embedding table, or None for one of plain numbers."""
        return None if self.embedding in DTYPES else parse_table_spec(self.embedding)

    @property
    def q_width(self) -> int:
        """Query features of a token."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Key (or value) features of a token."""
        return self.kv_heads * self.head_dim

    @property
    def value_stride(self) -> int:
        """Entries of one cached value row: the head's, rounded up to whole vectors."""
        return (self.head_dim + 15) // 16 * 16

    @property
    def cache_bytes(self) -> int:
        """Bytes per element of the cache."""
        return 2 if self.cache == "f16" else 4
