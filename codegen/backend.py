"""What a backend is: a validated manifest and four functions. One folder under `codegen/` per backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import VectorFormat, WeightFormat
from lowbit.quantizers.qtensor import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Backend", "Launcher", "Source"]

Launcher = Callable[[torch.Tensor, PackedWeight, torch.Tensor | None, torch.Tensor | None, torch.Tensor], None]
"""launch(x [M, K], weight, bias or None, residual [M, n_out] or None, out [M, n_out]): runs one kernel.

bias has one entry per weight row, sum(segments): before silu_mul halves them. x and out are contiguous, on the
backend's device and of the spec's dtypes; bias is float32, residual has out's dtype.
"""


@dataclass(frozen=True)
class Source:
    """Generated text, with what decides the compiled bytes. `digest` inputs are all here: nothing else may matter."""

    text: str
    suffix: str
    flags: tuple[str, ...] = ()


class Backend(ABC):
    """A way to run a KernelSpec.

    `name` is the folder's. `kinds` are the device kinds it serves (`cpu`, `cuda`). `layout` and `vector_layout` name
    the packed layouts (in `compiler.ir.layout.LAYOUTS`) its kernels read for scalar and for vector formats.
    """

    name: str
    kinds: tuple[str, ...]
    layout: str
    vector_layout: str

    def layout_of(self, fmt: WeightFormat) -> str:
        """Name of the packed layout its kernels read for `fmt`."""
        return self.vector_layout if isinstance(fmt, VectorFormat) else self.layout

    def serves(self, fmt: WeightFormat, activation: str = "") -> str | None:
        """None when there are kernels at all for `fmt` and activations in `activation` (text of an ActivationFormat, or
        empty), else one line that says why not."""
        return None

    @abstractmethod
    def available(self, target: Target) -> str | None:
        """None when kernels can be built and run for `target`, else one line that says why not."""

    @abstractmethod
    def supports(self, spec: KernelSpec, target: Target) -> str | None:
        """None when the backend can emit `spec`, else one line that says why not."""

    @abstractmethod
    def schedules(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        """Legal schedules for `m` tokens, the predicted best first."""

    @abstractmethod
    def predict(self, spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
        """Predicted seconds of one call with cold weights, from bytes and instruction counts."""

    @abstractmethod
    def emit(self, spec: KernelSpec, schedule: Schedule, target: Target) -> Source:
        """Source text of one kernel. A pure function of its arguments and the generator's own sources."""

    @abstractmethod
    def compile(self, source: Source, out: Path) -> None:
        """Compile `source` into the file `out`; raises KernelError (LB041x) with the compiler's last words."""

    @abstractmethod
    def toolchain(self) -> str:
        """Versions of everything that turns source into bytes: part of the cache key."""

    @abstractmethod
    def load(self, artifact: Path, spec: KernelSpec, schedule: Schedule) -> Launcher:
        """A launcher for a compiled artifact."""
