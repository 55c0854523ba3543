"""fuse-requantize: a kernel rounds its own output where the only reader is a kernel that rounds its input.

%y = lb.linear %x, %w; %z = lb.linear %y, %v {activation = "int8.g64"}
-> %y = lb.linear %x, %w {rounds = "int8.g64"}; %z = lb.linear %y, %v {activation = "int8.g64", rounded}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr, TensorType, UnitAttr
from xdsl.passes import ModulePass

from lowbit.codegen.select import rounded_between
from lowbit.codegen.spec import Compute
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.graph import Linear
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.ir.types import DTYPES_OF, QType
from lowbit.passes.lower_kernels import LowerKernels

__all__ = ["FuseRequantize", "requantize_problem"]


@dataclass(frozen=True)
class FuseRequantize(ModulePass):
    """Where a backend has both kernels, in the layouts that were chosen. Scales have to be known to a thread block,
    which sees some columns of a token only: static ones, and those of groups. `target` in text form; empty means this
    machine's CPU. compute: as lower-kernels has it. gated: only behind silu-mul, which is where module-by-module
    execution has one module that calls both kernels.
    """

    name = "fuse-requantize"
    target: str = ""
    compute: str = "float"
    gated: bool = False

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        target = Target.parse(self.target) if self.target else host_target()
        for reader in [f for f in op.walk() if isinstance(f, Linear) and f.activation is not None]:
            writer = reader.args_[0].owner
            if not isinstance(writer, Linear) or (self.gated and "silu_mul" not in writer.steps()):
                continue
            if requantize_problem(reader, target, cast(Compute, self.compute)) is None:
                writer.rounds, writer.rounds_scales, reader.rounded = reader.activation, reader.scales, UnitAttr()


def requantize_problem(reader: Linear, target: Target, compute: Compute = "float") -> str | None:
    """Why the layer before `reader` cannot round what `reader` multiplies, or None."""
    writer = reader.args_[0].owner
    if not isinstance(writer, Linear) or not isinstance(writer.args_[1].type, QType):
        return "its input is not what a quantized layer gives"
    if not writer.outs[0].has_one_use():
        return "something else reads its input too"
    if reader.rounded is not None or writer.rounds is not None or reader.activation is None:
        return "there is nothing left to fuse"
    if reader.rotate is not None or reader.norm is not None:
        return "its input is rotated or normalised before it is rounded"
    before, after = (LowerKernels(compute).kernel_spec(layer).typed(_dtype(layer)) for layer in (writer, reader))
    try:
        rounded_between(before, after, target)
    except KernelError as e:
        return e.message
    return None


def _dtype(linear: Linear) -> str:
    """Type of a layer's numbers, as kernel specs call it."""
    return DTYPES_OF.get(cast("TensorType[StringAttr]", linear.outs[0].type).element_type, "f32")
