"""Root-mean-square norms in FX graphs: six to nine calls that every model writes down in the same way."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

__all__ = ["Norm", "find_norms"]

_MUL = {operator.mul, torch.mul}


@dataclass(frozen=True)
class Norm:
    """weight * x / rms(x): `last` is the product with the weight, `nodes` all calls, in order. eps: None where it is
    not a constant of the graph."""

    x: fx.Node
    weight: fx.Node
    eps: float | None
    last: fx.Node
    nodes: tuple[fx.Node, ...]


def find_norms(graph: fx.Graph) -> Iterator[Norm]:
    """All norms whose inner results nobody else uses."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _MUL and len(node.args) == 2:
            a, b = node.args
            for scaled, weight in ((a, b), (b, a)):
                if (
                    isinstance(scaled, fx.Node)
                    and isinstance(weight, fx.Node)
                    and (found := _match(node, scaled, weight))
                ):
                    yield found
                    break


def _cast(node: Any, seen: list[fx.Node]) -> Any:
    """Behind a change of type."""
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in ("to", "float", "type_as"):
        seen.append(node)
        node = node.args[0]
    return node


def _match(last: fx.Node, scaled: fx.Node, weight: fx.Node) -> Norm | None:
    seen = [last]
    product = _cast(scaled, seen)
    if not (isinstance(product, fx.Node) and product.op == "call_function" and product.target in _MUL):
        return None
    wide, rsqrt = product.args
    if not (isinstance(rsqrt, fx.Node) and _called(rsqrt, "rsqrt") and isinstance(wide, fx.Node)):
        return None
    total = rsqrt.args[0]
    if not (isinstance(total, fx.Node) and total.target in (operator.add, torch.add) and len(total.args) == 2):
        return None
    mean, eps = total.args
    square = mean.args[0] if isinstance(mean, fx.Node) and _called(mean, "mean") else None
    if not (isinstance(square, fx.Node) and _called(square, "pow") and square.args == (wide, 2)):
        return None
    assert isinstance(mean, fx.Node)
    if mean.args[1:] != (-1,) or not mean.kwargs.get("keepdim"):
        return None
    seen += [product, rsqrt, total, mean, square]
    casts: list[fx.Node] = []
    x = _cast(wide, casts)
    inner = {*seen, *casts} - {last}
    weight_value = weight.meta.get("example_value")
    plain = isinstance(weight_value, torch.Tensor) and weight_value.dim() == 1
    if not (isinstance(x, fx.Node) and plain and all(set(n.users) <= {*inner, last} for n in inner)):
        return None
    order = {n: i for i, n in enumerate(last.graph.nodes)}
    constant = float(eps) if isinstance(eps, float) else None
    return Norm(x, weight, constant, last, tuple(sorted({*inner, last}, key=order.__getitem__)))


def _called(node: fx.Node, name: str) -> bool:
    return (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")) == name
