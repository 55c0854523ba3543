"""emit: source -> compile -> check against the reference -> store, for every kernel.

lbk.kernel @k {...}  ->  lbk.kernel @k {..., artifact = "cpp: 4 kernels, worst error 2.1e-06"}
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.passes import ModulePass

from lowbit.compiler.ir.kernel import Kernel
from lowbit.passes.lower_kernels import spec_of
from lowbit.passes.session import session_of

__all__ = ["Emit"]


@dataclass(frozen=True)
class Emit(ModulePass):
    """Needs a session, which owns the kernel cache."""

    name = "emit"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        session = session_of(ctx, self.name)
        kernels = [k for k in op.walk() if isinstance(k, Kernel)]
        for kernel, built in zip(kernels, session.build([spec_of(k) for k in kernels]), strict=True):
            kernel.artifact = StringAttr(built)
