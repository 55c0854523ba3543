"""The graph dialect `lb`: whole tensors, torch semantics, a dynamic number of tokens.

    %q = lb.linear %x, %w : (tensor<1x?x576xf32>, !lb.q<576x576, "int4.g64.sym">) -> tensor<1x?x576xf32>

Every operation is pure except `lb.return`. An operation's location is the module path of the model it came from.
Shape rules are methods, so that a pass that builds an operation and the verifier use the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from xdsl.dialects.builtin import (
    ArrayAttr,
    DictionaryAttr,
    FloatAttr,
    FunctionType,
    IntAttr,
    NameLoc,
    NoneAttr,
    StringAttr,
    SymbolRefAttr,
    UnitAttr,
)
from xdsl.ir import Attribute, Dialect, Operation, Region, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    attr_def,
    irdl_op_definition,
    opt_attr_def,
    region_def,
    traits_def,
    var_operand_def,
    var_result_def,
)
from xdsl.traits import IsolatedFromAbove, IsTerminator, NoTerminator, Pure, SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

from lowbit.compiler.ir.types import QType, dims

__all__ = ["LB", "Call", "Concat", "Graph", "GraphOp", "Linear", "Opaque", "Return", "Split", "Weight", "at", "path_of"]


def at(op: Operation, path: str) -> Operation:
    """Set the module path an operation came from; returns the operation."""
    op.location = NameLoc(StringAttr(_ascii(path)), NoneAttr())
    return op


def _ascii(text: str) -> str:
    """xDSL's parser reads strings beyond ASCII back as bytes, so names keep them escaped."""
    return text.encode("ascii", "backslashreplace").decode()


def path_of(op: Operation) -> str:
    """The module path an operation came from, or an empty string."""
    return op.location.desc.data if isinstance(op.location, NameLoc) else ""


class GraphOp(IRDLOperation):
    """Base of graph operations: any operands, any results, one line of text."""

    args_ = var_operand_def(Attribute)
    outs = var_result_def(Attribute)
    traits = traits_def(Pure())
    assembly_format = "operands attr-dict `:` functional-type(operands, results)"

    def __init__(
        self,
        operands: Sequence[SSAValue],
        results: Sequence[Attribute],
        attributes: dict[str, Attribute] | None = None,
    ) -> None:
        super().__init__(operands=[list(operands)], result_types=[list(results)], attributes=attributes or {})

    def expect(self, operands: int | tuple[int, int], results: int = 1) -> None:
        """Raise VerifyException unless the counts are right."""
        low, high = (operands, operands) if isinstance(operands, int) else operands
        if not low <= len(self.args_) <= high or len(self.outs) != results:
            raise VerifyException(
                f"{self.name} takes {low if low == high else f'{low} to {high}'} operands and gives {results} "
                f"results, not {len(self.args_)} and {len(self.outs)}"
            )

    def expect_shape(self, want: Sequence[int | None], index: int = 0) -> None:
        """Raise VerifyException unless a result has this shape (None matches only a dynamic dimension)."""
        got = dims(self.outs[index].type)
        if got != tuple(want):
            raise VerifyException(f"{self.name} gives {_text(want)}, but its type says {_text(got)}")


def _text(shape: Sequence[int | None]) -> str:
    return "x".join("?" if d is None else str(d) for d in shape)


class _Elementwise(GraphOp):
    """Same shape in and out; two operands broadcast on the left like torch."""

    COUNT: ClassVar[int] = 1

    def verify_(self) -> None:
        self.expect(self.COUNT)
        shapes, got = [dims(a.type) for a in self.args_], dims(self.outs[0].type)
        want: list[int | None] = [*max(shapes, key=len)]
        for at in range(-min(len(want), len(got)), 0):
            # A dimension that is dynamic in one operand is what the other says: torch saw them to be equal.
            if want[at] is None and got[at] != 1 and any(got[at] == s[at] for s in shapes if len(s) >= -at):
                want[at] = got[at]
        self.expect_shape(want)


@irdl_op_definition
class Weight(GraphOp):
    """A named constant of the checkpoint; several `names` are sibling matrices stacked by rows. `edits`, first to last,
    are made to it before it is used (see the pass fold-affine)."""

    name = "lb.weight"
    names = attr_def(ArrayAttr[StringAttr])
    reason = opt_attr_def(StringAttr)
    method = opt_attr_def(StringAttr)
    edits = opt_attr_def(ArrayAttr[StringAttr])

    @staticmethod
    def of(names: Sequence[str], type_: Attribute) -> Weight:
        """The constant(s) called `names`."""
        return Weight([], [type_], {"names": ArrayAttr(StringAttr(_ascii(n)) for n in names)})

    def verify_(self) -> None:
        self.expect(0)
        if not self.names.data:
            raise VerifyException("lb.weight needs at least one name")


@irdl_op_definition
class Linear(GraphOp):
    """y[..., N] = x[..., K] @ w[N, K].T (+ bias[N]); fused epilogues are named in order in `epilogue`.

    Operands: x, w, then bias if `epilogue` has "bias", then the residual if it has "residual", then the weight [K] of
    the root-mean-square norm that x goes through first if there is a `norm`, which is its epsilon.
    With "silu_mul", w holds gate and up rows and y has N / 2 columns. The kernel rotates blocks of `rotate` columns of
    x and rounds it to `activation`, with the static scales `scales`; `order` is the order of columns in which the
    weight is stored. Scales and orders are named by fingerprints, which say whether two are the same. `input` holds
    these until quantize-acts makes operations of them: what the layer asks for.
    A layer that `rounds` its output, with the static scales `rounds_scales`, gives it as the rows of bytes that the one
    layer which reads it, `rounded`, multiplies (`codegen.rounded`); types say what the bytes stand for.
    """

    name = "lb.linear"
    epilogue = opt_attr_def(ArrayAttr[StringAttr])
    segments = opt_attr_def(ArrayAttr)
    input = opt_attr_def(DictionaryAttr)
    rotate = opt_attr_def(IntAttr)
    activation = opt_attr_def(StringAttr)
    scales = opt_attr_def(StringAttr)
    order = opt_attr_def(StringAttr)
    norm = opt_attr_def(FloatAttr)
    rounds = opt_attr_def(StringAttr)
    rounds_scales = opt_attr_def(StringAttr)
    rounded = opt_attr_def(UnitAttr)

    def steps(self) -> tuple[str, ...]:
        """Names of the fused epilogue steps."""
        return tuple(s.data for s in self.epilogue.data) if self.epilogue else ()

    @staticmethod
    def shape(x: Attribute, w: Attribute, steps: Sequence[str]) -> tuple[int | None, ...]:
        """The result's shape."""
        (*lead, _), (n, _) = dims(x), dims(w)
        return (*lead, n // 2 if n and "silu_mul" in steps else n)

    def verify_(self) -> None:
        steps = self.steps()
        self.expect(2 + ("bias" in steps) + ("residual" in steps) + (self.norm is not None))
        x, w = self.args_[0].type, self.args_[1].type
        if len(dims(w)) != 2 or dims(x)[-1] != dims(w)[1]:
            raise VerifyException(f"lb.linear multiplies {_text(dims(x))} by {_text(dims(w))}: input columns differ")
        self.expect_shape(self.shape(x, w, steps))
        self._verify_rows()

    def _verify_rows(self) -> None:
        """Rows of bytes are read as what they were written as, and by nobody else."""
        writer = self.args_[0].owner
        if self.rounded is not None and not (isinstance(writer, Linear) and writer.rounds == self.activation):
            raise VerifyException("lb.linear reads rows that no layer has rounded for it")
        if self.rounds is not None and not all(
            isinstance(use.operation, Linear) and use.operation.rounded is not None and use.index == 0
            for use in self.outs[0].uses
        ):
            raise VerifyException("lb.linear rounds what others read as numbers")


@irdl_op_definition
class Split(GraphOp):
    """Cut the last dimension into the results' widths, in order."""

    name = "lb.split"

    def verify_(self) -> None:
        self.expect(1, len(self.outs))
        width = dims(self.args_[0].type)[-1]
        parts = [dims(o.type)[-1] for o in self.outs]
        if None in parts or sum(p or 0 for p in parts) != width:
            raise VerifyException(f"lb.split cuts {width} columns into {parts}")


@irdl_op_definition
class Concat(GraphOp):
    """Join along the last dimension."""

    name = "lb.concat"

    def verify_(self) -> None:
        self.expect((1, 1 << 16))
        widths = [dims(a.type)[-1] or 0 for a in self.args_]
        self.expect_shape((*dims(self.args_[0].type)[:-1], sum(widths)))


@irdl_op_definition
class Return(GraphOp):
    """Ends a graph with its outputs."""

    name = "lb.return"
    traits = traits_def(IsTerminator())


@irdl_op_definition
class Opaque(GraphOp):
    """A torch call lowbit leaves alone; `call` names it."""

    name = "lb.opaque"
    call = attr_def(StringAttr)


@irdl_op_definition
class Call(GraphOp):
    """Run a `lbk.kernel`: operands are those of the linear it was lowered from."""

    name = "lb.call"
    kernel = attr_def(SymbolRefAttr)


@irdl_op_definition
class Embedding(GraphOp):
    """Rows of a table: ids [...] and table [V, D] give [..., D]."""

    name = "lb.embedding"

    def verify_(self) -> None:
        self.expect(2)
        self.expect_shape((*dims(self.args_[0].type), dims(self.args_[1].type)[1]))


@irdl_op_definition
class Matmul(GraphOp):
    """Batched matrix product of two activations: [..., M, K] by [..., K, N]."""

    name = "lb.matmul"

    def verify_(self) -> None:
        self.expect(2)
        a, b = dims(self.args_[0].type), dims(self.args_[1].type)
        self.expect_shape((*a[:-1], b[-1]))


@irdl_op_definition
class RmsNorm(GraphOp):
    """x / rms(x) * weight; `eps` is an attribute, absent where it is no constant."""

    name = "lb.rms_norm"
    eps = opt_attr_def(FloatAttr)

    def verify_(self) -> None:
        self.expect(2)
        self.expect_shape(dims(self.args_[0].type))


@irdl_op_definition
class LayerNorm(GraphOp):
    """Mean and variance normalization, weight, optional bias."""

    name = "lb.layer_norm"

    def verify_(self) -> None:
        self.expect((2, 3))
        self.expect_shape(dims(self.args_[0].type))


@irdl_op_definition
class Silu(_Elementwise):
    """x * sigmoid(x)."""

    name = "lb.silu"


@irdl_op_definition
class Gelu(_Elementwise):
    """Gaussian error linear unit."""

    name = "lb.gelu"


@irdl_op_definition
class SiluMul(_Elementwise):
    """silu(gate) * up."""

    name = "lb.silu_mul"
    COUNT: ClassVar[int] = 2


@irdl_op_definition
class Add(_Elementwise):
    """a + b."""

    name = "lb.add"
    COUNT: ClassVar[int] = 2


@irdl_op_definition
class Mul(_Elementwise):
    """a * b."""

    name = "lb.mul"
    COUNT: ClassVar[int] = 2


@irdl_op_definition
class Attention(GraphOp):
    """Scaled dot product attention over q, k, v (and a mask)."""

    name = "lb.attention"

    def verify_(self) -> None:
        self.expect((3, 4))
        q, v = dims(self.args_[0].type), dims(self.args_[2].type)
        self.expect_shape((*q[:-1], v[-1]))


@irdl_op_definition
class Permute(_Elementwise):
    """Reorder the last dimension by the constant `order`; the identity is removed by canonicalize."""

    name = "lb.permute"
    order = attr_def(ArrayAttr)


@irdl_op_definition
class Hadamard(_Elementwise):
    """Rotate every `block` columns: times a Hadamard matrix over the root of its order."""

    name = "lb.hadamard"
    block = attr_def(IntAttr)

    def verify_(self) -> None:
        super().verify_()
        columns = dims(self.args_[0].type)[-1] or 0
        if self.block.data < 1 or columns % self.block.data:
            raise VerifyException(f"lb.hadamard cannot cut {columns} columns into blocks of {self.block.data}")


@irdl_op_definition
class Quantize(_Elementwise):
    """Round activations to `format` and back, one scale per token and group, or the static scales called `scales`.
    Groups are of columns in the order called `order`; the columns stay where they are."""

    name = "lb.quantize"
    format = attr_def(StringAttr)
    scales = opt_attr_def(StringAttr)
    order = opt_attr_def(StringAttr)


@irdl_op_definition
class Dequantize(GraphOp):
    """Numbers back from quantized values."""

    name = "lb.dequantize"


@irdl_op_definition
class Graph(IRDLOperation):
    """One model (or part of one): block arguments are inputs, `lb.return` gives outputs."""

    name = "lb.graph"
    sym_name = attr_def(StringAttr)
    body = region_def("single_block")
    traits = traits_def(IsolatedFromAbove(), SymbolOpInterface(), NoTerminator())

    def __init__(self, name: str, body: Region) -> None:
        super().__init__(attributes={"sym_name": StringAttr(name)}, regions=[body])

    @property
    def type(self) -> FunctionType:
        """Inputs to outputs."""
        last = self.body.block.last_op
        outs = [v.type for v in last.operands] if last is not None else []
        return FunctionType.from_lists([a.type for a in self.body.block.args], outs)

    def verify_(self) -> None:
        if not isinstance(self.body.block.last_op, Return):
            raise VerifyException(f"graph @{self.sym_name.data} must end in lb.return")


def quantized(value: SSAValue[Any]) -> QType | None:
    """The quantized type of a value, or None when it is dense."""
    return value.type if isinstance(value.type, QType) else None


_OPS: list[type[Operation]] = [
    Add, Attention, Call, Concat, Dequantize, Embedding, Gelu, Graph, Hadamard, LayerNorm, Linear, Matmul, Mul, Opaque,
    Permute, Quantize, Return, RmsNorm, Silu, SiluMul, Split, Weight,
]  # fmt: skip
LB = Dialect("lb", _OPS, [QType])
