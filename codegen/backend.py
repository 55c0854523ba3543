"""What a backend is: a validated manifest and four functions. One folder under `codegen/` per backend."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import VectorFormat, WeightFormat
from lowbit.quantizers.qtensor import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["NO_ROWS", "Backend", "Launcher", "Source"]

Launcher = Callable[[torch.Tensor, PackedWeight, torch.Tensor | None, torch.Tensor | None, torch.Tensor], None]
"""launch(x [M, x_width], weight, bias or None, residual [M, n_out] or None, out [M, out_width]): runs one kernel.

bias has one entry per weight row, sum(segments): before silu_mul halves them. x and out are contiguous, on the
backend's device and of the spec's dtypes, uint8 where they are rows of rounded numbers; bias is float32, residual has
the spec's out_dtype.
"""

NO_ROWS = "neither reads nor writes activations that are rounded between kernels"
"""What backends say that do not serve a spec which `uses_rows`."""


@dataclass(frozen=True)
class Source:
    """Generated text, with what decides the compiled bytes. `digest` inputs are all here: nothing else may matter."""

    text: str
    suffix: str
    flags: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """16 hex digits over text and flags: equal for kernels that are the same code."""
        return hashlib.sha256("\0".join((self.text, *self.flags)).encode()).hexdigest()[:16]


class Backend(ABC):
    """A way to run a KernelSpec.

    `name` is the folder's. `kinds` are the device kinds it serves (`cpu`, `cuda`). `layout` and `vector_layout` name
    the packed layouts (in `compiler.ir.layout.LAYOUTS`) its kernels read for scalar and for vector formats, and
    `input_layout`, where it differs, the one for vectors along the input. `traits`,
    from coarse to fine, are the schedule fields by which kernels differ in kind: tuning measures one of every kind
    before it measures two alike. `compiles_when_loaded`: `load` does the work of a compiler.
    `any_layout`: weights are read in whatever layout they are packed. `invariant`: what one schedule computes for a
    token does not depend, to the bit, on the other tokens of a call. `behind`: names of backends it only stands in for:
    where one of them can run a kernel its turn comes after all others but the reference, unless it was measured to be
    best. `beside`: names of backends whose layout it shares for some kernels: nobody misses it beside them, and
    it decides for no layout.
    """

    name: str
    kinds: tuple[str, ...]
    layout: str
    vector_layout: str
    input_layout: str = ""
    traits: tuple[tuple[str, ...], ...] = (("tile_m", "tile_n"),)
    compiles_when_loaded: bool = False
    any_layout: bool = False
    invariant: bool = False
    behind: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def layout_of(self, fmt: WeightFormat, target: Target | None = None) -> str:
        """Name of the packed layout its kernels read for `fmt`: the best one for `target`."""
        if not isinstance(fmt, VectorFormat):
            return self.layout
        return (self.input_layout if fmt.axis == "in" else "") or self.vector_layout

    def reads(self, spec: KernelSpec) -> bool:
        """Whether its kernels read the packed layout of `spec`."""
        return self.any_layout or spec.layout_ == LAYOUTS[self.layout_of(spec.weight_format)]

    def waits(self, others: Iterable[Backend]) -> bool:
        """Whether one of `others` is a backend it is `behind`."""
        return any(other.name in self.behind for other in others)

    def missed(self, others: Iterable[Backend]) -> bool:
        """Whether something is lost where it cannot run but `others` can."""
        return not self.any_layout and not any(other.name in (*self.behind, *self.beside) for other in others)

    def serves(self, fmt: WeightFormat, activation: str = "") -> str | None:
        """None when there are kernels at all for `fmt` and activations in `activation` (text of an ActivationFormat, or
        empty), else one line that says why not."""
        return None

    @abstractmethod
    def available(self, target: Target) -> str | None:
        """None when kernels can be built and run for `target`, else one line that says why not."""

    def builds(self, target: Target) -> str | None:
        """None when kernels for `target`, which may be another machine's, can be compiled here into files that it runs
        without a compiler, else one line that says why not."""
        return f"kernels of {self.name} are not files that run elsewhere"

    @abstractmethod
    def supports(self, spec: KernelSpec, target: Target) -> str | None:
        """None when the backend can emit `spec`, else one line that says why not."""

    @abstractmethod
    def space(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        """Every schedule worth considering for `m` tokens, legal or not, in any order."""

    @abstractmethod
    def illegal(self, spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
        """Why `schedule` cannot run `spec` on `target` (shared memory, registers, what does not divide), or None."""

    def schedules(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        """Legal schedules for `m` tokens, the predicted best first: what is used where nothing was measured."""
        legal = (s for s in dict.fromkeys(self.space(spec, target, m)) if self.illegal(spec, s, target) is None)
        return sorted(legal, key=lambda s: (self.predict(spec, s, target, m), str(s)))

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
