"""A quantized key-value cache for transformers: `lowbit.QuantizedCache`.

    cache = lowbit.QuantizedCache(model, "kv4", max_tokens=4096)
    model.set_attn_implementation("lowbit")
    model.generate(**inputs, past_key_values=cache)

With that attention implementation (known once `lowbit.QuantizedCache` is), calls of up to 8 tokens attend to the packed
cache itself; with any other one they get dequantized keys and values. Longer calls (prefill) attend to their own keys
and values unquantized, and to dequantized earlier ones, as in KIVI. A call's tokens are appended first, and then all
its queries see the same cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lowbit.codegen.attend import MAX_QUERIES, AttendSpec
from lowbit.codegen.reference.kvstate import allocate
from lowbit.compiler.errors import KernelError
from lowbit.compiler.runtime.attend import attend_kernel, gpu_attend_kernel
from lowbit.quantizers.formats.kv import KVFormat, parse_kv_format
from lowbit.quantizers.hadamard import hadamard

__all__ = ["IMPLEMENTATION", "PackedKV", "PackedLayer", "QuantizedCache"]

IMPLEMENTATION = "lowbit"
"""Name of the attention implementation that reads packed caches."""

_NO_LIMIT = 2**62


class PackedKV(NamedTuple):
    """What stands for keys and for values on the way from a cache to the attention: one layer's packed tensors."""

    state: list[Tensor]
    length: Tensor
    spec: str


class PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one layer. fmt: what is stored. limit: tokens it is allocated for; None to grow by `chunk`.

    config: of the model, asked for its attention implementation at every call.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, fmt: KVFormat, limit: int | None, chunk: int, config: Any) -> None:
        super().__init__()
        self.fmt, self.limit, self.chunk, self.config = fmt, limit, chunk, config
        self.is_compileable = limit is not None
        self.length = torch.zeros((), dtype=torch.int64)  # on the CPU, wherever the cache is: operators read it
        self.state: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values [batch, heads, tokens, head_dim]."""
        if key_states.shape[-1] != value_states.shape[-1]:
            raise KernelError(
                "LB0427", f"keys of {key_states.shape[-1]} and values of {value_states.shape[-1]} dimensions differ"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads, _, dims = key_states.shape
        self.spec = AttendSpec(str(self.fmt), dims)
        self.key = self.spec.key()
        self._allocate(self.limit if self.limit is not None else self.chunk)
        self.is_initialized = True

    def _allocate(self, tokens: int) -> None:
        """Room for `tokens` tokens; what there is stays."""
        self.capacity = -(-tokens // self.spec.span) * self.spec.span
        old = self.state
        self.state = allocate(self.spec, self.batch_size, self.num_heads, self.capacity, self.device)
        for name, tensor in old.items():
            self.state[name][tuple(slice(0, n) for n in tensor.shape)] = tensor
        if not torch.compiler.is_compiling():
            for tensor in (*self.state.values(), self.length):
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append keys and values [batch, heads, tokens, head_dim]; returns what the attention is to see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        if self.limit is None and (total := self._tokens() + tokens) > self.capacity:
            self._allocate(max(total, self.capacity + self.chunk))
        if tokens > MAX_QUERIES:
            seen = self._prefill(key_states, value_states)
            self._append(key_states, value_states)
            return seen
        self._append(key_states, value_states)
        if self.config._attn_implementation == IMPLEMENTATION:
            packed = PackedKV(list(self.state.values()), self.length, self.key)
            return packed, packed
        k, v = self._read(self._shown(0))
        return k.to(key_states.dtype), v.to(key_states.dtype)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        limit = _NO_LIMIT if self.limit is None else self.limit
        torch.ops.lowbit.append_kv(keys, values, list(self.state.values()), self.length, limit, self.key)
        self.length.add_(keys.shape[-2])

    def _read(self, tokens: int) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.ops.lowbit.read_kv(
            list(self.state.values()), self.length, tokens, self.key
        )
        return found

    def _shown(self, more: int) -> int:
        """Tokens that the attention is shown, `more` of them not yet counted: all there is room for when shapes must
        not change, else as many as there are."""
        exact = self.limit is None or (
            self.config._attn_implementation == IMPLEMENTATION and not torch.compiler.is_compiling()
        )
        return self._tokens() + more if exact else cast(int, self.limit)

    def _prefill(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Earlier tokens dequantized, then `keys` and `values` as they are; zeros behind them."""
        tokens, compiling = keys.shape[-2], torch.compiler.is_compiling()
        shown = self._shown(tokens)
        if not compiling and shown == tokens:
            return keys, values
        past = self._read(shown) if compiling or self._tokens() else None
        at = torch.arange(tokens, device=keys.device) + self.length.to(keys.device)
        out = []
        for i, new in enumerate((keys, values)):
            old = new.new_zeros(*new.shape[:2], shown, new.shape[3]) if past is None else past[i].to(new.dtype)
            out.append(old.index_copy(2, at, new))
        return out[0], out[1]

    def _tokens(self) -> int:
        return int(self.length)

    def get_seq_length(self) -> Any:
        """Tokens in the cache: a tensor when allocated in advance, so that compiled graphs do not depend on it."""
        return self.length if self.limit is not None else self._tokens()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that a mask has to cover, offset of the first)."""
        return (self.limit if self.limit is not None else self._tokens() + query_length), 0

    def get_max_length(self) -> int:
        """Tokens there is room for; -1 without a limit."""
        return -1 if self.limit is None else self.limit

    def reset(self) -> None:
        """Forget all tokens; memory stays."""
        self.length.zero_()
        for tensor in self.state.values():
            tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was, in place."""
        for tensor in self.state.values():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._replace({name: tensor[indices] for name, tensor in self.state.items()})

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        self._replace({name: tensor.repeat_interleave(repeats, 0) for name, tensor in self.state.items()})

    def _replace(self, state: dict[str, Tensor]) -> None:
        self.state = state
        if state:
            self.batch_size = next(iter(state.values())).shape[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Refused with KernelError (LB0427), unless nothing is to be removed: codes cannot become float16 again."""
        if tokens_to_remove:
            raise KernelError(
                "LB0427", "tokens cannot be taken out of a quantized cache", hint="decode without an assistant model"
            )

    def offload(self) -> None:
        """Refused with KernelError (LB0427)."""
        raise KernelError("LB0427", "a quantized cache is not offloaded", hint="make it without offloading")

    prefetch = offload

    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state.values())


class QuantizedCache(Cache):  # type: ignore[misc]
    """Keys and values in a `KVFormat`, for the text model of `model_or_config`.

    format: such as `kv4` (4 bits: keys by channel and 64 tokens, values by token, 64 tokens in float16) or its long
    form, see `quantizers.formats.kv`; None for the one the model was quantized for, `kv4` where that says nothing.
    max_tokens: what is allocated at once and never exceeded, for torch.compile and known memory; None to grow by
    `chunk` tokens. Kernels are built here. Raises FormatError (LB025x) for formats that do not exist or do not fit,
    KernelError (LB0427) for models with other than full attention.
    """

    def __init__(
        self, model_or_config: Any, format: str | None = None, *, max_tokens: int | None = None, chunk: int = 512
    ) -> None:
        config = getattr(model_or_config, "config", model_or_config).get_text_config(decoder=True)
        self.format = parse_kv_format(format or getattr(model_or_config, "kv_format", "kv4"))
        kinds, _ = get_layer_types_and_kwargs(config)
        if other := sorted(set(kinds) - {"full_attention"}):
            raise KernelError("LB0427", f"layers of the kind {other[0]} have no quantized cache")
        dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if self.format.rotate:
            hadamard(dims)
        device = getattr(model_or_config, "device", torch.device("cpu"))
        spec = AttendSpec(str(self.format), dims).key()
        if device.type == "cpu":
            attend_kernel(spec)
        elif device.type == "cuda" and torch.version.hip is None:
            gpu_attend_kernel(spec, device)
        super().__init__(layers=[PackedLayer(self.format, max_tokens, chunk, config) for _ in kinds])

    def nbytes(self) -> int:
        """Bytes allocated so far, everything included."""
        return sum(layer.nbytes() for layer in self.layers)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention implementation: packed caches by kernel, everything else by torch's own."""
    if isinstance(key, PackedKV):
        unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
        if unsupported or dropout or (attention_mask is not None and attention_mask.shape[1] != 1):
            what = unsupported[0] if unsupported else "dropout" if dropout else "a mask per head"
            raise KernelError("LB0427", f"attention over a packed cache has no {what}", hint="use sdpa attention")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = torch.ops.lowbit.attend_kv(query, key.state, key.length, attention_mask, scale, key.spec)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    return cast(
        tuple[Tensor, None],
        sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs),
    )


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
