"""What was fused in a graph, what was not, and why: read off the graph after the passes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import fx
from xdsl.ir import SSAValue

from lowbit.codegen.select import candidates
from lowbit.compiler.frontend.fx import ImportedGraph, grouped_calls, grouped_specs, is_view, module_path, real_tensor
from lowbit.compiler.ir.graph import Add, Linear, RmsNorm, SiluMul, Weight, path_of
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.ir.types import QType
from lowbit.compiler.runtime.dispatch import parse_spec
from lowbit.passes.fuse_norm import norm_gain

__all__ = ["decisions", "left_alone"]


def decisions(imported: ImportedGraph) -> tuple[list[str], list[str]]:
    """(fusions taken, fusions not taken with the reason), one line each."""
    linears = [op for op in imported.module.walk() if isinstance(op, Linear)]
    taken, kept = [], []
    for linear in linears:
        names = _names(linear)
        if len(names) > 1:
            taken.append(f"{' + '.join(names)}: one kernel")
        if steps := [s for s in linear.steps() if s != "bias"]:
            taken.append(f"{' + '.join(names)}: {' and '.join(steps)} in the kernel")
        if linear.rounds is not None:
            taken.append(f"{' + '.join(names)}: rounds its output to {linear.rounds.data} for the layer that reads it")
        if linear.norm is not None:
            gain = norm_gain(linear.args_[0].type.get_shape()[-1], 1)  # type: ignore[attr-defined]
            taken.append(f"{' + '.join(names)}: norm in the kernel (predicted gain {gain * 1e6:.2f} us a token)")
    taken += [f"{line}: all experts in one operator" for line in _experts(imported)]
    kept += _siblings(linears)
    for op in imported.module.walk():
        if isinstance(op, (Add, SiluMul)):
            kept += _epilogue(op)
        elif isinstance(op, RmsNorm):
            kept += _prologue(op, imported)
    return taken, kept


def _experts(imported: ImportedGraph) -> list[str]:
    """Projections of experts, with how many there are."""
    calls = grouped_calls(imported.source.graph)
    paths = Counter(f"{module_path(n) or 'experts'} (formats: {', '.join(_formats(n))})" for n in calls)
    return [f"{count} projections of {path}" for path, count in paths.items()]


def _formats(call: fx.Node) -> list[str]:
    return sorted({parse_spec(spec).format for spec in grouped_specs(call)} or {"float"})


def _names(linear: Linear) -> list[str]:
    weight = linear.args_[1].owner
    return [n.data.removesuffix(".weight") for n in weight.names.data] if isinstance(weight, Weight) else []


def _siblings(linears: list[Linear]) -> list[str]:
    """Layers on one input that stayed apart."""
    by_input: dict[SSAValue, list[Linear]] = defaultdict(list)
    for linear in linears:
        by_input[linear.args_[0]].append(linear)
    found = []
    for group in by_input.values():
        if len(group) < 2:
            continue
        formats = {str(g.args_[1].type.fmt.data) for g in group if isinstance(g.args_[1].type, QType)}
        if len(formats) > 1:
            why = f"their formats differ ({', '.join(sorted(formats))})"
        elif any(g.steps() for g in group):
            why = f"they have epilogues of their own ({', '.join(sorted({s for g in group for s in g.steps()}))})"
        elif len({path_of(g).rpartition(".")[0] for g in group}) > 1:
            why = "they belong to different modules"
        else:
            why = "their kernels differ, or a weight is used twice or not known when the graph is compiled"
        found.append(f"{', '.join(n for g in group for n in _names(g))}: they read one input, but {why}")
    return found


def _epilogue(op: Add | SiluMul) -> list[str]:
    """Elementwise calls after a quantized layer."""
    what = "residual add" if isinstance(op, Add) else "silu-mul"
    for value in op.args_:
        linear = value.owner
        if isinstance(linear, Linear) and isinstance(linear.args_[1].type, QType):
            why = "its result is used elsewhere too" if not value.has_one_use() else "the shapes or steps do not fit"
            return [f"{what} after {', '.join(_names(linear))}: {why}"]
    return []


def _prologue(norm: RmsNorm, imported: ImportedGraph) -> list[str]:
    """A norm that stayed a call of its own before quantized layers, with the cost model's figures."""
    behind = [use.operation for use in norm.outs[0].uses if isinstance(use.operation, Linear)]
    layers = [linear for linear in behind if isinstance(linear.args_[1].type, QType)]
    if not layers:
        return []
    k = norm.outs[0].type.get_shape()[-1]  # type: ignore[attr-defined]
    gain = norm_gain(k, len(layers))
    if len(list(norm.outs[0].uses)) > len(layers):
        why = "something else reads it too"
    elif gain <= 0:
        why = "every kernel would compute it anew"
    else:
        why = "its epsilon is no constant, its types differ, or the kernels behind it do not normalise"
    names = ", ".join(n for linear in layers for n in _names(linear))
    seconds = sum(_predicted(linear, imported) for linear in layers)
    figures = f"predicted gain {gain * 1e6:.2f} us of {seconds * 1e6:.1f} us a token"
    return [f"norm before {names}: {why} ({figures})"]


def _predicted(linear: Linear, imported: ImportedGraph) -> float:
    """Seconds of a layer's kernel for one token, by its backend's cost model."""
    weight = linear.args_[1].owner
    assert isinstance(weight, Weight)
    spec = imported.weights[weight.names.data[0].data].spec
    return candidates(spec, host_target(), 1)[0][0] * len(weight.names.data)


def left_alone(imported: ImportedGraph) -> list[str]:
    """Products that are not lowbit's: calls on dense matrices of the model, and layers only the reference can run."""
    found = []
    for node in imported.source.graph.nodes:
        tensor = real_tensor(node, imported.source) if node.op in ("placeholder", "get_attr") else None
        if isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 1 and tensor.is_floating_point():
            for call in _readers(node):
                shape = " x ".join(map(str, tensor.shape))
                kind = str(tensor.dtype).removeprefix("torch.")
                found.append(f"{module_path(call) or 'model'}: {_call_name(call)} on {shape} {kind}")
    target = host_target()
    for linear in (op for op in imported.module.walk() if isinstance(op, Linear)):
        weight = linear.args_[1].owner
        assert isinstance(weight, Weight)
        spec = imported.weights[weight.names.data[0].data].spec
        if candidates(spec, target, 1)[0][1].name == "reference":
            found.append(
                f"{', '.join(_names(linear))}: no backend has a kernel for {spec.format}, the reference runs it"
            )
    return found


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Calls that compute with a matrix or with views of it; looking rows up in a table is none."""
    for user in node.users:
        if is_view(user):
            yield from _readers(user)
        elif user.op != "output" and "embedding" not in _call_name(user):
            yield user


def _call_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")
