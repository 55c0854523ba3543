"""TVM script of one kernel. Two shapes, `direct` and `buffered`, which share loads, decoding and epilogue.

Sums of a token are formed in the same order wherever its tile begins and whichever thread has it.
"""

from __future__ import annotations

from lowbit.codegen.tvm.buffered import buffered_body
from lowbit.codegen.tvm.direct import direct_body
from lowbit.codegen.tvm.frame import inside, local
from lowbit.codegen.tvm.plan import Plan

__all__ = ["ENTRY", "emit_text"]

ENTRY = "main"
"""Name of the generated function: (pointers of `Plan.params`, m, first, last) runs units `first` to `last` for `m`
tokens."""

_MOST = 2**31 - 1


def emit_text(plan: Plan) -> str:
    """The function's source. Pointers have no bounds there, so buffers are declared as long as an index reaches."""
    pointers = [f'{name}_: T.handle("{kind}")' for name, kind in plan.params.items()]
    body = ['T.func_attr({"global_symbol": "' + ENTRY + '", "tirx.noalias": True})']
    body += [f'{name} = T.decl_buffer(({_MOST},), "{kind}", data={name}_)' for name, kind in plan.params.items()]
    body += [local(f"tail{i}", 1) for i in range(plan.pairs)]
    body += buffered_body(plan) if plan.buffered else direct_body(plan)
    arguments = ", ".join([*pointers, *(f"{name}: T.int32" for name in ("m", "first", "last"))])
    return "\n".join(["@T.prim_func(s_tir=True)", f"def {ENTRY}({arguments}):", *inside(body)]) + "\n"
