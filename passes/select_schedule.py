"""select-schedule: for every kernel and token class, the backend and schedule that are expected to be fastest.

lbk.kernel @k {...}  ->  lbk.kernel @k {..., schedule = {m1 = "cpp tile_n=16 ...", m512 = "cpp ..."}}
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import DictionaryAttr, ModuleOp, StringAttr
from xdsl.ir import Attribute
from xdsl.passes import ModulePass

from lowbit.codegen.schedule import M_CLASSES, Schedule, m_class
from lowbit.codegen.select import candidates
from lowbit.compiler.ir.kernel import Kernel
from lowbit.compiler.ir.target import Target, host_target
from lowbit.passes.lower_kernels import spec_of

__all__ = ["SelectSchedule"]


@dataclass(frozen=True)
class SelectSchedule(ModulePass):
    """What tuning measured on this device, else by the backends' cost models. `max_tokens` bounds the token classes;
    `target` empty means this machine's CPU."""

    name = "select-schedule"
    max_tokens: int = 512
    target: str = ""

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        target = Target.parse(self.target) if self.target else host_target()
        classes = [m for m in M_CLASSES if m <= m_class(self.max_tokens)]
        for kernel in [k for k in op.walk() if isinstance(k, Kernel)]:
            spec = spec_of(kernel)
            chosen: dict[str, Attribute] = {}
            for m in classes:
                _, backend, schedule = candidates(spec, target, m)[0]
                chosen[f"m{m}"] = StringAttr(f"{backend.name} {_text(schedule)}")
            kernel.schedule = DictionaryAttr(chosen)


def _text(schedule: Schedule) -> str:
    return " ".join(f"{k}={v}" for k, v in schedule.to_dict().items())
