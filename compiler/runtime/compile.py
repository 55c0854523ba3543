"""`lowbit.compile`: run the pipeline on a quantized model, fuse its modules, build every kernel it can need."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from xdsl.passes import ModulePass

from lowbit.codegen.spec import Compute, KernelSpec
from lowbit.compiler.errors import IRError, RunError
from lowbit.compiler.frontend.trace import import_model
from lowbit.compiler.ir.text import print_module
from lowbit.compiler.pipeline import run_pipeline
from lowbit.compiler.runtime.dispatch import DTYPE_NAMES, classes_up_to, device_target, freeze, kernel_for, warm
from lowbit.compiler.runtime.fused import QuantGatedMLP, fuse_gated_mlp, fuse_siblings
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear, default_compute, make_invariant
from lowbit.passes.canonicalize import Canonicalize
from lowbit.passes.choose_layout import ChooseLayout
from lowbit.passes.emit import Emit
from lowbit.passes.fuse_epilogue import FuseEpilogue
from lowbit.passes.fuse_prologue import FusePrologue
from lowbit.passes.fuse_requantize import FuseRequantize
from lowbit.passes.fuse_siblings import FuseSiblings
from lowbit.passes.lower_kernels import LowerKernels
from lowbit.passes.pack import Pack
from lowbit.passes.quantize_acts import QuantizeActs
from lowbit.passes.select_schedule import SelectSchedule
from lowbit.passes.session import PassContext
from lowbit.quantizers.formats import WeightFormat

__all__ = ["CompileReport", "compile_model", "fuse_modules"]

_log = logging.getLogger("lowbit")
MODES = ("modules", "program")
"""How a compiled model runs."""


@dataclass
class CompileReport:
    """What `compile_model` did: kernels built (text per spec), module paths fused, and the final IR."""

    kernels: list[str] = field(default_factory=list)
    fused: list[tuple[str, ...]] = field(default_factory=list)
    ir: str = ""


class _ModelSession:
    """The data side of the pipeline: packs and fuses modules of a live model."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device, max_tokens: int) -> None:
        self.model, self.dtype, self.device, self.max_tokens = model, dtype, device, max_tokens
        self.report = CompileReport()

    def quantize(self, path: str, fmt: WeightFormat) -> str:
        raise RunError("LB0502", "the model is not quantized yet", where=path, hint="call lowbit.quantize first")

    def pack(self, paths: tuple[str, ...], layout: str, epilogue: tuple[str, ...]) -> None:
        if len(paths) == 1:
            done = True
        elif "silu_mul" in epilogue:
            done = len(paths) == 2 and fuse_gated_mlp(self.model, *paths)
        else:
            done = fuse_siblings(self.model, paths)
        if not done:
            _log.warning("%s stay separate modules: their parent is not one lowbit can replace", ", ".join(paths))
        elif len(paths) > 1:
            self.report.fused.append(paths)

    def connect(self, paths: tuple[str, ...], reader: str) -> None:
        parent = self.model.get_submodule(reader.rpartition(".")[0])
        if isinstance(parent, QuantGatedMLP) and parent.round_between():
            self.report.fused.append((*paths, reader))
        else:
            _log.warning("%s rounds its input itself: its module is not one lowbit can replace", reader)

    def build(self, specs: Sequence[KernelSpec]) -> list[str]:
        name = DTYPE_NAMES[self.dtype]  # the graph's numbers may be of another type than the model's
        specs = [replace(s, out_dtype=name) if s.reads_rows else s for s in specs]
        if any(m.invariant for m in self.model.modules() if isinstance(m, PackedLinear)):
            specs = [replace(s, invariant=True) for s in specs]
        warm([s.key() for s in specs], self.dtype, self.device, self.max_tokens)
        return [self._describe(s) for s in specs]

    def _describe(self, spec: KernelSpec) -> str:
        built = [kernel_for(spec.key(), self.dtype, self.device, m) for m in classes_up_to(self.max_tokens)]
        names = sorted({k.backend for k in built})
        text = f"{' and '.join(names)}: worst error {max(k.error for k in built):.1e}"
        self.report.kernels.append(f"{spec.format} {spec.segments}x{spec.k} {'+'.join(spec.epilogue)}: {text}")
        return text


def compile_model(
    model: nn.Module,
    *,
    max_tokens: int = 512,
    frozen: bool = False,
    batch_invariant: bool = False,
    mode: str = "modules",
    **options: Any,
) -> nn.Module:
    """Fuse and build everything a quantized model needs for calls of up to `max_tokens` tokens; returns the model.

    mode `modules`: layers are called one by one by the model's own code. mode `program`: one native program runs a
    whole step of a decoder-only model on the CPU; `options` are those of `program.compile_program`. The model is
    changed in place. With `frozen`, a call that would need another kernel afterwards is an error (LB0409) instead of
    a compile. batch_invariant: the result of a layer for a token does not depend, to the bit, on how many other tokens
    are in the call (see `codegen.invariant`). `model.lowbit_report` says what was done. Raises RunError LB0503 for a
    model without quantized layers, LB0568 for another mode, options that the mode does not have, or values below 1.
    """
    if mode not in MODES or (options and mode == "modules"):
        what = f"mode {mode!r}" if mode not in MODES else f"option {min(options)!r} for mode {mode!r}"
        raise RunError("LB0568", f"lowbit.compile has no {what}", hint=f"use mode={' or '.join(MODES)}")
    if max_tokens < 1:
        raise RunError("LB0568", f"max_tokens={max_tokens} is not positive", hint="use at least 1")
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    if not layers and not any(isinstance(m, PackedLinear) for m in model.modules()):
        raise RunError(
            "LB0503", "the model has no quantized layers", where=type(model).__name__, hint="call lowbit.quantize first"
        )
    for layer in layers:
        layer.prepare()
    if batch_invariant:
        make_invariant(model)
    device = next(m.device for m in model.modules() if isinstance(m, PackedLinear))
    assert isinstance(device, torch.device)
    session = _ModelSession(model, activation_dtype(model), device, max_tokens)
    whole = mode == "program"
    if whole:
        from lowbit.compiler.runtime.program import check_program, compile_program  # transformers is imported there

        check_program(model, **options)
    if layers:
        _run(model, session, default_compute(layers[0].fmt, device), str(device_target(device)), fuse_only=whole)
    if whole:
        compile_program(model, max_tokens=max_tokens, **options)
    if not whole or frozen:
        # Layers the graph did not show are built too; those it did are there already.
        warm([m.key for m in model.modules() if isinstance(m, PackedLinear)], session.dtype, device, max_tokens)
    if frozen:
        freeze()
    model.lowbit_report = session.report  # type: ignore[assignment]
    return model


def _run(model: nn.Module, session: _ModelSession, compute: Compute, target: str, *, fuse_only: bool = False) -> None:
    try:
        graph = import_model(model)
    except IRError as e:
        _log.warning("modules are not fused: %s", e)
        return
    passes: list[ModulePass] = [
        Canonicalize(),
        QuantizeActs(),
        FuseSiblings(),
        FusePrologue(),
        FuseEpilogue(residual=False),
        ChooseLayout(target),
        FuseRequantize(target, compute, gated=True),
        Pack(),
    ]
    if not fuse_only:
        passes += [LowerKernels(compute), SelectSchedule(session.max_tokens, target), Emit()]
    run_pipeline(graph, passes, PassContext.create(session))
    session.report.ir = print_module(graph)


def fuse_modules(model: nn.Module) -> None:
    """Fuse what `compile_model` fuses, in place, and build nothing: its kernels are those a compiled model asks for."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    if layers:
        device = cast(PackedLinear, layers[0].prepare().inner).device
        session = _ModelSession(model, activation_dtype(model), device, 1)
        _run(model, session, default_compute(layers[0].fmt, device), str(device_target(device)), fuse_only=True)


def activation_dtype(model: nn.Module) -> torch.dtype:
    """The dtype activations have: that of the model's remaining float parameters."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
