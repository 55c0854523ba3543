"""fuse-siblings: linear layers that read the same input become one, their rows stacked.

%q = lb.linear %x, %wq; %k = lb.linear %x, %wk; %v = lb.linear %x, %wv
-> %a = lb.linear %x, %wqkv {segments = [64, 32, 32]}; %q, %k, %v = lb.split %a
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, IntAttr, ModuleOp
from xdsl.ir import Attribute, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import InsertPoint, Rewriter

from lowbit.compiler.ir.graph import Linear, Split, Weight, at, path_of
from lowbit.compiler.ir.types import QType, dims, tensor
from lowbit.quantizers.formats import Format, VectorFormat, parse_format

__all__ = ["FuseSiblings"]


@dataclass(frozen=True)
class FuseSiblings(ModulePass):
    """Layers must share input, parent module, format and order of columns, have no epilogue, and weights used nowhere
    else."""

    name = "fuse-siblings"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        groups: dict[tuple[SSAValue, str, str, str, str], list[Linear]] = defaultdict(list)
        for linear in [f for f in op.walk() if isinstance(f, Linear)]:
            type_ = linear.args_[1].type
            if isinstance(type_, QType) and not linear.steps() and _own_weight(linear) and _stackable(linear, type_):
                parent = path_of(linear).rpartition(".")[0]
                variant = linear.attributes.get("variant")  # what the importer knows of a kernel beyond its format
                order = (linear.order.data if linear.order else "") + (f" {variant}" if variant else "")
                groups[linear.args_[0], parent, type_.fmt.data, type_.layout.data, order].append(linear)
        for siblings in groups.values():
            if len(siblings) > 1:
                _fuse(siblings)


def _stackable(linear: Linear, type_: QType) -> bool:
    """Matrices that keep an order or norm of their input columns cannot share one activation row, unless the order is
    known to be the same. Neither can layers that ask for something and have not got it yet."""
    fmt = parse_format(type_.fmt.data)
    if linear.input or linear.norm is not None or (isinstance(fmt, Format) and fmt.ordered and linear.order is None):
        return False
    return not (isinstance(fmt, VectorFormat) and (fmt.ordered or fmt.norm == "col"))


def _own_weight(linear: Linear) -> bool:
    weight = linear.args_[1]
    return isinstance(weight.owner, Weight) and weight.has_one_use() and linear.segments is None


def _kept(first: Linear) -> dict[str, Attribute]:
    """What siblings have in common, and one kernel of them too."""
    common = {"order": first.order, "activation": first.activation}
    return {name: value for name, value in common.items() if value is not None}


def _fuse(siblings: list[Linear]) -> None:
    first = siblings[0]
    names, widths = [], []
    for linear in siblings:
        weight = linear.args_[1].owner
        assert isinstance(weight, Weight)
        names += [n.data for n in weight.names.data]
        widths.append(dims(linear.outs[0].type)[-1] or 0)
    x, type_ = first.args_[0], first.args_[1].type
    old = first.args_[1].owner
    assert isinstance(type_, QType)
    assert isinstance(old, Weight)
    stacked = Weight.of(names, QType.get(sum(widths), type_.k.data, type_.fmt.data, type_.layout.data))
    stacked.attributes.update({k: v for k, v in old.attributes.items() if k != "names"})
    element = first.outs[0].type.element_type  # type: ignore[attr-defined]
    lead = dims(first.outs[0].type)[:-1]
    wide = Linear(
        [x, stacked.outs[0]],
        [tensor((*lead, sum(widths)), element)],
        {"segments": ArrayAttr(IntAttr(w) for w in widths), **_kept(first)},
    )
    split = Split([wide.outs[0]], [tensor((*lead, w), element) for w in widths])
    parent = path_of(first).rpartition(".")[0]
    for new in (stacked, wide, split):
        at(new, parent)
    Rewriter.insert_op([stacked, wide, split], InsertPoint.before(first))
    for linear, out in zip(siblings, split.outs, strict=True):
        weight_op = linear.args_[1].owner
        linear.outs[0].replace_all_uses_with(out)
        Rewriter.erase_op(linear)
        assert isinstance(weight_op, Weight)
        Rewriter.erase_op(weight_op)
