"""What a method is: it turns a float matrix into codes and scales of a given format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.compiler.errors import CheckpointError, RunError
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import Format, WeightFormat
from lowbit.quantizers.weights import QWeight

__all__ = ["Method", "Quantized", "check_finite", "proxy_error", "row_errors", "scalar_only"]


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized matrix and what is known about its quality.

    proxy_error: tr(D H D^T) / tr(W H W^T) on the calibration Hessian (the identity without calibration).
    rtn_error: the same for clip-searched rounding to nearest. notes: what did not go as usual.
    """

    qtensor: QWeight
    proxy_error: float
    rtn_error: float
    notes: tuple[str, ...] = ()


class Method(ABC):
    """A way to choose codes and scales. Subclasses are frozen dataclasses; their fields are the method's options."""

    name: ClassVar[str]
    needs_hessian: ClassVar[bool]

    @classmethod
    def effort(cls, fmt: WeightFormat) -> float:
        """Time for a matrix in `fmt` relative to GPTQ, as measured: what a dry run multiplies with."""
        return 1.0

    @abstractmethod
    def quantize(self, weight: Tensor, fmt: WeightFormat, stats: LayerStats | None) -> Quantized:
        """Quantize float32 [N, K] into `fmt`.

        Raises CheckpointError (LB0107) for a weight that is not finite, FormatError (LB0213) when the format does not
        fit, RunError LB0512 when the scale type cannot hold the weight's range, LB0515 for a kind of format that the
        method cannot produce.
        """


def scalar_only(fmt: WeightFormat, method: str) -> Format:
    """`fmt`, which must have one code per weight; raises RunError (LB0515) otherwise."""
    if not isinstance(fmt, Format):
        raise RunError(
            "LB0515", f"{method} cannot produce {fmt}", hint="use method vptq, or a format such as int4.g64.sym"
        )
    if fmt.terms > 1 and method not in ("rtn", "gptq"):
        raise RunError("LB0515", f"{method} cannot produce {fmt}", hint="use method gptq, or an integer format")
    if fmt.element.window > 1 and method not in ("rtn", "gptq"):
        raise RunError("LB0515", f"{method} cannot produce {fmt}", hint="use method gptq, or an integer format")
    if fmt.channel and method not in ("rtn", "gptq", "fmpq"):
        raise RunError(
            "LB0515", f"{method} cannot produce scales in i8ch", hint="use method gptq, or another scale type"
        )
    return fmt


def check_finite(weight: Tensor, where: str | None = None) -> None:
    """Raise CheckpointError (LB0107) naming the count and first index of non-finite values."""
    bad = ~weight.isfinite()
    if bool(bad.any()):
        first = bad.flatten().nonzero()[0].item()
        index = [int(i) for i in torch.unravel_index(torch.tensor(first), weight.shape)]
        raise CheckpointError(
            "LB0107",
            f"{int(bad.sum())} values are not finite, the first at {index}",
            where=where,
            hint="repair the checkpoint, or leave this layer out with `ignore`",
        )


def row_errors(delta: Tensor, hessian: Tensor | None) -> Tensor:
    """d H d^T of every row of `delta` [N, K]: float64 [N]. Without a Hessian, the squared norm."""
    if hessian is None:
        return delta.double().square().sum(1)
    return ((delta @ hessian.to(delta.dtype)).double() * delta.double()).sum(1)


def proxy_error(weight: Tensor, quantized: Tensor, hessian: Tensor | None) -> float:
    """The normalised loss tr(D H D^T) / tr(W H W^T); 0 when the layer's output is zero anyway."""
    size = float(row_errors(weight, hessian).sum())
    error = float(row_errors(quantized - weight, hessian).sum())
    return error / size if size > 0 else 0.0
