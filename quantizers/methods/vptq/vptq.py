"""VPTQ: a codebook per matrix, and indices chosen column by column with second-order error feedback.

After "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models" (Liu et al.), with additions
that store nothing more: codebooks weighted by what an error costs after compensation and re-fitted to the compensated
columns, a joint search of main and residual centroids, and after the column loop rounds of a least-squares fit of the
codebooks, coordinate descent over the indices and a fit of row norms, which never raise the loss.

Vectors along the input (axis `in`) go through the same stages a run of columns at a time (`row_stages`); with two books
and row norms that is the format of "Extreme Compression of Large Language Models via Additive Quantization" (Egiazarian
et al.), whose joint choice of both centroids and joint fit of both codebooks these stages have too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from lowbit.compiler.errors import RunError
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.factor import prepare
from lowbit.quantizers.formats import VectorFormat, WeightFormat
from lowbit.quantizers.methods.base import Quantized, check_finite, proxy_error
from lowbit.quantizers.methods.target import SecondOrder
from lowbit.quantizers.methods.vptq.solver import Settings, Solver, Weighting

__all__ = ["Vptq"]


@dataclass(frozen=True)
class Vptq(SecondOrder):
    """VPTQ, for the formats `vq.*`.

    damping: share of the mean diagonal added to the Hessian's diagonal. block: columns between two full updates.
    iterations, tolerance, seed: of k-means. sample: vectors k-means looks at, 0 for all of them. weighting: what a
    column's error counts in k-means: as any other's (`none`), the Hessian's diagonal (`diagonal`, the paper's), or its
    cost after compensation (`conditional`, the inverse diagonal of H^-1's factor squared). restarts: times the column
    loop runs again with books fitted to the columns as compensated. refit: rounds of codebook fit and coordinate
    descent. beam: main centroids tried with every residual centroid; 1 chooses one after the other. asymmetric: see
    `SecondOrder`.

    The paper's algorithm is weighting = "diagonal", restarts = 0, refit = 0, beam = 1. The reported `rtn_error` is
    that of k-means (weighted as asked) and nearest centroids, without feedback.
    """

    damping: float = 0.01
    block: int = 128
    iterations: int = 12
    tolerance: float = 1e-4
    seed: int = 0
    sample: int = 262144
    weighting: str = "conditional"
    restarts: int = 3
    refit: int = 6
    beam: int = 16
    asymmetric: float | None = None

    name: ClassVar[str] = "vptq"

    @classmethod
    def effort(cls, fmt: WeightFormat) -> float:
        if not isinstance(fmt, VectorFormat):
            return 1.0
        return 9.0 * (3.0 if fmt.residual else 1.0) * max(1.0, fmt.centroids / 1024)

    def __post_init__(self) -> None:
        self.check_calibration()
        if min(self.block, self.beam) < 1:
            raise RunError("LB0503", "block and beam must be positive", where="vptq")
        if min(self.iterations, self.seed, self.sample, self.restarts, self.refit) < 0 or not self.tolerance >= 0:
            raise RunError("LB0503", "counts, the seed and the tolerance must not be negative", where="vptq")
        if self.weighting not in get_args(Weighting):
            allowed = ", ".join(get_args(Weighting))
            raise RunError("LB0503", f"unknown weighting {self.weighting!r}", where="vptq", hint=f"use {allowed}")

    def quantize(self, weight: Tensor, fmt: WeightFormat, stats: LayerStats | None) -> Quantized:
        """As `Method.quantize`; without a usable Hessian the result is plain k-means, and a note says so."""
        if not isinstance(fmt, VectorFormat):
            hint = "give a vector format such as vq.d4.k256, or use another method"
            raise RunError("LB0515", f"vptq cannot produce {fmt}", hint=hint)
        check_finite(weight)
        fmt.check(weight.shape[0], weight.shape[1], "weight")
        run = fmt.dim if fmt.axis == "in" else 1
        prepared = prepare(stats, self.damping, act_order=True, run=run) if stats is not None else None
        solver = Solver(self._settings(), weight, fmt, prepared)
        plain = solver.plain()
        baseline = solver.stored(plain)
        if prepared is None:
            error = proxy_error(weight, baseline.dequantize(), None)
            why = "no calibration statistics" if stats is None else "the Hessian is zero or not finite"
            return Quantized(baseline, error, error, (f"{why}; plain k-means",))
        found = solver.stored(solver.refine(solver.loop(plain.parts)))
        new, old = (proxy_error(weight, q.dequantize(), prepared.raw) for q in (found, baseline))
        if new <= old:
            return Quantized(found, new, old, prepared.notes)
        return Quantized(baseline, old, old, (*prepared.notes, "plain k-means was better than error feedback"))

    def _settings(self) -> Settings:
        numbers = (self.block, self.iterations, self.tolerance, self.seed, self.sample)
        return Settings(*numbers, self.weighting, self.restarts, self.refit, self.beam)  # type: ignore[arg-type]
