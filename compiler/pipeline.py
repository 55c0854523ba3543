"""THE pass list, and running it.

import            frontend: checkpoint / module -> lb
canonicalize      remove what does nothing
fold-affine       norm weights, smoothing scales, rotations folded into neighbours
assign-formats    scheme -> a format per tensor, with the reason
quantize-weights  run the method
quantize-acts     what layers do to their inputs becomes operations: rotate, round
fuse-siblings     q,k,v and gate,up become one linear
fuse-prologue     rotation and rounding move into the kernel
fuse-epilogue     bias, silu-mul, residual add
fuse-norm         a norm moves into the kernels that read it, where that pays
choose-layout     one packed layout per target family
fuse-requantize   a kernel rounds its output for the kernel that reads it
pack              weights permuted to that layout
lower-kernels     lb -> lbk
fold-scales       powers of two that end decoding move into scales
select-schedule   database, else cost model
emit              source -> compile -> check against reference -> store
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass, PassPipeline
from xdsl.utils.exceptions import ArgSpecParseError

from lowbit.compiler.errors import IRError
from lowbit.compiler.ir.text import parse_module, print_module, verify_module
from lowbit.passes.assign_formats import AssignFormats
from lowbit.passes.canonicalize import Canonicalize
from lowbit.passes.choose_layout import ChooseLayout
from lowbit.passes.emit import Emit
from lowbit.passes.fold_affine import FoldAffine
from lowbit.passes.fold_scales import FoldScales
from lowbit.passes.fuse_epilogue import FuseEpilogue
from lowbit.passes.fuse_norm import FuseNorm
from lowbit.passes.fuse_prologue import FusePrologue
from lowbit.passes.fuse_requantize import FuseRequantize
from lowbit.passes.fuse_siblings import FuseSiblings
from lowbit.passes.lower_kernels import LowerKernels
from lowbit.passes.pack import Pack
from lowbit.passes.quantize_acts import QuantizeActs
from lowbit.passes.quantize_weights import QuantizeWeights
from lowbit.passes.select_schedule import SelectSchedule
from lowbit.passes.session import PassContext

__all__ = ["PASSES", "QUANTIZE", "RUNTIME", "parse_module", "parse_passes", "print_module", "run_pipeline"]

QUANTIZE: tuple[type[ModulePass], ...] = (Canonicalize, FoldAffine, AssignFormats, QuantizeWeights)
"""A dense model becomes a quantized one."""

RUNTIME: tuple[type[ModulePass], ...] = (
    Canonicalize,
    QuantizeActs,
    FuseSiblings,
    FusePrologue,
    FuseEpilogue,
    ChooseLayout,
    FuseRequantize,
    Pack,
    LowerKernels,
    FoldScales,
    SelectSchedule,
    Emit,
)
"""A quantized model becomes kernels."""

_ALL: tuple[type[ModulePass], ...] = (*QUANTIZE, *RUNTIME, FuseNorm)
PASSES: dict[str, type[ModulePass]] = {p.name: p for p in _ALL}


def parse_passes(spec: str) -> list[ModulePass]:
    """Passes written as text, `fuse-siblings,choose-layout{target=sm_90}`; raises IRError (LB0303)."""
    try:
        pipeline = PassPipeline.parse_spec({name: (lambda cls=cls: cls) for name, cls in PASSES.items()}, spec)  # type: ignore[misc]
    except (ValueError, ArgSpecParseError) as e:
        raise IRError("LB0303", f"cannot read passes {spec!r}: {e}", hint="use " + ", ".join(PASSES)) from e
    return list(pipeline.passes)


def run_pipeline(
    module: ModuleOp,
    passes: str | Iterable[ModulePass],
    ctx: Context | None = None,
    *,
    print_after: Iterable[str] = (),
    dump_ir: Path | None = None,
    time_passes: bool = False,
    log: TextIO | None = None,
) -> dict[str, float]:
    """Run passes in place, verifying before, between and after; returns seconds per pass.

    print_after: names of passes whose result is written to `log` (or `all`). dump_ir: a folder that gets one file per
    pass, `00-input.mlir`, `01-canonicalize.mlir` ...
    """
    steps = parse_passes(passes) if isinstance(passes, str) else list(passes)
    ctx = ctx or PassContext.create()
    shown, seconds = set(print_after), dict[str, float]()
    verify_module(module)
    _dump(module, dump_ir, 0, "input")
    for i, step in enumerate(steps, 1):
        start = time.perf_counter()
        step.apply(ctx, module)
        seconds[f"{i:02d}-{step.name}"] = time.perf_counter() - start
        verify_module(module, after=step.name)
        _dump(module, dump_ir, i, step.name)
        if log is not None and (step.name in shown or "all" in shown):
            log.write(f"// after {step.name}\n{print_module(module)}")
    if time_passes and log is not None:
        log.writelines(f"{took * 1e3:10.2f} ms  {name}\n" for name, took in seconds.items())
    return seconds


def _dump(module: ModuleOp, folder: Path | None, index: int, name: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:02d}-{name}.mlir").write_text(print_module(module))
