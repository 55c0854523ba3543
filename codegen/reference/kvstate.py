"""A packed key-value cache as plain tensors: writing tokens, reading them back, attending to them, with torch.

`KVState` is the oracle of the generated kernels, and what runs where they do not: on GPUs, and for formats with GEAR's
correction. Sizes and layouts: `codegen.attend.AttendSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.codegen.attend import AttendSpec
from lowbit.quantizers.formats.kv import KV_BLOCK, KVSide
from lowbit.quantizers.kv import Correction, Groups, correct, corrected, dequantize_groups, quantize_groups

__all__ = ["KVState", "allocate", "attend"]

_CORRECTION = ("left", "right", "value", "place")


def allocate(spec: AttendSpec, batch: int, heads: int, capacity: int, device: torch.device) -> dict[str, Tensor]:
    """Zeroed tensors of an empty cache."""
    shapes = spec.shapes(batch, heads, capacity)
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in shapes.items()}


@dataclass(frozen=True)
class KVState:
    """A view of the tensors `parts` (by operand name) of one layer's cache."""

    spec: AttendSpec
    parts: Mapping[str, Tensor]

    @staticmethod
    def of(spec: AttendSpec, tensors: list[Tensor]) -> KVState:
        """From tensors in the order of `AttendSpec.operands`."""
        return KVState(spec, dict(zip(spec.operands, tensors, strict=True)))

    def append(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Write keys (rotated already) and values [batch, heads, tokens, head_dim] behind the first `length`."""
        for (letter, side), new in zip(self.spec.sides, (keys, values), strict=True):
            self._append(letter, side, new, length)

    def read(self, length: int) -> tuple[Tensor, Tensor]:
        """float32 keys and values [batch, heads, length, head_dim] as the cache holds them; keys still rotated."""
        k, v = (self._read(letter, side, length) for letter, side in self.spec.sides)
        return k, v

    def _append(self, letter: str, side: KVSide, new: Tensor, length: int) -> None:
        total = length + new.shape[-2]
        first, last = self.spec.fmt.stored(side, length), self.spec.fmt.stored(side, total)
        window = self.parts.get(f"{letter}_window")
        if last > first:
            leaving = [] if window is None else [_ring(window, first, min(last, length))]
            fresh = new[..., max(first - length, 0) : max(last - length, 0), :]
            self._store(letter, side, torch.cat([*leaving, _half(fresh)], -2), first)
        if window is not None:
            begin = max(length, last)
            at = torch.arange(begin, total, device=new.device) % window.shape[-2]
            fresh = new[..., begin - length :, :]
            window.index_copy_(-2, at, _half(fresh) if window.dtype == torch.float16 else fresh.to(window.dtype))

    def _store(self, letter: str, side: KVSide, x: Tensor, first: int) -> None:
        """Quantize float16 tokens x [batch, heads, tokens, head_dim] into places from `first` on."""
        if self.spec.fmt.gear is None:
            groups = quantize_groups(x, side)
        else:
            groups = self._store_corrected(letter, side, x, first)
        self._write_codes(letter, side, groups.codes, first)
        for name, values in (("scale", groups.scale), ("minimum", groups.minimum)):
            to = self.parts[f"{letter}_{name}"]
            if side.along == "channel":
                to[:, :, first // side.group : first // side.group + values.shape[-2]] = values
            else:
                to[..., first : first + x.shape[-2]] = values.mT

    def _store_corrected(self, letter: str, side: KVSide, x: Tensor, first: int) -> Groups:
        block, gear = self.spec.fmt.window, self.spec.fmt.gear
        assert gear is not None
        groups, correction = correct(x.unflatten(-2, (-1, block)), side, gear)
        at = slice(first // block, (first + x.shape[-2]) // block)
        for name in _CORRECTION:
            self.parts[f"{letter}_{name}"][:, :, at] = getattr(correction, name)
        return Groups(*(t.flatten(-3, -2) for t in (groups.codes, groups.scale, groups.minimum)))

    def _write_codes(self, letter: str, side: KVSide, codes: Tensor, first: int) -> None:
        """Codes uint8 [batch, heads, tokens, head_dim]; blocks that they fill in part keep their other tokens."""
        start, tokens = first // KV_BLOCK * KV_BLOCK, codes.shape[-2]
        stop = -(-(first + tokens) // KV_BLOCK) * KV_BLOCK
        if start != first or stop != first + tokens:
            whole = self._codes(letter, side, start, stop)
            whole[..., first - start : first - start + tokens, :] = codes
            codes = whole
        rows = _as_rows(letter, codes)
        for i, plane in enumerate(self.spec.layout.pack(rows, side.bits)):
            to = self._blocks(f"{letter}_plane{i}", start, stop)
            to.copy_(plane.view(to.shape))

    def _codes(self, letter: str, side: KVSide, start: int, stop: int) -> Tensor:
        """uint8 [batch, heads, stop - start, head_dim], of whole blocks."""
        planes = [
            self._blocks(f"{letter}_plane{i}", start, stop).reshape(-1)
            for i, name in enumerate(n for n in self.parts if n.startswith(f"{letter}_plane"))
        ]
        batch, heads = self.parts[f"{letter}_plane0"].shape[:2]
        dims, tokens = self.spec.head_dim, stop - start
        if letter == "k":
            columns = -(-dims // KV_BLOCK) * KV_BLOCK
            rows = self.spec.layout.unpack(planes, side.bits, batch * heads * tokens, columns)
            return rows.view(batch, heads, tokens, columns)[..., :dims]
        rows = self.spec.layout.unpack(planes, side.bits, batch * heads * tokens // KV_BLOCK * dims, KV_BLOCK)
        return rows.view(batch, heads, -1, dims, KV_BLOCK).mT.reshape(batch, heads, tokens, dims)

    def _blocks(self, name: str, start: int, stop: int) -> Tensor:
        """The part of a plane that holds tokens [start, stop)."""
        plane = self.parts[name]
        per = 16 if name[0] == "k" else KV_BLOCK
        return plane[:, :, start // per : stop // per]

    def _read(self, letter: str, side: KVSide, length: int) -> Tensor:
        stored = self.spec.fmt.stored(side, length)
        parts = [self._dequantized(letter, side, stored)] if stored else []
        if (window := self.parts.get(f"{letter}_window")) is not None:
            parts.append(_ring(window, stored, length).float())
        return torch.cat(parts, -2)

    def _dequantized(self, letter: str, side: KVSide, stored: int) -> Tensor:
        codes = self._codes(letter, side, 0, -(-stored // KV_BLOCK) * KV_BLOCK)[..., :stored, :]
        scale, minimum = (self.parts[f"{letter}_{name}"] for name in ("scale", "minimum"))
        if side.along == "channel":
            scale, minimum = (t[:, :, : stored // side.group] for t in (scale, minimum))
        else:
            scale, minimum = (t[..., :stored].mT for t in (scale, minimum))
        plain = dequantize_groups(Groups(codes, scale, minimum), side)
        if self.spec.fmt.gear is None:
            return plain
        block = self.spec.fmt.window
        found = Correction(*(self.parts[f"{letter}_{name}"][:, :, : stored // block] for name in _CORRECTION))
        return corrected(plain.unflatten(-2, (-1, block)), side, found).flatten(-3, -2)


def attend(q: Tensor, state: KVState, length: int, mask: Tensor | None, scale: float) -> Tensor:
    """float32 [batch, query heads, queries, head_dim]: attention of the newest `queries` of `length` tokens.

    q: float32, rotated like the keys. mask: bool [batch, 1, queries, length or more], False where a query must not
    look. A query that may look nowhere gets zeros.
    """
    batch, _, queries, dims = q.shape
    keys, values = state.read(length)
    heads = keys.shape[1]
    grouped = q.reshape(batch, heads, -1, queries, dims)
    scores = torch.einsum("bhrqd,bhtd->bhrqt", grouped, keys) * scale
    seen = torch.ones(queries, length, dtype=torch.bool, device=q.device).tril(length - queries)
    if mask is not None:
        seen = seen & mask[:, :, None, :, :length]
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = torch.nan_to_num(scores.softmax(-1)) if mask is not None else scores.softmax(-1)
    return torch.einsum("bhrqt,bhtd->bhrqd", weights, values).reshape(q.shape)


def _half(x: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).to(torch.float16)


def _ring(window: Tensor, first: int, last: int) -> Tensor:
    """Tokens [first, last) of a ring of tokens."""
    at = torch.arange(first, max(first, last), device=window.device) % window.shape[-2]
    return window.index_select(-2, at)


def _as_rows(letter: str, codes: Tensor) -> Tensor:
    """Codes [batch, heads, tokens, head_dim] as the matrix that is packed: see `codegen.attend`."""
    if letter == "k":
        missing = -codes.shape[-1] % KV_BLOCK
        return torch.nn.functional.pad(codes, (0, missing)).flatten(0, 2)
    return codes.reshape(*codes.shape[:2], -1, KV_BLOCK, codes.shape[-1]).mT.reshape(-1, KV_BLOCK)
