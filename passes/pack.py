"""pack: bring the weights' bytes into the layout their types name.

The IR does not change: `choose-layout` already said which layout, this pass makes it so.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from lowbit.compiler.errors import IRError
from lowbit.compiler.ir.graph import Linear, Weight, path_of
from lowbit.compiler.ir.types import QType
from lowbit.passes.session import session_of

__all__ = ["Pack"]


@dataclass(frozen=True)
class Pack(ModulePass):
    """Needs a session; refuses a weight without a layout (LB0311)."""

    name = "pack"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        session = session_of(ctx, self.name)
        for linear in [f for f in op.walk() if isinstance(f, Linear)]:
            type_ = linear.args_[1].type
            if not isinstance(type_, QType) or not isinstance(linear.args_[1].owner, Weight):
                continue
            if not type_.layout.data:
                raise IRError("LB0311", "a weight has no layout", where=path_of(linear), hint="run choose-layout first")
            session.pack(_paths(linear), type_.layout.data, linear.steps())
        for reader in [f for f in op.walk() if isinstance(f, Linear) and f.rounded is not None]:
            (path,), writer = _paths(reader), reader.args_[0].owner
            assert isinstance(writer, Linear)
            session.connect(_paths(writer), path)


def _paths(linear: Linear) -> tuple[str, ...]:
    """Module paths of a layer's matrices."""
    weight = linear.args_[1].owner
    assert isinstance(weight, Weight)
    return tuple(n.data.removesuffix(".weight") for n in weight.names.data)
