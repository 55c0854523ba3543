"""Keys and values of one sequence: in the program's own layout, or packed as `QuantizedCache` has them."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from lowbit.codegen.cpp.attend import STATE_ORDER
from lowbit.codegen.cpp.decoder.spec import DecoderSpec
from lowbit.codegen.reference.kvstate import allocate
from lowbit.compiler.errors import KernelError, RunError

__all__ = ["ProgramCache"]

_DTYPES = {"f32": torch.float32, "f16": torch.float16}


class ProgramCache(Cache):  # type: ignore[misc]
    """A cache that grows up to `limit` positions; transformers' `generate` accepts it as `past_key_values`.

    keys: [layers, kv heads, positions / 16, head_dim, 16]. values: [layers, kv heads, positions, padded head_dim].
    packed: instead of these, tensors by operand name (`AttendSpec.operands`), [layers, kv heads, ...].
    """

    def __init__(self, spec: DecoderSpec, positions: int, limit: int) -> None:
        super().__init__(layers=[])
        self.spec, self.limit, self.length, self.capacity = spec, limit, 0, 0
        self.keys = self.values = torch.empty(0)
        self.packed: dict[str, torch.Tensor] = {}
        self.reserve(max(1, min(positions, limit)))

    def reserve(self, positions: int) -> None:
        """Room for `positions`; what is there is kept. Raises RunError (LB0562) beyond the limit."""
        if positions > self.limit:
            raise RunError(
                "LB0562",
                f"{positions} positions do not fit the program's {self.limit}",
                hint="call lowbit.compile with a larger `context`",
            )
        if positions <= self.capacity:  # which may be a bit beyond the limit
            return
        s, old = self.spec, self.capacity
        wanted = max(positions, min(2 * old, self.limit))
        step = 16 if s.packed is None else s.packed.span
        self.capacity = (wanted + step - 1) // step * step
        if s.packed is not None:
            held = self.packed
            self.packed = allocate(s.packed, s.layers, s.kv_heads, self.capacity, torch.device("cpu"))
            for name, tensor in held.items():
                self.packed[name][tuple(slice(0, n) for n in tensor.shape)] = tensor
            return
        keys, values = self.keys, self.values
        dtype = _DTYPES[s.cache]
        self.keys = torch.empty(s.layers, s.kv_heads, self.capacity // 16, s.head_dim, 16, dtype=dtype)
        self.values = torch.empty(s.layers, s.kv_heads, self.capacity, s.value_stride, dtype=dtype)
        if old:
            self.keys[:, :, : old // 16], self.values[:, :, :old] = keys, values

    def pointers(self) -> tuple[list[int], int, int]:
        """Addresses of the packed tensors in `STATE_ORDER` (0 for those there are not), rows of the two windows."""
        at = [self.packed[name].data_ptr() if name in self.packed else 0 for name in STATE_ORDER]
        rows = [self.packed[name].shape[2] if name in self.packed else 0 for name in ("k_window", "v_window")]
        return at, rows[0], rows[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions filled."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Positions there can be."""
        return self.limit

    def crop(self, tokens_to_remove: int) -> None:
        """Forget positions at the end: as many as the negative number says, or all beyond a positive length."""
        keep = self.length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        keep = max(0, min(self.length, keep))
        if self.packed and 0 < keep < self.length:
            raise KernelError(
                "LB0427", "tokens cannot be taken out of a quantized cache", hint="decode without an assistant model"
            )
        self.length = keep

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0

    @property
    def is_compileable(self) -> bool:
        """The program is compiled already."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Positions may be forgotten (`crop`): not where codes would have to become numbers again."""
        return not self.packed

    @property
    def is_initialized(self) -> bool:
        """Memory is there from the start."""
        return True

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Modules cannot write here: raises RunError (LB0563)."""
        raise RunError(
            "LB0563", "this cache belongs to a native program", hint="start a new sequence without `past_key_values`"
        )

    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes + sum(t.nbytes for t in self.packed.values())
