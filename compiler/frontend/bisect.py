"""Which pass breaks a model: the graph is compiled after none, one, two ... of the passes, and compared each time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from xdsl.passes import ModulePass

from lowbit.compiler.errors import RunError
from lowbit.compiler.frontend.dynamo import Options, compile_graph, passes

__all__ = ["Bisection", "bisect_passes"]


@dataclass(frozen=True)
class Bisection:
    """errors: (last pass run, largest relative error of any output). first: the first pass beyond the tolerance; None
    when there is none; `import` when the graph is wrong before any pass."""

    errors: list[tuple[str, float]]
    first: str | None

    def text(self) -> str:
        """One line per pass, and the culprit."""
        lines = [f"{error:10.2e}  after {name}" for name, error in self.errors]
        return "\n".join([*lines, f"first pass out of tolerance: {self.first or 'none'}"])


def bisect_passes(
    model: nn.Module, inputs: dict[str, Any], tolerance: float = 1e-3, steps: Sequence[ModulePass] | None = None
) -> Bisection:
    """Compare the graph after each pass with the model itself, both run without Inductor.

    inputs: keyword arguments of the model. Raises RunError (LB0573) when the model gives no tensors to compare.
    """
    every = list(passes() if steps is None else steps)
    with torch.no_grad():
        want = _tensors(model(**inputs))
        if not want:
            raise RunError("LB0573", "the model gives no tensors to compare", where=type(model).__name__)
        errors: list[tuple[str, float]] = []
        for count in range(len(every) + 1):
            torch._dynamo.reset()
            got = _tensors(torch.compile(model, backend=_backend(every[:count]), fullgraph=True)(**inputs))
            errors.append((every[count - 1].name if count else "import", _error(got, want)))
    torch._dynamo.reset()
    return Bisection(errors, next((name for name, error in errors if not error <= tolerance), None))


def _backend(steps: Sequence[ModulePass]) -> Callable[..., Any]:
    def run(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, inputs, Options(rest="eager"), steps)

    return functools.wraps(compile_graph)(run)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest number of its tensor; infinite for other shapes."""
    if [g.shape for g in got] != [w.shape for w in want]:
        return float("inf")
    pairs = zip(got, want, strict=True)
    return max(float((g - w).abs().max() / w.abs().max().clamp(min=1e-12)) for g, w in pairs if w.numel())
