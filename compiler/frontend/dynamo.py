"""`torch.compile(model, backend="lowbit")`: a Dynamo graph goes through the same passes as everything else.

FX -> lb, siblings and epilogues are fused, kernels come back as one operator each, and what is left goes to Inductor.
torch finds this through the entry-point group `torch_dynamo_backends`, so nothing has to be imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx
from xdsl.passes import ModulePass

from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.select import say_once
from lowbit.compiler.errors import RunError
from lowbit.compiler.frontend.attend_steps import attend_steps
from lowbit.compiler.frontend.attention import share_heads
from lowbit.compiler.frontend.dense import quantize_graph
from lowbit.compiler.frontend.explain import decisions, left_alone
from lowbit.compiler.frontend.fx import ImportedGraph, grouped_calls, grouped_specs, import_fx, value_of
from lowbit.compiler.frontend.fx_export import export_fx
from lowbit.compiler.ir.graph import Linear
from lowbit.compiler.ir.text import print_module
from lowbit.compiler.pipeline import run_pipeline
from lowbit.compiler.runtime.dispatch import device_target, warm
from lowbit.passes.canonicalize import Canonicalize
from lowbit.passes.fuse_epilogue import FuseEpilogue
from lowbit.passes.fuse_norm import FuseNorm
from lowbit.passes.fuse_requantize import FuseRequantize
from lowbit.passes.fuse_siblings import FuseSiblings
from lowbit.passes.session import PassContext

__all__ = ["GraphReport", "Options", "backend", "compile_graph", "passes", "reports", "reset_reports"]

_log = logging.getLogger("lowbit")
Compiled = Callable[..., Any]
_INDUCTOR = {"size_asserts": False, "alignment_asserts": False}
"""Inductor's settings. Dynamo's guards and our operators check shapes already; checking every buffer again, in Python,
costs a step of a small model more than calling its kernels does."""


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options={...})` takes.

    scheme: quantize dense linear layers while compiling, by a scheme whose method looks at no data (`rtn`). rest: who
    compiles what lowbit leaves: `inductor` or `eager`. max_tokens: build kernels for calls of up to so many tokens when
    a graph is compiled; 0: when they are first called. explain: print what was fused and what was not, and why.
    """

    scheme: str | None = None
    rest: str = "inductor"
    max_tokens: int = 0
    explain: bool = False

    @staticmethod
    def of(values: dict[str, Any] | None) -> Options:
        """From torch.compile's options; raises RunError (LB0570) for an unknown one or a value of the wrong kind."""
        values = dict(values or {})
        fields = Options.__dataclass_fields__
        if unknown := sorted(set(values) - set(fields)):
            raise RunError("LB0570", f"the backend has no option {unknown[0]!r}", hint=f"use {', '.join(fields)}")
        found = Options(**values)
        fits = isinstance(found.max_tokens, int) and isinstance(found.explain, bool)
        if found.rest not in ("inductor", "eager") or not fits:
            raise RunError("LB0570", f"options {values} are not valid", hint="rest is 'inductor' or 'eager'")
        return found


@dataclass
class GraphReport:
    """One compiled graph: kernels it calls, what was fused, what was not and why, products that others compute
    (`left`), who runs the rest, and its IR."""

    kernels: int
    fused: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    rest: str = ""
    ir: str = ""

    def text(self) -> str:
        """The report as lines."""
        lines = [f"lowbit: a graph with {self.kernels} quantized linear kernels; the rest runs on {self.rest}"]
        lines += [f"  fused: {f}" for f in self.fused] + [f"  not fused: {k}" for k in self.kept]
        lines += [f"  left to torch: {left}" for left in self.left]
        return "\n".join(lines)


_reports: list[GraphReport] = []


def reports() -> list[GraphReport]:
    """Reports of all graphs compiled since the start, or since `reset_reports`."""
    return list(_reports)


def reset_reports() -> None:
    """Forget them."""
    _reports.clear()


def passes(device: str = "cpu") -> list[ModulePass]:
    """What runs on a graph from FX. Dead calls stay: they may write to their arguments. Kernels with a norm are there
    for CPUs, such that round their output for GPUs."""
    steps: list[ModulePass] = [Canonicalize(dead=False), FuseSiblings(), FuseEpilogue()]
    if device == "cpu":
        return [*steps, FuseNorm()]
    return [*steps, FuseRequantize(str(device_target(torch.device(device))))] if device == "cuda" else steps


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
    """The Dynamo backend. Raises RunError LB0570 for unknown options, LB0571 when gradients are needed."""
    kinds = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)} - {"cpu"}
    device = next(iter(sorted(kinds)), "cpu")
    return compile_graph(gm, example_inputs, Options.of(kwargs.get("options")), passes(device))


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, steps: Sequence[ModulePass]
) -> Compiled:
    """The same with a list of passes."""
    _check_gradients(example_inputs)
    if options.scheme is not None:
        quantize_graph(gm, options.scheme)
    imported = import_fx(gm)
    report = GraphReport(len(imported.weights), left=left_alone(imported))
    if imported.weights or grouped_calls(gm.graph):
        gm = _rewrite(imported, report, options, steps)
    else:
        say_once("a graph without quantized linear layers goes to the rest of the compiler unchanged")
    compiled = _compile_rest(gm, example_inputs, options, report)
    _reports.append(report)
    if options.explain:
        print(report.text(), flush=True)
    return compiled


def _rewrite(
    imported: ImportedGraph, report: GraphReport, options: Options, steps: Sequence[ModulePass]
) -> fx.GraphModule:
    run_pipeline(imported.module, steps, PassContext.create())
    report.fused, report.kept = decisions(imported)
    report.ir = print_module(imported.module)
    report.kernels = sum(isinstance(op, Linear) for op in imported.module.walk())
    report.kernels += len(grouped_calls(imported.source.graph))
    gm = export_fx(imported)
    if options.max_tokens:
        _warm(gm, imported, options.max_tokens)
    return gm


def _warm(gm: fx.GraphModule, imported: ImportedGraph, max_tokens: int) -> None:
    calls = [n for n in gm.graph.nodes if n.target is torch.ops.lowbit.linear.default]
    dtypes = {str(x.dtype) for n in imported.inputs if (x := value_of(n)).is_floating_point() and x.dim() > 1}
    dtype = next((d for d in (torch.bfloat16, torch.float16) if str(d) in dtypes), torch.float32)
    specs = [str(n.args[4]) for n in calls] + [spec for n in grouped_calls(gm.graph) for spec in grouped_specs(n)]
    device = next(value_of(n).device for n in imported.inputs)
    warm(specs, dtype, device, max_tokens)


def _check_gradients(inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        raise RunError(
            "LB0571",
            "quantized layers have no gradients, and this call asks for some",
            hint="call the model under torch.no_grad() or torch.inference_mode()",
        )


def _compile_rest(gm: fx.GraphModule, inputs: Sequence[Any], options: Options, report: GraphReport) -> Compiled:
    """Inductor, or the graph as it is where that is wanted or there is no compiler."""
    report.rest = options.rest
    if options.rest == "inductor" and _on_cpu(inputs) and find_compiler() is None:
        say_once("Inductor needs a C++ compiler and found none: the graph runs eagerly between quantized layers")
        report.rest = "eager (no C++ compiler)"
    if report.rest != "inductor":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    if _on_cpu(inputs) and (count := attend_steps(gm)):
        report.fused.append(f"{count} calls of attention over a single token are kernels of their own")
    if _on_cpu(inputs) and (count := share_heads(gm)):
        report.fused.append(f"{count} calls of attention read shared keys and values where they are")
    used = _drop_unused(gm)
    inner = cast(Compiled, compile_fx(gm, [inputs[i] for i in used], config_patches=_INDUCTOR))
    return lambda *args: inner(*(args[i] for i in used))


def _on_cpu(inputs: Sequence[Any]) -> bool:
    return all(x.device.type == "cpu" for x in inputs if isinstance(x, torch.Tensor))


def _drop_unused(gm: fx.GraphModule) -> list[int]:
    """Remove inputs nothing reads; the indices of those that stay.

    Weights that were laid beside their siblings are such inputs, and are views now: Inductor would look at their
    storage again and find another place in it than Dynamo noted.
    """
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        if not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
    return [i for i, node in enumerate(inputs) if node.users]
