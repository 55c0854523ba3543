"""`lb` back to FX: fused linear layers as calls of `torch.ops.lowbit.linear`, the rest as the nodes it was."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from xdsl.ir import Operation, SSAValue

from lowbit.codegen.rounded import ROUNDED
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import IRError
from lowbit.compiler.frontend.fx import FxWeight, ImportedGraph, real_tensor, tensor_inputs
from lowbit.compiler.ir import graph as lb
from lowbit.compiler.ir.types import DTYPES_OF
from lowbit.quantizers.qtensor import PackedWeight
from lowbit.quantizers.weights import pack_weights, unpack_weights

__all__ = ["export_fx"]


def export_fx(imported: ImportedGraph) -> fx.GraphModule:
    """The graph of `imported.module`, which passes may have changed, as a new GraphModule."""
    return _Exporter(imported).run()


class _Exporter:
    def __init__(self, imported: ImportedGraph) -> None:
        self.imported, self.gm = imported, fx.GraphModule(imported.source, fx.Graph())
        self.graph = self.gm.graph
        self.values: dict[SSAValue, fx.Node] = {}
        self.copied: dict[fx.Node, fx.Node] = {}
        self.count = 0

    def run(self) -> fx.GraphModule:
        top = next(op for op in self.imported.module.walk() if isinstance(op, lb.Graph))
        arguments = dict(zip(self.imported.inputs, top.body.block.args, strict=True))
        for node in self.imported.source.graph.nodes:
            if node.op == "placeholder":
                self.copied[node] = self.graph.node_copy(node)
                if node in arguments:
                    self.values[arguments[node]] = self.copied[node]
        for op in top.body.block.ops:
            self._emit(op)
        self._finish(top)
        self.graph.lint()
        self.gm.recompile()
        self.gm.meta.update(self.imported.source.meta)
        return self.gm

    def _finish(self, top: lb.Graph) -> None:
        old = next(n for n in self.imported.source.graph.nodes if n.op == "output")
        last = top.body.block.last_op
        assert last is not None
        found = self._inputs(old, last.operands)
        self.graph.node_copy(old, lambda n: found.get(n) or self.copied[n])

    def _inputs(self, old: fx.Node, operands: Iterable[SSAValue]) -> dict[fx.Node, fx.Node]:
        """New nodes for the tensor inputs of an old one: passes may have given it other operands."""
        return dict(zip(tensor_inputs(old), (self.values[v] for v in operands), strict=True))

    def _emit(self, op: Operation) -> None:
        emitters: dict[type[Operation], Callable[[Any], None]] = {
            lb.Opaque: self._opaque,
            lb.Embedding: self._embedding,
            lb.RmsNorm: self._norm,
            lb.Linear: self._linear,
            lb.Split: self._split,
            lb.Silu: lambda o: self._call(o, torch.nn.functional.silu),
            lb.Add: lambda o: self._call(o, torch.add),
            lb.Mul: lambda o: self._call(o, torch.mul),
            lb.SiluMul: self._silu_mul,
        }
        if isinstance(op, (lb.Weight, lb.Return)):
            return
        if type(op) not in emitters:
            raise IRError("LB0321", f"{op.name} has no FX form", hint="leave out the pass that made it")
        emitters[type(op)](op)

    def _opaque(self, op: lb.Opaque) -> None:
        old = self.imported.opaque[op.attributes["node"].data]  # type: ignore[attr-defined]
        found = self._inputs(old, op.args_)
        if old.op in ("get_attr", "call_module"):
            top = str(old.target).split(".")[0]
            if not hasattr(self.gm, top):
                setattr(self.gm, top, getattr(self.imported.source, top))
        new = self.graph.node_copy(old, lambda n: found.get(n) or self.copied[n])
        self.copied[old] = new
        if op.outs:
            self.values[op.outs[0]] = new

    def _embedding(self, op: lb.Embedding) -> None:
        old = self.imported.opaque[op.attributes["node"].data]  # type: ignore[attr-defined]
        ids = old.args[0]
        new = self.graph.node_copy(old, lambda n: self.values[op.args_[0]] if n is ids else self.copied[n])
        self.values[op.outs[0]] = new

    def _norm(self, op: lb.RmsNorm) -> None:
        norm = self.imported.norms[op.attributes["node"].data]  # type: ignore[attr-defined]
        local = {norm.x: self.values[op.args_[0]], norm.weight: self.values[op.args_[1]]}
        for node in norm.nodes:
            local[node] = self.graph.node_copy(node, lambda n: local.get(n) or self.copied[n])
        self.values[op.outs[0]] = local[norm.last]

    def _call(self, op: lb.GraphOp, function: Callable[..., torch.Tensor]) -> None:
        self.values[op.outs[0]] = self.graph.call_function(function, tuple(self.values[a] for a in op.args_))

    def _silu_mul(self, op: lb.SiluMul) -> None:
        gate = self.graph.call_function(torch.nn.functional.silu, (self.values[op.args_[0]],))
        self.values[op.outs[0]] = self.graph.call_function(torch.mul, (gate, self.values[op.args_[1]]))

    def _split(self, op: lb.Split) -> None:
        widths = [o.type.get_shape()[-1] for o in op.outs]  # type: ignore[attr-defined]
        parts = self.graph.call_function(torch.split, (self.values[op.args_[0]], widths), {"dim": -1})
        for i, out in enumerate(op.outs):
            self.values[out] = self.graph.call_function(operator.getitem, (parts, i))

    def _linear(self, op: lb.Linear) -> None:
        weight = op.args_[1].owner
        assert isinstance(weight, lb.Weight)
        parts = [self.imported.weights[n.data] for n in weight.names.data]
        spec = replace(parts[0].spec, segments=tuple(n for p in parts for n in p.spec.segments), epilogue=op.steps())
        operands = [self.copied[n] for n in parts[0].operands] if len(parts) == 1 else self._stack(parts, spec)
        if op.norm is not None:
            spec = replace(spec, norm_eps=op.norm.value.data)
            operands = [*operands, self.graph.call_method("float", (self.values[op.args_[-1]],))]
        if op.rounds is not None:
            spec = replace(spec, out_activation=op.rounds.data)
            operands = [*operands, *self._scales_of(op)]
        if op.rounded is not None:
            element = op.outs[0].type.element_type  # type: ignore[attr-defined]
            spec = replace(spec, x_dtype=ROUNDED, out_dtype=DTYPES_OF[element])
        extra = iter(self.values[a] for a in op.args_[2:])
        bias, residual = (next(extra) if step in op.steps() else None for step in ("bias", "residual"))
        args = (self.values[op.args_[0]], operands, bias, residual, spec.key())
        self.values[op.outs[0]] = self.graph.call_function(torch.ops.lowbit.linear.default, args)

    def _scales_of(self, writer: lb.Linear) -> list[fx.Node]:
        """The static scales, where there are, of the layer that reads what `writer` rounds."""
        reader = next(iter(writer.outs[0].uses)).operation
        weight = reader.operands[1].owner
        assert isinstance(weight, lb.Weight)
        part = self.imported.weights[weight.names.data[0].data]
        named = zip(part.spec.operands, part.operands, strict=True)
        return [self.copied[node] for name, node in named if name == "input_scale"]

    def _stack(self, parts: list[FxWeight], spec: KernelSpec) -> list[fx.Node]:
        """One packed matrix of several, as attributes of the new module."""
        columns = [[self._real(n) for n in part.operands] for part in parts]
        nodes = []
        for operand, tensor in zip(spec.operands, stack_operands(parts, columns, spec), strict=True):
            name = f"lowbit_{self.count}_{operand}"
            self.gm.register_buffer(name, tensor, persistent=False)
            nodes.append(self.graph.get_attr(name))
        self.count += 1
        return nodes

    def _real(self, node: fx.Node) -> torch.Tensor:
        found = real_tensor(node, self.imported.source)
        if found is None:
            raise IRError("LB0322", "a weight is not known when the graph is compiled", where=node.name)
        return found


def stack_operands(parts: list[FxWeight], columns: list[list[torch.Tensor]], spec: KernelSpec) -> list[torch.Tensor]:
    """Operands of the matrices, one below the other.

    In layouts of row panels that is one tensor behind the other, and the parts become views of the whole: memory for
    weights stays what it was. Otherwise the matrices are unpacked and packed again.
    """
    if spec.joins_by_rows:
        return [_joined(list(tensors)) for tensors in zip(*columns, strict=True)]
    weights, named = [], {}
    for part, tensors in zip(parts, columns, strict=True):
        s, named = part.spec, dict(zip(part.spec.operands, tensors, strict=True))
        weights += unpack_weights(PackedWeight(s.weight_format, s.layout_, s.segments, s.k, named))
    packed = pack_weights(weights, spec.layout_).tensors
    return [packed[name] if name in packed else named[name] for name in spec.operands]  # of the input: one for all


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor behind the other. Parts become views of it; where they are neighbours already, nothing is copied."""
    first, at = parts[0], parts[0].storage_offset()
    joined = True
    for part in parts:
        joined &= (
            part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.storage_offset() == at
        )
        at += part.numel()
    if joined:
        shape = (sum(p.shape[0] for p in parts), *first.shape[1:])
        return first.as_strided(shape, first.stride(), first.storage_offset())
    whole = torch.cat(parts)
    for part, view in zip(parts, whole.split([p.shape[0] for p in parts]), strict=True):
        if part.is_contiguous():
            # Strides of dimensions of size one are arbitrary, and torch.compile guards them: they stay.
            part.data = view.as_strided(part.shape, part.stride(), view.storage_offset())
    return whole
