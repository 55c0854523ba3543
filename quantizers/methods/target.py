"""Asymmetric calibration: aiming at what the float model's layer puts out, not at what it would make of worse inputs.

After "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration" (Li et al.). A layer W that reads r in
the float model reads x behind what is quantized already. E |W r - Q x|^2 over Q is, up to a constant, the ordinary loss
(Q - T) H (Q - T)^T with H = E[x x^T] and T = W + W D H^-1, D = E[(r - x) x^T]. So methods stay as they are and get T
for a weight, where the paper spreads the same correction over GPTQ's columns; that serves every method.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lowbit.compiler.errors import RunError
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.methods.base import Method, check_finite

__all__ = ["SecondOrder", "aim", "asymmetric", "in_mode"]


class SecondOrder(Method):
    """A method that minimises the loss on a Hessian.

    damping: share of the mean diagonal added to the Hessian's diagonal. asymmetric: how far to go from the weight (0)
    to the T of this file (1); None leaves it to the run: `usual` of the method where layers are calibrated one behind
    the other, 0 elsewhere. Calibration text is finite, and T fits what is peculiar to it too: on SmolLM2-135M with 4096
    tokens 0.25 was best at 2 bits, 0.5 lowered perplexity at 2 and 3 bits, and 1 raised it.
    """

    damping: float
    asymmetric: float | None

    needs_hessian: ClassVar[bool] = True
    usual: ClassVar[float] = 0.0
    """The share that measured well, 0 for methods that were not measured."""

    def check_calibration(self) -> None:
        """Raise RunError (LB0503) for values out of range."""
        if not self.damping > 0:
            raise RunError("LB0503", f"damping must be positive, not {self.damping}", where=self.name)
        if self.asymmetric is not None and not 0 <= self.asymmetric <= 1:
            raise RunError("LB0503", f"asymmetric must be between 0 and 1, not {self.asymmetric}", where=self.name)


def asymmetric(method: Method) -> float:
    """How far a method goes from the weight to T: 0 for those that do not ask what the float model's layers read."""
    return (method.asymmetric or 0.0) if isinstance(method, SecondOrder) else 0.0


def in_mode(method: Method, sequential: bool) -> Method:
    """The method as a run uses it, that calibrates layers one behind the other or all on the float model's inputs.

    Raises RunError (LB0518) for asymmetric calibration in parallel mode, in which the two inputs are the same.
    """
    if not isinstance(method, SecondOrder):
        return method
    if method.asymmetric is None:
        share = method.usual if sequential else 0.0
        return cast(Method, replace(cast(Any, method), asymmetric=share))
    if method.asymmetric and not sequential:
        raise RunError(
            "LB0518",
            "asymmetric calibration compares the float model with the quantized one, which parallel mode never runs",
            where=method.name,
            hint="calibrate sequentially, or leave `asymmetric` out",
        )
    return method


def aim(method: Method, weight: Tensor, stats: LayerStats | None) -> tuple[Tensor, tuple[str, ...]]:
    """The matrix [N, K] that `method` should come close to, and a note where that is not the one it was asked for.

    `weight` itself, the same object, unless the method is asymmetric. Raises CheckpointError (LB0107) as methods do.
    """
    if not isinstance(method, SecondOrder) or not method.asymmetric or stats is None:
        return weight, ()
    check_finite(weight)
    if stats.shift is None:
        return weight, ("what the float model's layer reads is not known; calibrated on the quantized model's inputs",)
    step = _step(stats, method.damping)
    if step is None:
        return weight, ("the Hessian has no factor; calibrated on the quantized model's inputs",)
    return weight + method.asymmetric * (weight @ step), ()


def _step(stats: LayerStats, damping: float) -> Tensor | None:
    """D (H + damping)^-1, float32 [K, K], kept for sibling layers; None when there is none in float64."""
    key = ("step", damping)
    if key not in stats.derived:
        stats.derived[key] = _solve(stats, damping)
    found: Tensor | None = stats.derived[key]
    return found


def _solve(stats: LayerStats, damping: float) -> Tensor | None:
    assert stats.shift is not None
    hessian = stats.hessian.double().clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(hessian)
    if int(info) != 0:
        return None
    step = torch.cholesky_solve(stats.shift.double().T, factor).T.float().contiguous()
    return step if bool(step.isfinite().all()) else None
