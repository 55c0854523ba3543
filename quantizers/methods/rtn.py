"""Rounding to the nearest code: no calibration, and the baseline everything else is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import Format
from lowbit.quantizers.methods.base import Method, Quantized, check_finite, proxy_error
from lowbit.quantizers.methods.grid import search_grid

__all__ = ["Rtn"]


@dataclass(frozen=True)
class Rtn(Method):
    """Round to nearest. clip_search: choose each group's range by its squared error instead of its largest weight.

    signed_scale: allow negative scales in symmetric formats, which lets either side use the extra level.
    """

    clip_search: bool = True
    signed_scale: bool = True

    name: ClassVar[str] = "rtn"
    needs_hessian: ClassVar[bool] = False

    def quantize(self, weight: Tensor, fmt: Format, stats: LayerStats | None) -> Quantized:
        check_finite(weight)
        fmt.check(weight.shape[0], weight.shape[1], "weight")
        qtensor = search_grid(weight, fmt, clip=self.clip_search, signed=self.signed_scale).encode(weight)
        hessian = stats.hessian if stats is not None and bool(stats.hessian.isfinite().all()) else None
        error = proxy_error(weight, qtensor.dequantize(), hessian)
        return Quantized(qtensor, error, error)
