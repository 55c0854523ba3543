"""Quantized matrices whose float side values (scales, offsets, codebooks, norms) can be trained, codes staying fixed.

A `Tunable` gives the dense weight as a differentiable function of those values, as they would be stored: rounding to
the stored type passes gradients straight through ("Estimating or Propagating Gradients Through Stochastic Neurons",
Bengio et al.). The gradient of a scale or centroid is the sum over the weights it stands for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.quantizers.codebooks import store_books
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.vqtensor import BOOKS, VQTensor, added_books, book_tensors, dequantize_with
from lowbit.quantizers.weights import QWeight

__all__ = ["Tunable", "TunableScalar", "TunableVectors", "tunable"]

_SCALAR = ("scale", "offset")
_VECTOR = (*BOOKS, "norm_scale", "norm_bias")


class Tunable(nn.Module):
    """float32 masters of the side values of one quantized matrix, as parameters; the codes are constants."""

    def __init__(self, q: QWeight, names: tuple[str, ...]) -> None:
        super().__init__()
        self.dtype = q.fmt.scale_dtype
        for name in names:
            value: Tensor | None = q.book(name) if isinstance(q, VQTensor) and name in BOOKS else getattr(q, name)
            if value is not None:
                self.register_parameter(name, nn.Parameter(value.detach().float().clone()))

    def stored(self) -> dict[str, Tensor]:
        """The side values as they would be stored, differentiable with respect to their masters."""
        near = self._near()
        return {name: master + (near[name] - master.detach()) for name, master in self.named_parameters()}

    def _near(self) -> dict[str, Tensor]:
        """float32: the values nearest to the masters that can be stored."""
        limit = torch.finfo(self.dtype).max
        masters = ((name, master.detach()) for name, master in self.named_parameters())
        return {name: master.clamp(-limit, limit).to(self.dtype).float() for name, master in masters}

    def weight(self) -> Tensor:
        """float32 [N, K]."""
        raise NotImplementedError

    def result(self) -> QWeight:
        """The matrix with the side values as they are now."""
        raise NotImplementedError

    def _final(self) -> dict[str, Tensor]:
        return {name: near.to(self.dtype).contiguous() for name, near in self._near().items()}


class TunableScalar(Tunable):
    """One code per weight: weight = (level - zero point) * scale + offset, or a sum of levels times scales."""

    def __init__(self, q: QTensor) -> None:
        super().__init__(q, _SCALAR)
        self._q = q
        n, k = q.shape
        size, groups = q.fmt.granularity.group_size(k), q.fmt.granularity.groups(k)
        levels = q.fmt.element.values(torch.stack([q.term(i) for i in range(q.fmt.terms)]))
        if q.zero is not None:
            levels = levels - q.zero.float().repeat_interleave(size, dim=1)[:, :k]
        # Groups as a dimension of their own; a ragged last one is padded, and the padding cut off again.
        self.register_buffer("levels", nn.functional.pad(levels, (0, groups * size - k)).view(-1, n, groups, size))

    def weight(self) -> Tensor:
        side = self.stored()
        scale = side["scale"] if self._q.tensor_scale is None else side["scale"] * self._q.tensor_scale
        levels = self.get_buffer("levels")
        dense = levels[0] * scale[:, :: len(levels), None]
        for i in range(1, len(levels)):
            dense = dense + levels[i] * scale[:, i :: len(levels), None]
        if "offset" in side:
            dense = dense + side["offset"][..., None]
        n, k = self._q.shape
        dense = dense.reshape(n, -1)[:, :k]
        return dense if self._q.perm is None else dense[:, torch.argsort(self._q.perm)]

    def result(self) -> QTensor:
        found: dict[str, Any] = self._final()
        return replace(self._q, **found)


class TunableVectors(Tunable):
    """Vector quantization: every codebook, and the norms if the format has them."""

    def __init__(self, q: VQTensor) -> None:
        super().__init__(q, _VECTOR)
        self._q = q

    def weight(self) -> Tensor:
        return dequantize_with(self._q, self.stored())

    def result(self) -> VQTensor:
        near = self._near()
        books = book_tensors(self._q.fmt, {name: near.pop(name) for name in BOOKS if name in near})
        norms = {name: value.to(self.dtype).contiguous() for name, value in near.items()}
        found: dict[str, Any] = books | norms
        return replace(self._q, **found)

    def _near(self) -> dict[str, Tensor]:
        near = super()._near()
        if self._q.fmt.scaled:
            masters = dict(self.named_parameters())
            for _, names in added_books(near):
                stored = store_books(self._q.fmt, [masters[name].detach() for name in names])
                near |= dict(zip(names, stored, strict=True))
        return near


def tunable(q: QWeight) -> Tunable:
    """The tunable form of any quantized matrix."""
    return TunableVectors(q) if isinstance(q, VQTensor) else TunableScalar(q)
