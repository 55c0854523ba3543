"""What was fused in a graph, what was not, and why: read off the graph after the passes."""

from __future__ import annotations

from collections import defaultdict

from xdsl.ir import SSAValue

from lowbit.codegen.select import candidates
from lowbit.compiler.frontend.fx import ImportedGraph
from lowbit.compiler.ir.graph import Add, Linear, RmsNorm, SiluMul, Weight, path_of
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.ir.types import QType

__all__ = ["decisions"]

_BYTES_A_SECOND = 2e10
"""A norm's pass over a row that is in the cache."""


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
    kept += _siblings(linears)
    for op in imported.module.walk():
        if isinstance(op, (Add, SiluMul)):
            kept += _epilogue(op)
        elif isinstance(op, RmsNorm):
            kept += _prologue(op, imported)
    return taken, kept


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
    """A norm stays a call of its own; what it would save is said, by the cost model of the kernels behind it."""
    behind = [use.operation for use in norm.outs[0].uses if isinstance(use.operation, Linear)]
    if not behind:
        return []
    k = norm.outs[0].type.get_shape()[-1]  # type: ignore[attr-defined]
    own = 3 * 4 * k / _BYTES_A_SECOND
    seconds = 0.0
    for linear in behind:
        weight = linear.args_[1].owner
        assert isinstance(weight, Weight)
        spec = imported.weights[weight.names.data[0].data].spec
        seconds += candidates(spec, host_target(), 1)[0][0] * len(weight.names.data)
    names = ", ".join(n for linear in behind for n in _names(linear))
    return [
        f"norm before {names}: predicted gain {own * 1e6:.2f} us of {seconds * 1e6:.1f} us a token, and the kernel "
        "rounds activations that a norm inside it would compute once per kernel"
    ]
