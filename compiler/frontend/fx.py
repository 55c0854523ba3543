"""FX graphs, as Dynamo captures them, to `lb` and back.

What lowbit understands (quantized linear layers, silu, mul, add, root-mean-square norms) becomes an operation of its
own; everything else is `lb.opaque` and comes back as the very node it was. Nodes whose value is no tensor (sizes,
tuples) are opaque operations without results, so that the order of calls is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from xdsl.dialects.builtin import ArrayAttr, FloatAttr, IntAttr, ModuleOp, StringAttr, f64
from xdsl.ir import Attribute, Block, Region, SSAValue

from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.table import parse_table_spec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.frontend.norms import Norm, find_norms
from lowbit.compiler.ir import graph as lb
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.text import verify_module
from lowbit.compiler.ir.types import DTYPE_NAMES, QType, tensor
from lowbit.compiler.runtime import embedding, grouped  # noqa: F401  (they define torch.ops.lowbit.embedding and more)
from lowbit.compiler.runtime.dispatch import parse_spec
from lowbit.compiler.runtime.modules import fingerprint

__all__ = [
    "FxWeight",
    "ImportedGraph",
    "grouped_calls",
    "grouped_specs",
    "import_fx",
    "is_view",
    "module_path",
    "real_tensor",
    "tensor_inputs",
    "value_of",
    "written_by",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_EMBEDDING = {torch.ops.lowbit.embedding, torch.ops.lowbit.embedding.default}
_SILU = {torch.nn.functional.silu, torch.ops.aten.silu.default}
_MUL = {operator.mul, torch.mul, torch.ops.aten.mul.Tensor}
_ADD = {operator.add, torch.add, torch.ops.aten.add.Tensor}
_VIEWS = {
    "view", "reshape", "transpose", "permute", "getitem", "expand", "unsqueeze", "squeeze", "narrow", "select", "split",
    "chunk", "flatten", "t", "contiguous", "to", "view_as", "unflatten",
}  # fmt: skip
"""Calls whose result may share memory with their first argument."""


_PATH_TEXT = (
    ("L['self']", ""), ("L['fn']", ""), ("._modules['", "."), ("['", "."), ("']", ""), ("[", "."), ("]", ""),
)  # fmt: skip


@dataclass(frozen=True)
class FxWeight:
    """A packed weight of the graph: its operand nodes and what is computed with it."""

    operands: tuple[fx.Node, ...]
    spec: KernelSpec


@dataclass
class ImportedGraph:
    """A graph in `lb`, with the nodes it came from. opaque: node name -> node."""

    module: ModuleOp
    source: fx.GraphModule
    inputs: list[fx.Node]
    weights: dict[str, FxWeight] = field(default_factory=dict)
    opaque: dict[str, fx.Node] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)


def value_of(node: fx.Node) -> Any:
    """The fake value a node has."""
    return node.meta.get("example_value", node.meta.get("val"))


def module_path(node: fx.Node) -> str:
    """Path of the module whose code a node comes from, as far as the graph knows it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    text = str(next(reversed(stack.values()))[0])
    for old, new in _PATH_TEXT:
        text = text.replace(old, new)
    return text.strip(".").removesuffix(".inner")


def import_fx(gm: fx.GraphModule, name: str = "graph") -> ImportedGraph:
    """The graph of `gm`. Raises KernelError (LB0401) for a quantized layer whose input lowbit has no kernels for."""
    return _Importer(gm).run(name)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensor-valued inputs of a node, each once."""
    return [n for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor)]


class _Importer:
    """One walk over the nodes, in order."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.block = gm, Block()
        self.values: dict[fx.Node, SSAValue] = {}
        self.out = ImportedGraph(ModuleOp([]), gm, [])
        self.written = _written(gm.graph)
        self.norms = {n.last: n for n in find_norms(gm.graph) if not self.written & {n.x, n.weight}}
        self.inside = {n for norm in self.norms.values() for n in norm.nodes if n is not norm.last}

    def run(self, name: str) -> ImportedGraph:
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "output":
                self.block.add_op(lb.Return([self.values[n] for n in tensor_inputs(node)], []))
            elif node not in self.inside:
                self._node(node)
        module = ModuleOp([lb.Graph(name, Region(self.block))])
        verify_module(module, after="import")
        self.out.module = module
        return self.out

    def _input(self, node: fx.Node) -> None:
        if isinstance(value_of(node), torch.Tensor):
            self.values[node] = self.block.insert_arg(_type(value_of(node)), len(self.block.args))
            self.out.inputs.append(node)

    def _node(self, node: fx.Node) -> None:
        if node in self.norms:
            self._norm(self.norms[node])
        elif node.target in _EMBEDDING and not node.kwargs:
            self._embedding(node)
        elif _is_plain_linear(node) and not self._touched(node):
            self._linear(node)
        elif (cls := _elementwise(node)) is not None and not self._touched(node):
            self._bind(node, cls([self.values[n] for n in node.args], [_type(value_of(node))]))  # type: ignore[index]
        else:
            self._opaque(node)

    def _touched(self, node: fx.Node) -> bool:
        """True where an input or the result is written to in place somewhere: order matters then."""
        return bool(self.written & {node, *node.all_input_nodes})

    def _bind(self, node: fx.Node, op: lb.GraphOp) -> None:
        path = module_path(node)
        self.block.add_op(lb.at(op, path) if path else op)
        if op.outs:
            self.values[node] = op.outs[0]

    def _opaque(self, node: fx.Node) -> None:
        value = value_of(node)
        results = [_type(value)] if isinstance(value, torch.Tensor) else []
        call = getattr(node.target, "__name__", str(node.target)).encode("ascii", "replace").decode()
        self.out.opaque[node.name] = node
        attributes: dict[str, Attribute] = {"call": StringAttr(call), "node": StringAttr(node.name)}
        self._bind(node, lb.Opaque([self.values[n] for n in tensor_inputs(node)], results, attributes))

    def _norm(self, norm: Norm) -> None:
        self.out.norms[norm.last.name] = norm
        attributes: dict[str, Attribute] = {"node": StringAttr(norm.last.name)}
        if norm.eps is not None:
            attributes["eps"] = FloatAttr(norm.eps, f64)
        operands = [self.values[norm.x], self.values[norm.weight]]
        self._bind(norm.last, lb.RmsNorm(operands, [_type(value_of(norm.last))], attributes))

    def _embedding(self, node: fx.Node) -> None:
        """Rows of a packed table. The node is kept: passes may change what surrounds it, and the table's type."""
        ids, _, key = cast("tuple[Any, ...]", node.args)
        spec, path = parse_table_spec(str(key)), module_path(node)
        layout = next(n for n, known in LAYOUTS.items() if known == spec.linear.layout_)
        table = lb.Weight.of([f"{path or node.name}.weight"], QType.get(spec.rows, spec.k, spec.format, layout))
        self.block.add_op(lb.at(table, path) if path else table)
        self.out.opaque[node.name] = node
        found: dict[str, Attribute] = {"node": StringAttr(node.name)}
        self._bind(node, lb.Embedding([self.values[ids], table.outs[0]], [_type(value_of(node))], found))

    def _linear(self, node: fx.Node) -> None:
        x, operands, bias, residual, key = cast("tuple[Any, ...]", node.args)
        spec, path = parse_spec(str(key)), module_path(node)
        if value_of(x).dtype not in _FLOATS:
            raise KernelError(
                "LB0401",
                f"no kernel takes {value_of(x).dtype} activations",
                where=path,
                hint="use float32, bfloat16 or float16",
            )
        name = f"{path or 'linear'}.weight"
        name = name if name not in self.out.weights else f"{name}.{node.name}"
        self.out.weights[name] = FxWeight(tuple(operands), spec)
        layout = next(n for n, known in LAYOUTS.items() if known == spec.layout_)
        weight = lb.Weight.of([name], QType.get(sum(spec.segments), spec.k, spec.format, layout))
        self.block.add_op(lb.at(weight, path) if path else weight)
        extra = [self.values[n] for n in (bias, residual) if n is not None]
        attributes: dict[str, Attribute] = {}
        if spec.epilogue:
            attributes["epilogue"] = ArrayAttr(StringAttr(s) for s in spec.epilogue)
        if len(spec.segments) > 1:
            attributes["segments"] = ArrayAttr(IntAttr(n) for n in spec.segments)
        if spec.activation:
            attributes["activation"] = StringAttr(spec.activation)
        attributes["variant"] = StringAttr(self._variant(node, operands, spec))
        self._bind(node, lb.Linear([self.values[x], weight.outs[0], *extra], [_type(value_of(node))], attributes))

    def _variant(self, node: fx.Node, operands: Sequence[fx.Node], spec: KernelSpec) -> str:
        """Layers with equal variants may share a kernel: one of its own for weights that are not known yet."""
        real = {name: real_tensor(n, self.gm) for name, n in zip(spec.operands, operands, strict=True)}
        if any(tensor is None for tensor in real.values()):
            return node.name
        scale = real.get("input_scale")
        same = replace(spec, segments=(1,), epilogue=()).digest()
        return same if scale is None else f"{same} {fingerprint(scale)}"


def real_tensor(node: fx.Node, gm: fx.GraphModule) -> torch.Tensor | None:
    """The tensor behind an input or attribute of a graph, or None where only its shape is known."""
    if node.op == "get_attr":
        value: Any = gm
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        return value if isinstance(value, torch.Tensor) else None
    example = getattr(node.meta.get("grapharg"), "example", None)
    plain = isinstance(example, torch.Tensor) and not isinstance(example, torch._subclasses.FakeTensor)
    return example if plain else None


def grouped_calls(graph: fx.Graph) -> list[fx.Node]:
    """Calls of the operator that runs all experts of a layer; passes leave them as they are."""
    targets = (torch.ops.lowbit.grouped_linear, torch.ops.lowbit.grouped_linear.default)
    return [n for n in graph.nodes if n.target in targets]


def grouped_specs(call: fx.Node) -> list[str]:
    """Kernel specs of such a call: none for experts that are float."""
    return [spec for spec in cast("list[str]", call.args[4]) if spec != grouped.DENSE]


def is_view(node: fx.Node) -> bool:
    """True for calls whose result may share memory with their first argument."""
    return _name(node) in _VIEWS


def _is_plain_linear(node: fx.Node) -> bool:
    """A call of the operator, on the layer's own operands: not one that was fused with a norm or a layer before."""
    known = node.target in (torch.ops.lowbit.linear, torch.ops.lowbit.linear.default) and not node.kwargs
    if not known:
        return False
    spec = parse_spec(str(node.args[4]))
    return not spec.norm_eps and not spec.uses_rows


_ELEMENTWISE: Sequence[tuple[set[Any], int, type[lb.GraphOp]]] = (
    (_SILU, 1, lb.Silu),
    (_MUL, 2, lb.Mul),
    (_ADD, 2, lb.Add),
)


def _elementwise(node: fx.Node) -> type[lb.GraphOp] | None:
    """The lb operation of a call on tensors of one shape and type, if it is one."""
    if node.op != "call_function" or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    out = value_of(node)
    ins = [value_of(a) for a in node.args]  # type: ignore[arg-type]
    if not isinstance(out, torch.Tensor) or not all(isinstance(v, torch.Tensor) for v in ins):
        return None
    if any(not _same_shape(v, out) or v.dtype != out.dtype for v in ins):
        return None
    if out.dtype not in _FLOATS or any(v for v in node.kwargs.values()):
        return None
    return next((cls for targets, count, cls in _ELEMENTWISE if node.target in targets and len(ins) == count), None)


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shapes are known to be equal. Asking outright would tie the graph to the answer for this token count."""
    return a.dim() == b.dim() and all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def written_by(node: fx.Node) -> list[fx.Node]:
    """Tensors that a call writes to in place."""
    name = _name(node)
    in_place = name.endswith("_") and not name.endswith("__") and node.op in ("call_method", "call_function")
    targets = [node.args[0]] if (in_place or name in ("setitem", "iadd", "imul")) and node.args else []
    return [n for n in (*targets, node.kwargs.get("out")) if isinstance(n, fx.Node)]


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Tensors that a call writes to, with all that may share their memory."""
    found = {n for node in graph.nodes for n in written_by(node)}
    pending = list(found)
    while pending:
        node = pending.pop()
        near = [u for u in node.users if _name(u) in _VIEWS] + (tensor_inputs(node) if _name(node) in _VIEWS else [])
        pending += [n for n in near if n not in found]
        found |= set(near)
    return found


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def _type(value: torch.Tensor) -> Attribute:
    shape = [int(d) if isinstance(d, int) else None for d in value.shape]
    name = str(value.dtype).removeprefix("torch.")
    return tensor(shape, DTYPE_NAMES.get(name, DTYPE_NAMES["uint8"]))
