"""Which kernels a model needs: every distinct spec, how often a step calls it, and what is known about its speed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from lowbit.codegen.backend import Backend
from lowbit.codegen.schedule import Schedule, token_class
from lowbit.codegen.select import able, measured
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune.database import Entry
from lowbit.compiler.errors import IRError, RunError
from lowbit.compiler.frontend.trace import import_model
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.io.load import FormattedLinear, skeleton_of
from lowbit.compiler.ir.graph import Call
from lowbit.compiler.ir.kernel import Kernel
from lowbit.compiler.ir.target import Target
from lowbit.compiler.pipeline import run_pipeline
from lowbit.compiler.runtime.compile import activation_dtype
from lowbit.compiler.runtime.dispatch import DTYPE_NAMES, parse_spec
from lowbit.compiler.runtime.fused import QuantGatedMLP
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear, target_compute
from lowbit.passes.canonicalize import Canonicalize
from lowbit.passes.choose_layout import ChooseLayout
from lowbit.passes.fuse_epilogue import FuseEpilogue
from lowbit.passes.fuse_prologue import FusePrologue
from lowbit.passes.fuse_requantize import FuseRequantize
from lowbit.passes.fuse_siblings import FuseSiblings
from lowbit.passes.lower_kernels import LowerKernels, spec_of
from lowbit.passes.quantize_acts import QuantizeActs
from lowbit.passes.session import PassContext

__all__ = ["KernelNeed", "Outlook", "default_of", "needed_kernels", "open_skeleton", "outlook"]

_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class KernelNeed:
    """One kernel of a model. count: layers, or groups of fused ones, that call it. fused: `lowbit.compile` needs it;
    otherwise only a model that is loaded and not compiled does."""

    spec: KernelSpec
    count: int
    fused: bool


@dataclass(frozen=True)
class Outlook:
    """What is known about one kernel and token class: the schedule that would be used without measurements, with its
    predicted seconds, and the measurement there is."""

    need: KernelNeed
    tokens: int
    backend: str
    default: Schedule | None
    predicted: float
    entry: Entry | None = None


def open_skeleton(folder: str | Path) -> nn.Module:
    """A quantized checkpoint as modules without weights, for the shapes; errors as `read_checkpoint`."""
    return skeleton_of(read_checkpoint(folder))


def needed_kernels(model: nn.Module, target: Target, mode: str = "modules") -> list[KernelNeed]:
    """Every kernel of a quantized model (with or without weights, which are not looked at), those of the fused model
    first, then by how often they are called.

    mode: as `lowbit.compile` has it; in mode `program` residual adds are fused, and activations are float32. Raises
    RunError LB0503 for a model without quantized layers.
    """
    plain = [m for m in model.modules() if isinstance(m, (QuantLinear, FormattedLinear))]
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    if not plain and not packed:
        raise RunError(
            "LB0503", "the model has no quantized layers", where=type(model).__name__, hint="call lowbit.quantize first"
        )
    dtype = "f32" if mode == "program" else DTYPE_NAMES.get(activation_dtype(model), "f32")
    inner = {id(m.inner) for m in plain if isinstance(m, QuantLinear)}
    fused = Counter(parse_spec(m.key) for m in packed if id(m) not in inner)  # of a model that is compiled already
    gated = [m for m in model.modules() if isinstance(m, QuantGatedMLP)]
    fused += Counter(parse_spec(key) for m in gated for key in m.row_keys(activation_dtype(model)))
    single: Counter[KernelSpec] = Counter()
    if plain:
        fused += _lowered(model, plain[0], target, fuse=True, residual=mode == "program", rows=True)
        single = Counter() if mode == "program" else _lowered(model, plain[0], target, fuse=False, residual=False)
        if any(s.uses_rows for s in fused):  # what a hook on a layer brings back
            single |= _lowered(model, plain[0], target, fuse=True, residual=False)
    found = [KernelNeed(s.typed(dtype), n, True) for s, n in fused.most_common()]
    return found + [KernelNeed(s.typed(dtype), n, False) for s, n in single.most_common() if s not in fused]


def _lowered(
    model: nn.Module,
    first: QuantLinear | FormattedLinear,
    target: Target,
    *,
    fuse: bool,
    residual: bool,
    rows: bool = False,
) -> Counter[KernelSpec]:
    """How often each kernel is called in the model's graph. rows: kernels round for others, as far as they can."""
    try:
        graph = import_model(model)
    except IRError as e:
        _log.warning("only the kernels of single layers are known: %s", e)
        return Counter()
    compute = target_compute(first.fmt, target)
    passes: list[ModulePass] = [Canonicalize(), QuantizeActs()]
    passes += [FuseSiblings()] if fuse else []
    passes += [FusePrologue(), *([FuseEpilogue(residual=residual)] if fuse else [])]
    passes += [ChooseLayout(str(target))]
    passes += [FuseRequantize(str(target), compute, gated=True)] if rows else []
    passes += [LowerKernels(compute)]
    run_pipeline(graph, passes, PassContext.create())
    return _calls(graph)


def _calls(graph: ModuleOp) -> Counter[KernelSpec]:
    specs = {op.sym_name.data: spec_of(op) for op in graph.walk() if isinstance(op, Kernel)}
    return Counter(specs[c.kernel.root_reference.data] for c in graph.walk() if isinstance(c, Call))


def default_of(backend: Backend, spec: KernelSpec, target: Target, tokens: int) -> tuple[Schedule | None, float]:
    """The schedule that is used where nothing was measured, and its predicted seconds; (None, infinity) when none is
    legal."""
    first = next(iter(backend.schedules(spec, target, tokens)), None)
    return first, float("inf") if first is None else backend.predict(spec, first, target, tokens)


def outlook(needs: Sequence[KernelNeed], target: Target, tokens: Sequence[int]) -> list[Outlook]:
    """Everything that can be tuned, most valuable first: kernels of the fused model before others, and by their share
    of what a step of so many tokens costs."""
    found = [_row(need, target, m) for need in needs for m in dict.fromkeys(map(token_class, tokens))]
    totals: dict[int, float] = {}
    for row in found:
        totals[row.tokens] = totals.get(row.tokens, 0.0) + row.need.count * _finite(row.predicted)
    share = {id(r): r.need.count * _finite(r.predicted) / max(totals[r.tokens], 1e-30) for r in found}
    return sorted(found, key=lambda r: (not r.need.fused, -share[id(r)]))


def _row(need: KernelNeed, target: Target, m: int) -> Outlook:
    """The backend that was measured to be the fastest, else the one that is predicted to be."""
    backends = list(able(need.spec, target))
    best = min(measured(need.spec, target, m, backends), key=lambda found: found[1].seconds, default=None)
    foreseen = {b.name: default_of(b, need.spec, target, m) for b in backends}
    fastest = min(backends, key=lambda b: (b.name == "reference", b.waits(backends), foreseen[b.name][1]))
    backend, entry = best or (fastest, None)
    return Outlook(need, m, backend.name, *foreseen[backend.name], entry)


def _finite(seconds: float) -> float:
    return seconds if seconds < float("inf") else 0.0
