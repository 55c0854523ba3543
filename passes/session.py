"""What passes need beyond the IR: the model's data, supplied by whoever drives the pipeline.

Passes that only rewrite run on bare text. Those that touch weights or build kernels ask for a Session and refuse
without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from xdsl.context import Context

from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import IRError
from lowbit.compiler.ir.text import new_context
from lowbit.quantizers.formats import WeightFormat
from lowbit.quantizers.scheme import Scheme

__all__ = ["PassContext", "Session", "session_of"]


class Session(Protocol):
    """A model being compiled."""

    def quantize(self, path: str, fmt: WeightFormat) -> str:
        """Quantize the layer at module path `path`; returns the method's name and error, for the IR."""
        ...

    def pack(self, paths: tuple[str, ...], layout: str, epilogue: tuple[str, ...]) -> None:
        """Bring the layers' weights, stacked by rows, into a packed layout."""
        ...

    def connect(self, paths: tuple[str, ...], reader: str) -> None:
        """Let the kernel of the layers at `paths` round what the layer `reader` multiplies, where modules can."""
        ...

    def build(self, specs: Sequence[KernelSpec]) -> list[str]:
        """Build every kernel of every spec, in parallel; returns what was built, one text per spec, for the IR."""
        ...


@dataclass
class PassContext(Context):
    """A context with the three dialects and, when a model is at hand, its session and scheme."""

    session: Session | None = field(default=None)
    scheme: Scheme | None = field(default=None)

    @staticmethod
    def create(session: Session | None = None, scheme: Scheme | None = None) -> PassContext:
        """A context ready for parsing and for passes."""
        ctx = PassContext(session=session, scheme=scheme)
        for dialect in new_context().loaded_dialects:
            ctx.load_dialect(dialect)
        return ctx


def session_of(ctx: Context, pass_name: str) -> Session:
    """The session of `ctx`; raises IRError (LB0310) when the pass runs on bare text."""
    session = getattr(ctx, "session", None)
    if session is None:
        raise IRError(
            "LB0310",
            f"pass {pass_name} needs a model's weights and cannot run on text alone",
            hint="run it through `quantize run` or lowbit.compile",
        )
    return session  # type: ignore[no-any-return]
