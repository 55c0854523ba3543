"""Formats to choose from: each layer gets the one that serves it best, once its weight is known.

Text form: the candidates with `|` between them, such as `int6.ch.sym|e3m2.ch|e2m3.ch`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats.base import Format, WeightFormat

__all__ = ["ChoiceFormat"]


@dataclass(frozen=True)
class ChoiceFormat(WeightFormat):
    """`candidates`, two or more; of equally good ones the first is taken. Sizes are those of the largest."""

    candidates: tuple[Format, ...]

    def __post_init__(self) -> None:
        if len(set(self.candidates)) != len(self.candidates) or len(self.candidates) < 2:
            raise FormatError(
                "LB0218", "a choice needs two or more different formats", hint="write int6.ch.sym|e3m2.ch"
            )

    def __str__(self) -> str:
        return "|".join(map(str, self.candidates))

    def check(self, n: int, k: int, where: str) -> None:
        for fmt in self.candidates:
            fmt.check(n, k, where)

    def bits_per_weight(self, n: int, k: int) -> float:
        return max(fmt.bits_per_weight(n, k) for fmt in self.candidates)

    @property
    def scale_dtype(self) -> torch.dtype:
        return max((fmt.scale_dtype for fmt in self.candidates), key=lambda dtype: dtype.itemsize)
