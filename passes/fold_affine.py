"""fold-affine: scales, permutations and rotations of channels move into the weights beside them.

%n = lb.rms_norm %x, %g; %m = lb.mul %n, %s; %y = lb.linear %m, %w
-> %n = lb.rms_norm %x, %g {edits = ["rows scale s"]}; %y = lb.linear %n, %w

%y = lb.linear %x, %w; %r = lb.hadamard %y {block = 64}
-> %r = lb.linear %x, %w {edits = ["rows rotate 64"]}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, ModuleOp, StringAttr
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import InsertPoint, Rewriter

from lowbit.compiler.ir.graph import (
    Gelu,
    GraphOp,
    Hadamard,
    LayerNorm,
    Linear,
    Mul,
    Permute,
    RmsNorm,
    Silu,
    SiluMul,
    Weight,
    at,
    path_of,
)
from lowbit.compiler.ir.types import QType, dims

__all__ = ["FoldAffine"]


@dataclass(frozen=True)
class FoldAffine(ModulePass):
    """Into the norm or layer before, through activations, or else into the layers after; what fits nowhere stays.

    norms: weights of norms that only linear layers read go into those layers, and become ones, so that a rotation of
    the residual stream can pass them. The edits of a weight are written on it, first to last: see
    `quantizers.rewrites.text`.
    """

    name = "fold-affine"
    norms: bool = False

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        folded = True
        while folded:
            folded = any(_fold(found) for found in list(op.walk()) if isinstance(found, GraphOp) and found.parent)
        if self.norms:
            for found in [f for f in op.walk() if isinstance(f, RmsNorm)]:
                _fold_norm(found)


@dataclass(frozen=True)
class _Step:
    """A change of the channels of `value`. kind: scale, order or rotate, with its argument as text."""

    value: SSAValue
    kind: str
    argument: str

    @property
    def forward(self) -> str:
        """What the rows of a layer before it go through."""
        return f"{self.kind} {self.argument}"

    @property
    def backward(self) -> str:
        """What the columns of a layer after it go through: the transpose."""
        if self.kind == "order":
            order = [int(i) for i in self.argument.split()]
            return "order " + " ".join(str(order.index(i)) for i in range(len(order)))
        return f"unrotate {self.argument}" if self.kind == "rotate" else self.forward


def _step(op: GraphOp) -> _Step | None:
    if isinstance(op, Permute):
        order = [a.value.data for a in op.order.data if isinstance(a, IntegerAttr)]
        complete = sorted(order) == list(range(dims(op.outs[0].type)[-1] or 0))
        return _Step(op.args_[0], "order", " ".join(map(str, order))) if complete else None
    if isinstance(op, Hadamard):
        return _Step(op.args_[0], "rotate", str(op.block.data))
    if isinstance(op, Mul):
        for value, factor in ((op.args_[0], op.args_[1]), (op.args_[1], op.args_[0])):
            if isinstance(factor.owner, Weight) and len(dims(factor.type)) == 1 and factor.owner.edits is None:
                return _Step(value, "scale", factor.owner.names.data[0].data)
    return None


def _fold(op: GraphOp) -> bool:
    """Fold one operation, if it can be; True when the graph changed."""
    step = _step(op)
    if step is None:
        return False
    if step.value.has_one_use() and isinstance(step.value.owner, GraphOp) and _into(step.value.owner, op, step):
        Rewriter.replace_op(op, [], [step.value])
        return True
    users = [use.operation for use in op.outs[0].uses]
    if users and all(isinstance(u, Linear) and u.args_[0] is op.outs[0] and _own(u.args_[1]) for u in users):
        for user in users:
            assert isinstance(user, Linear)
            _edit(user.args_[1], f"columns {step.backward}")
        Rewriter.replace_op(op, [], [step.value])
        return True
    return False


def _into(before: GraphOp, op: GraphOp, step: _Step) -> bool:
    """Fold a step into the operation before it, or into those before an activation."""
    if isinstance(before, RmsNorm | LayerNorm):
        weights = list(before.args_[1:])
        fits = step.kind == "scale"
    elif isinstance(before, Linear):
        weights = [before.args_[1], *(before.args_[2:3] if "bias" in before.steps() else [])]
        fits = set(before.steps()) <= {"bias"}
    else:
        return _through(before, op, step)
    if not fits or not weights or not all(_own(w) for w in weights):
        return False
    for weight in weights:
        _edit(weight, f"rows {step.forward}")
    return True


def _through(before: GraphOp, op: GraphOp, step: _Step) -> bool:
    """Move a step before an activation: a permutation to all operands, a scale to the one it is a factor of."""
    if step.kind == "order" and isinstance(before, SiluMul | Silu | Gelu):
        moved = range(len(before.args_))
    elif step.kind == "scale" and isinstance(before, SiluMul):
        moved = range(1, 2)
    else:
        return False
    for index in moved:
        value = before.args_[index]
        operands = [value if a is step.value else a for a in op.args_]
        copy = at(type(op)(operands, [value.type], dict(op.attributes)), path_of(op))
        Rewriter.insert_op(copy, InsertPoint.before(before))
        before.operands[index] = copy.results[0]
    return True


def _own(value: SSAValue) -> bool:
    """A dense weight that nothing else uses."""
    return isinstance(value.owner, Weight) and value.has_one_use() and not isinstance(value.type, QType)


def _edit(value: SSAValue, text: str) -> None:
    weight = value.owner
    assert isinstance(weight, Weight)
    before = weight.edits.data if weight.edits is not None else ()
    weight.edits = ArrayAttr([*before, StringAttr(text)])


def _fold_norm(norm: RmsNorm) -> None:
    gamma = norm.args_[1]
    readers = list(_readers(norm))
    if not readers or not _own(gamma):
        return
    weight = gamma.owner
    assert isinstance(weight, Weight)
    if weight.edits is not None or not all(_own(r.args_[1]) for r in readers):
        return
    for reader in readers:
        _edit(reader.args_[1], f"columns scale {weight.names.data[0].data}")
    _edit(gamma, "rows fill 1")


def _readers(norm: RmsNorm) -> Iterator[Linear]:
    """The linear layers that read a norm's output; none when anything else does."""
    users = [use.operation for use in norm.outs[0].uses]
    if all(isinstance(u, Linear) and u.args_[0] is norm.outs[0] for u in users):
        yield from (u for u in users if isinstance(u, Linear))
