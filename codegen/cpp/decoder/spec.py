"""`DecoderSpec`: the fixed numbers of one decoder-only transformer, from which its program is generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowbit.codegen.spec import DTYPES
from lowbit.compiler.errors import KernelError

__all__ = ["ACTIVATIONS", "PARTS", "Activation", "CacheType", "DecoderSpec"]

Activation = Literal["silu", "gelu_tanh"]
CacheType = Literal["f32", "f16"]
ACTIVATIONS = ("silu", "gelu_tanh")
PARTS = ("embedding", "norms", "qkv", "rope and cache", "attention", "output", "feed forward", "head")
"""What a step's time is divided into, in the order of the program's clock."""


@dataclass(frozen=True)
class DecoderSpec:
    """Pre-norm blocks of grouped-query attention with rotary positions and a gated feed-forward part.

    hidden, inner: features of the residual stream and between gate and down. head_dim: of queries, keys and values.
    rotary: pairs of entries of a head that are rotated. scale: what scores are multiplied with. embed_scale: what
    embeddings are multiplied with. embedding: element type of the embedding table. cache: of keys and values.
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
    cache: CacheType = "f16"

    def __post_init__(self) -> None:
        sizes = (self.layers, self.hidden, self.inner, self.heads, self.kv_heads, self.head_dim, self.vocab)
        fits = all(n > 0 for n in sizes) and self.heads % self.kv_heads == 0 and 2 * self.rotary <= self.head_dim
        if not fits or self.activation not in ACTIVATIONS or self.embedding not in DTYPES:
            raise KernelError("LB0430", f"no decoder program has these sizes: {self}")
        if self.cache not in ("f32", "f16"):
            raise KernelError("LB0430", f"a cache of {self.cache} is not supported", hint="use f16 or f32")

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
