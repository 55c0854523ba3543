"""Edits as the graph writes them on weights, `rows scale s` or `columns order 2 0 1`, read back as steps.

rows, columns: axis 0 or 1. scale NAME: times the vector called so. order I ...: place i holds what was at the i-th
index. rotate B, unrotate B: blocks of B times a Hadamard matrix over the root of B, or its inverse. fill V: all V.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp

from lowbit.compiler.errors import IRError
from lowbit.compiler.ir.graph import Weight
from lowbit.quantizers.rewrites.edits import Edits, Fill, Gather, Rotation, Scale, Step, Turn

__all__ = ["graph_edits", "parse_step"]

_AXES = {"rows": 0, "columns": 1}


def parse_step(text: str, vector: Callable[[str], Tensor]) -> Step:
    """The step written as `text`; `vector` gives the tensor of a name. Raises IRError (LB0313) when it is none."""
    axis, _, rest = text.partition(" ")
    kind, _, argument = rest.partition(" ")
    try:
        at = _AXES[axis]
        if kind == "scale":
            return Scale(at, vector(argument))
        if kind == "order":
            return Gather(at, torch.tensor([int(i) for i in argument.split()]))
        if kind == "fill":
            return Fill(float(argument))
        return Turn(at, Rotation(int(argument)), inverse={"rotate": False, "unrotate": True}[kind])
    except (KeyError, ValueError) as e:
        raise IRError("LB0313", f"{text!r} is not an edit of a weight", hint="write `rows scale NAME`") from e


def graph_edits(module: ModuleOp, vector: Callable[[str], Tensor]) -> Edits:
    """The edits that `fold-affine` wrote on the weights of a graph."""
    edits = Edits()
    for weight in [op for op in module.walk() if isinstance(op, Weight) and op.edits is not None]:
        assert weight.edits is not None
        edits.add(weight.names.data[0].data, *(parse_step(text.data, vector) for text in weight.edits.data))
    return edits
