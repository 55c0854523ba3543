"""Keys and values of one sequence, in the program's own layout."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from lowbit.codegen.cpp.decoder.spec import DecoderSpec
from lowbit.compiler.errors import RunError

__all__ = ["ProgramCache"]

_DTYPES = {"f32": torch.float32, "f16": torch.float16}


class ProgramCache(Cache):  # type: ignore[misc]
    """A cache that grows up to `limit` positions; transformers' `generate` accepts it as `past_key_values`.

    keys: [layers, kv heads, positions / 16, head_dim, 16]. values: [layers, kv heads, positions, padded head_dim].
    """

    def __init__(self, spec: DecoderSpec, positions: int, limit: int) -> None:
        super().__init__(layers=[])
        self.spec, self.limit, self.length, self.capacity = spec, limit, 0, 0
        self.keys = self.values = torch.empty(0, dtype=_DTYPES[spec.cache])
        self.reserve(max(1, min(positions, limit)))

    def reserve(self, positions: int) -> None:
        """Room for `positions`; what is there is kept. Raises RunError (LB0562) beyond the limit."""
        if positions <= self.capacity:
            return
        if positions > self.limit:
            raise RunError(
                "LB0562",
                f"{positions} positions do not fit the program's {self.limit}",
                hint="call lowbit.compile with a larger `context`",
            )
        s, old = self.spec, self.capacity
        wanted = max(positions, min(2 * old, self.limit))
        self.capacity = (wanted + 15) // 16 * 16
        keys, values = self.keys, self.values
        dtype = _DTYPES[s.cache]
        self.keys = torch.empty(s.layers, s.kv_heads, self.capacity // 16, s.head_dim, 16, dtype=dtype)
        self.values = torch.empty(s.layers, s.kv_heads, self.capacity, s.value_stride, dtype=dtype)
        if old:
            self.keys[:, :, : old // 16], self.values[:, :, :old] = keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions filled."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Positions there can be."""
        return self.limit

    def crop(self, tokens_to_remove: int) -> None:
        """Forget positions at the end: as many as the negative number says, or all beyond a positive length."""
        keep = self.length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self.length = max(0, min(self.length, keep))

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0

    @property
    def is_compileable(self) -> bool:
        """The program is compiled already."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Positions may be forgotten (`crop`)."""
        return True

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
        return self.keys.nbytes + self.values.nbytes
