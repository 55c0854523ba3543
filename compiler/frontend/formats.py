"""Which layer gets which format: the front half of the pipeline, run on a model without weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from xdsl.dialects.builtin import ModuleOp

from lowbit.compiler.frontend.trace import import_model
from lowbit.compiler.ir.graph import Weight
from lowbit.compiler.ir.types import QType
from lowbit.compiler.pipeline import run_pipeline
from lowbit.passes.assign_formats import AssignFormats
from lowbit.passes.canonicalize import Canonicalize
from lowbit.passes.session import PassContext
from lowbit.quantizers.formats import WeightFormat, parse_format
from lowbit.quantizers.scheme import Scheme

__all__ = ["Assignment", "assign"]


@dataclass(frozen=True)
class Assignment:
    """formats: module path of every linear layer that gets one -> its format. reasons: why each weight has the format
    it has, or is kept. graph: the IR that says so."""

    formats: dict[str, WeightFormat]
    reasons: dict[str, str]
    graph: ModuleOp


def assign(model: nn.Module, scheme: Scheme) -> Assignment:
    """Import `model` (parameters may be on meta) and run assign-formats.

    Raises IRError (LB0320) when the model cannot be traced, FormatError (LB0213) when a format does not fit a layer.
    """
    graph = import_model(model)
    run_pipeline(graph, [Canonicalize(), AssignFormats()], PassContext.create(scheme=scheme))
    formats: dict[str, WeightFormat] = {}
    reasons: dict[str, str] = {}
    for weight in [op for op in graph.walk() if isinstance(op, Weight) and op.reason is not None]:
        path = weight.names.data[0].data.removesuffix(".weight")
        assert weight.reason is not None
        reasons[path] = weight.reason.data
        if isinstance(type_ := weight.outs[0].type, QType):
            formats[path] = parse_format(type_.fmt.data)
    return Assignment(formats, reasons, graph)
