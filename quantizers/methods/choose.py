"""Choosing among formats by the error they leave in the layer's output.

The criterion is that of "FP8 versus INT8 for efficient deep learning inference" (van Baalen et al.): whichever grid has
the lower error on the layer at hand, which depends on how far its weights lie from a uniform spread. Here the error is
tr(D H D^T) on the calibration Hessian, after the whole method and not only after rounding.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import ChoiceFormat, WeightFormat
from lowbit.quantizers.methods.base import Method, Quantized
from lowbit.quantizers.methods.target import aim

__all__ = ["quantize_weight"]


def quantize_weight(method: Method, weight: Tensor, fmt: WeightFormat, stats: LayerStats | None) -> Quantized:
    """`method.quantize`, aimed where the method's options say (see `target`); errors count from there.

    Where `fmt` is a choice, with every candidate, and the result with the lowest error.

    Candidates should cost the same; a larger one that is better always wins. Ties go to the earlier candidate. A note
    gives the errors of the others. Raises what `Method.quantize` raises.
    """
    weight, notes = aim(method, weight, stats)
    found = _best(method, weight, fmt, stats)
    return replace(found, notes=(*found.notes, *notes)) if notes else found


def _best(method: Method, weight: Tensor, fmt: WeightFormat, stats: LayerStats | None) -> Quantized:
    if not isinstance(fmt, ChoiceFormat):
        return method.quantize(weight, fmt, stats)
    results = [method.quantize(weight, candidate, stats) for candidate in fmt.candidates]
    best = min(results, key=lambda result: result.proxy_error)
    others = ", ".join(f"{r.qtensor.fmt} {r.proxy_error:.3g}" for r in results if r is not best)
    return replace(best, notes=(*best.notes, f"chosen over {others}"))
