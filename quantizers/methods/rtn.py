"""Rounding to the nearest code: no calibration, and the baseline everything else is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import Format, WeightFormat
from lowbit.quantizers.methods.base import Method, Quantized, check_finite, proxy_error, scalar_only
from lowbit.quantizers.methods.grid import search_grid
from lowbit.quantizers.methods.trellis import round_trellis
from lowbit.quantizers.methods.two_level import round_two_levels
from lowbit.quantizers.qtensor import QTensor

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

    def quantize(self, weight: Tensor, fmt: WeightFormat, stats: LayerStats | None) -> Quantized:
        check_finite(weight)
        fmt = scalar_only(fmt, self.name)
        fmt.check(weight.shape[0], weight.shape[1], "weight")
        qtensor = self.round(weight, fmt)
        hessian = stats.hessian if stats is not None and bool(stats.hessian.isfinite().all()) else None
        error = proxy_error(weight, qtensor.dequantize(), hessian)
        return Quantized(qtensor, error, error)

    def round(self, weight: Tensor, fmt: Format) -> QTensor:
        """The codes alone."""
        if fmt.element.window > 1:
            return round_trellis(weight, fmt)
        if fmt.channel:
            return round_two_levels(weight, fmt)
        return search_grid(weight, fmt, clip=self.clip_search, signed=self.signed_scale).encode(weight)
