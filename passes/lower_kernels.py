"""lower-kernels: quantized linear layers become calls of `lbk.kernel`, one kernel per distinct spec.

    %y = lb.linear %x, %w : (..., !lb.q<64x64, "int4.g64.sym", "panel16">) -> ...
    -> lbk.kernel @k_<digest> {decode program, body};  %y = lb.call %x, %w {kernel = @k_<digest>}

Linear layers with dense weights stay as they are: torch runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from xdsl.context import Context
from xdsl.dialects.builtin import (
    ArrayAttr,
    FloatAttr,
    IntAttr,
    IntegerAttr,
    ModuleOp,
    StringAttr,
    SymbolRefAttr,
    TensorType,
    f32,
    f64,
)
from xdsl.ir import Attribute, Block, Region, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import InsertPoint, Rewriter

from lowbit.codegen.decode import decode_program
from lowbit.codegen.rounded import ROUNDED
from lowbit.codegen.spec import Compute, KernelSpec, rounded_products
from lowbit.compiler.errors import IRError
from lowbit.compiler.ir import kernel as lbk
from lowbit.compiler.ir.graph import Call, Linear, at, path_of
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.types import DTYPES_OF, QType, tensor
from lowbit.quantizers.formats import parse_activation

__all__ = ["LowerKernels", "kernel_op", "spec_of"]


@dataclass(frozen=True)
class LowerKernels(ModulePass):
    """`compute`: how products are formed (`float`, `int16`, `int8`); formats that are not integers use `float`, and
    rounded activations what suits them."""

    name = "lower-kernels"
    compute: str = "int16"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        known: set[str] = set()
        for linear in [f for f in op.walk() if isinstance(f, Linear)]:
            if not isinstance(linear.args_[1].type, QType):
                continue
            spec = self.kernel_spec(linear)
            name = f"k_{spec.digest()}"
            if name not in known:
                known.add(name)
                Rewriter.insert_op(kernel_op(name, spec), InsertPoint.at_start(op.body.block))
            call = Call(list(linear.args_), [linear.outs[0].type], {"kernel": SymbolRefAttr(name)})
            Rewriter.replace_op(linear, at(call, path_of(linear)))

    def kernel_spec(self, linear: Linear) -> KernelSpec:
        """What kernel a linear layer needs."""
        spec = self._numbers_spec(linear)
        if linear.rounds is not None:
            spec = replace(spec, out_activation=linear.rounds.data)
        if linear.rounded is not None:  # then nobody else says later what type the output has
            element = cast("TensorType[Attribute]", linear.outs[0].type).element_type
            spec = replace(spec, x_dtype=ROUNDED, out_dtype=DTYPES_OF.get(element, "f32"))
        return spec

    def _numbers_spec(self, linear: Linear) -> KernelSpec:
        """The same without what other kernels round."""
        type_ = linear.args_[1].type
        assert isinstance(type_, QType)
        if not type_.layout.data:
            raise IRError("LB0311", "a weight has no layout", where=path_of(linear), hint="run choose-layout first")
        segments = tuple(cast(IntAttr, s).data for s in linear.segments.data) if linear.segments else (type_.n.data,)
        layout = LAYOUTS[type_.layout.data]
        spec = KernelSpec(segments, type_.k.data, type_.fmt.data, str(layout), "float", epilogue=linear.steps())
        # Other orders, and GPUs, have their rotations done by torch, before the kernel (see `PackedLinear`).
        block = linear.rotate.data if linear.rotate and layout.container == 8 else 0
        spec = replace(spec, rotate=0 if block & (block - 1) else block)
        spec = replace(spec, norm_eps=linear.norm.value.data if linear.norm is not None else 0.0)
        if linear.activation is not None:
            text = linear.activation.data
            compute = rounded_products(spec.weight_format, spec.k, layout, parse_activation(text))
            return replace(spec, compute=compute, activation=text)
        if self.compute == "float" or spec.integer_levels is None:
            return spec
        return replace(spec, compute=cast(Compute, self.compute))


def kernel_op(name: str, spec: KernelSpec) -> lbk.Kernel:
    """The kernel as an operation: the format's decode program, and a body that says what is fused."""
    x_type, w_type = tensor((None, spec.k), f32), QType.get(sum(spec.segments), spec.k, spec.format)
    wide = tensor((None, sum(spec.segments)), f32)
    side = {"bias": tensor((sum(spec.segments),), f32), "residual": tensor((None, spec.n_out), f32)}
    extra = [side[e] for e in spec.epilogue if e in side]
    extra += [tensor((spec.k,), f32)] if spec.norm_eps else []
    block = Block(arg_types=[x_type, w_type, *extra])
    x, w, *rest = block.args
    value: SSAValue = x
    if spec.norm_eps:
        norm = lbk.NormActivation(value, rest.pop(), spec.norm_eps)
        block.add_op(norm)
        value = norm.res
    if spec.rotate:
        rotate = lbk.RotateActivation(value, spec.rotate)
        block.add_op(rotate)
        value = rotate.res
    if (spec.limbs or spec.activation) and not spec.reads_rows:
        quantize = lbk.QuantizeActivation(value, spec.limbs, spec.activation)
        block.add_op(quantize)
        value = quantize.res
    mma = lbk.Mma(value, w, wide)
    block.add_op(mma)
    acc = mma.res
    for step in spec.epilogue:
        cls = {"bias": lbk.AddBias, "silu_mul": lbk.SiluMul, "residual": lbk.Residual}[step]
        operands = [acc, rest.pop(0)] if step in side else [acc]
        done = cls(*operands, result=tensor((None, spec.n_out), f32) if step == "silu_mul" else acc.type)
        block.add_op(done)
        acc = done.res
    if spec.out_rounding:
        rounded = lbk.QuantizeActivation(acc, int(spec.out_rounding.integer), spec.out_activation)
        block.add_op(rounded)
        acc = rounded.res
    block.add_op(lbk.Yield(acc))
    return lbk.Kernel(name, _spec_attributes(spec), decode_program(spec.weight_format).clone(), Region(block))


def _spec_attributes(spec: KernelSpec) -> dict[str, Attribute]:
    more: dict[str, Attribute] = {"activation": StringAttr(spec.activation)} if spec.activation else {}
    if spec.rotate:
        more["rotate"] = IntegerAttr(spec.rotate, 64)
    if spec.norm_eps:
        more["norm_eps"] = FloatAttr(spec.norm_eps, f64)
    if spec.out_activation:
        more["out_activation"] = StringAttr(spec.out_activation)
    return {
        "segments": ArrayAttr(IntegerAttr(n, 64) for n in spec.segments),
        "k": IntegerAttr(spec.k, 64),
        "format": StringAttr(spec.format),
        "layout": StringAttr(spec.layout),
        "compute": StringAttr(spec.compute),
        "x_dtype": StringAttr(spec.x_dtype),
        "out_dtype": StringAttr(spec.out_dtype),
        "epilogue": ArrayAttr(StringAttr(e) for e in spec.epilogue),
        **more,
    }


def spec_of(kernel: lbk.Kernel) -> KernelSpec:
    """The KernelSpec a kernel operation was made from."""
    d = kernel.spec.data
    text = {name: cast(StringAttr, d[name]).data for name in ("format", "layout", "x_dtype", "out_dtype")}
    return KernelSpec(
        tuple(cast("IntegerAttr", s).value.data for s in cast(ArrayAttr, d["segments"]).data),
        cast("IntegerAttr", d["k"]).value.data,
        text["format"],
        text["layout"],
        cast(Compute, cast(StringAttr, d["compute"]).data),
        text["x_dtype"],
        text["out_dtype"],
        tuple(cast(StringAttr, e).data for e in cast(ArrayAttr, d["epilogue"]).data),
        cast(StringAttr, d["activation"]).data if "activation" in d else "",
        cast("IntegerAttr", d["rotate"]).value.data if "rotate" in d else 0,
        cast("FloatAttr", d["norm_eps"]).value.data if "norm_eps" in d else 0.0,
        out_activation=cast(StringAttr, d["out_activation"]).data if "out_activation" in d else "",
    )
