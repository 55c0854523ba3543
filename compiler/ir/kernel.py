"""The kernel dialect `lbk`: one fused kernel, and the decode programs of formats.

A `lbk.kernel` has two regions. `decode` turns packed words into one number, over bit and float operations on scalars;
every backend prints it in its own language. `body` says what the kernel computes with whole tiles: quantize the
activations, multiply, finish.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

from xdsl.dialects.builtin import (
    ArrayAttr,
    DictionaryAttr,
    FloatAttr,
    IntAttr,
    StringAttr,
    f32,
    f64,
    i32,
)
from xdsl.ir import Attribute, Dialect, Operation, Region, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    attr_def,
    irdl_op_definition,
    operand_def,
    opt_attr_def,
    region_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import IsolatedFromAbove, IsTerminator, NoTerminator, Pure, SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

__all__ = [
    "LBK",
    "AddBias",
    "AddFloat",
    "And",
    "ArgName",
    "Bitcast",
    "Const",
    "Fma",
    "Gather",
    "Half",
    "IntConst",
    "IntToFloat",
    "Kernel",
    "Lut",
    "Mma",
    "Mul",
    "Multiply",
    "NormActivation",
    "Or",
    "Plus",
    "QuantizeActivation",
    "Residual",
    "RotateActivation",
    "Shl",
    "Shr",
    "SiluMul",
    "SubFloat",
    "Yield",
]


Signature: TypeAlias = tuple[tuple[Attribute, ...], Attribute]


class _Scalar(IRDLOperation):
    """Base of decode operations: scalars in, one scalar out, no side effect."""

    args_ = var_operand_def(Attribute)
    res = result_def(Attribute)
    traits = traits_def(Pure())
    # (operand types), result type; the whole type rule of the operation.
    SIGNATURE: ClassVar[Signature]

    def __init__(self, *operands: SSAValue, attributes: dict[str, Attribute] | None = None) -> None:
        super().__init__(operands=[list(operands)], result_types=[self.SIGNATURE[1]], attributes=attributes or {})

    def verify_(self) -> None:
        want, result = self.SIGNATURE
        got = tuple(a.type for a in self.args_)
        if got != want or self.res.type != result:
            raise VerifyException(f"{self.name} takes {want} and gives {result}, not {got} and {self.res.type}")


@irdl_op_definition
class Const(_Scalar):
    """A float constant."""

    name = "lbk.const"
    value = attr_def(FloatAttr)
    SIGNATURE: ClassVar[Signature] = ((), f32)


@irdl_op_definition
class IntConst(_Scalar):
    """An integer constant (a mask or a shift)."""

    name = "lbk.int"
    value = attr_def(IntAttr)
    SIGNATURE: ClassVar[Signature] = ((), i32)


@irdl_op_definition
class Shr(_Scalar):
    """Logical shift right of a container; bits shifted in are zero."""

    name = "lbk.shr"
    SIGNATURE: ClassVar[Signature] = ((i32, i32), i32)


@irdl_op_definition
class Shl(_Scalar):
    """Shift left."""

    name = "lbk.shl"
    SIGNATURE: ClassVar[Signature] = ((i32, i32), i32)


@irdl_op_definition
class And(_Scalar):
    """Bitwise and."""

    name = "lbk.and"
    SIGNATURE: ClassVar[Signature] = ((i32, i32), i32)


@irdl_op_definition
class Or(_Scalar):
    """Bitwise or."""

    name = "lbk.or"
    SIGNATURE: ClassVar[Signature] = ((i32, i32), i32)


@irdl_op_definition
class Multiply(_Scalar):
    """Product of two integers, its lowest 32 bits."""

    name = "lbk.multiply"
    SIGNATURE: ClassVar[Signature] = ((i32, i32), i32)


@irdl_op_definition
class Plus(_Scalar):
    """Sum of two integers, its lowest 32 bits."""

    name = "lbk.plus"
    SIGNATURE: ClassVar[Signature] = ((i32, i32), i32)


@irdl_op_definition
class Bitcast(_Scalar):
    """The float32 whose bits are the operand."""

    name = "lbk.bitcast"
    SIGNATURE: ClassVar[Signature] = ((i32,), f32)


@irdl_op_definition
class Half(_Scalar):
    """The float16 whose bits are the operand (at most 16), as float32; exact, subnormal ones included."""

    name = "lbk.half"
    SIGNATURE: ClassVar[Signature] = ((i32,), f32)


@irdl_op_definition
class IntToFloat(_Scalar):
    """Convert a small non-negative integer."""

    name = "lbk.int_to_float"
    SIGNATURE: ClassVar[Signature] = ((i32,), f32)


@irdl_op_definition
class Lut(_Scalar):
    """Look a code up in `table` (float values, one per code)."""

    name = "lbk.lut"
    table = attr_def(ArrayAttr)
    SIGNATURE: ClassVar[Signature] = ((i32,), f32)


@irdl_op_definition
class Gather(_Scalar):
    """Element `lane` of centroid `index` in the operand `book`: the codebook of the weight's segment and group."""

    name = "lbk.gather"
    book = attr_def(StringAttr)
    SIGNATURE: ClassVar[Signature] = ((i32, i32), f32)


@irdl_op_definition
class AddFloat(_Scalar):
    """Float addition."""

    name = "lbk.add"
    SIGNATURE: ClassVar[Signature] = ((f32, f32), f32)


@irdl_op_definition
class SubFloat(_Scalar):
    """Float subtraction."""

    name = "lbk.sub"
    SIGNATURE: ClassVar[Signature] = ((f32, f32), f32)


@irdl_op_definition
class Mul(_Scalar):
    """Float multiplication."""

    name = "lbk.mul"
    SIGNATURE: ClassVar[Signature] = ((f32, f32), f32)


@irdl_op_definition
class Fma(_Scalar):
    """a * b + c, fused or not: exact for the small integers that decode programs use."""

    name = "lbk.fma"
    SIGNATURE: ClassVar[Signature] = ((f32, f32, f32), f32)


@irdl_op_definition
class ArgName(IRDLOperation):
    """Names a block argument of a decode region, so that emitters can bind it."""

    name = "lbk.arg"
    value = operand_def(Attribute)
    label = attr_def(StringAttr)

    def __init__(self, value: SSAValue, label: str) -> None:
        super().__init__(operands=[value], attributes={"label": StringAttr(label)})


@irdl_op_definition
class Yield(IRDLOperation):
    """Ends a region with its result."""

    name = "lbk.yield"
    values = var_operand_def(Attribute)
    traits = traits_def(IsTerminator())

    def __init__(self, *values: SSAValue) -> None:
        super().__init__(operands=[list(values)])


@irdl_op_definition
class QuantizeActivation(IRDLOperation):
    """Round the activation tile to integers of `limbs` int8 digits per value (0: numbers, for products of floats), by
    chunk, or as `format` says: the text of an ActivationFormat that the result is meant to have."""

    name = "lbk.quantize"
    x = operand_def(Attribute)
    limbs = attr_def(IntAttr)
    format = opt_attr_def(StringAttr)
    res = result_def(Attribute)
    traits = traits_def(Pure())

    def __init__(self, x: SSAValue, limbs: int, activation: str = "") -> None:
        attributes: dict[str, Attribute] = {"limbs": IntAttr(limbs)}
        if activation:
            attributes["format"] = StringAttr(activation)
        super().__init__(operands=[x], result_types=[x.type], attributes=attributes)


@irdl_op_definition
class RotateActivation(IRDLOperation):
    """Rotate every `block` columns of the activation tile."""

    name = "lbk.hadamard"
    x = operand_def(Attribute)
    block = attr_def(IntAttr)
    res = result_def(Attribute)
    traits = traits_def(Pure())

    def __init__(self, x: SSAValue, block: int) -> None:
        super().__init__(operands=[x], result_types=[x.type], attributes={"block": IntAttr(block)})


@irdl_op_definition
class NormActivation(IRDLOperation):
    """x / rms(x) * weight [K] of every row of the activation tile, in float32; `eps` is added to the mean square."""

    name = "lbk.rms_norm"
    x = operand_def(Attribute)
    weight = operand_def(Attribute)
    eps = attr_def(FloatAttr)
    res = result_def(Attribute)
    traits = traits_def(Pure())

    def __init__(self, x: SSAValue, weight: SSAValue, eps: float) -> None:
        super().__init__(operands=[x, weight], result_types=[x.type], attributes={"eps": FloatAttr(eps, f64)})


@irdl_op_definition
class Mma(IRDLOperation):
    """acc[m, n] = sum over k of x[m, k] * decode(w)[n, k]."""

    name = "lbk.mma"
    x = operand_def(Attribute)
    w = operand_def(Attribute)
    res = result_def(Attribute)
    traits = traits_def(Pure())

    def __init__(self, x: SSAValue, w: SSAValue, result: Attribute) -> None:
        super().__init__(operands=[x, w], result_types=[result])


class _Epilogue(IRDLOperation):
    args_ = var_operand_def(Attribute)
    res = result_def(Attribute)
    traits = traits_def(Pure())

    def __init__(self, *operands: SSAValue, result: Attribute) -> None:
        super().__init__(operands=[list(operands)], result_types=[result])


@irdl_op_definition
class AddBias(_Epilogue):
    """acc + bias[n]."""

    name = "lbk.bias"


@irdl_op_definition
class SiluMul(_Epilogue):
    """silu(acc[:, :half]) * acc[:, half:]: the gate and up rows of a gated MLP in one kernel."""

    name = "lbk.silu_mul"


@irdl_op_definition
class Residual(_Epilogue):
    """acc + residual[m, n]."""

    name = "lbk.residual"


@irdl_op_definition
class Kernel(IRDLOperation):
    """One fused kernel. `spec` holds the fields of `codegen.spec.KernelSpec`, `schedule` those of a Schedule, `scales`
    where scales are applied and which power of two they include (see fold-scales)."""

    name = "lbk.kernel"
    sym_name = attr_def(StringAttr)
    spec = attr_def(DictionaryAttr)
    schedule = opt_attr_def(DictionaryAttr)
    backend = opt_attr_def(StringAttr)
    artifact = opt_attr_def(StringAttr)
    scales = opt_attr_def(DictionaryAttr)
    decode = region_def("single_block")
    body = region_def("single_block")
    traits = traits_def(IsolatedFromAbove(), SymbolOpInterface(), NoTerminator())

    def __init__(self, name: str, spec: dict[str, Attribute], decode: Region, body: Region) -> None:
        super().__init__(
            attributes={"sym_name": StringAttr(name), "spec": DictionaryAttr(spec)}, regions=[decode, body]
        )

    def verify_(self) -> None:
        for region, label in ((self.decode, "decode"), (self.body, "body")):
            last = region.block.last_op
            if not isinstance(last, Yield) or len(last.values) != 1:
                raise VerifyException(f"{label} region of @{self.sym_name.data} must yield one value")
        last = self.decode.block.last_op
        assert isinstance(last, Yield)
        if last.values[0].type != f32:
            raise VerifyException(f"decode region of @{self.sym_name.data} must yield f32")


_OPS: list[type[Operation]] = [
    Const, IntConst, Shr, Shl, And, Or, Multiply, Plus, Bitcast, Half, IntToFloat, Lut, Gather, AddFloat, SubFloat, Mul,
    Fma, ArgName, Yield, NormActivation, QuantizeActivation, RotateActivation, Mma, AddBias, SiluMul, Residual, Kernel,
]  # fmt: skip
LBK = Dialect("lbk", _OPS, [])
