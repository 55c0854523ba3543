"""`quantize export`: a checkpoint with its kernels compiled into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.commands._output import JsonFlag, print_fields, print_json, quiet_stdout, size

__all__ = ["export"]

DTYPES = ("float32", "bfloat16", "float16")


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A quantized checkpoint's folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must be absent or empty.")],
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="sm_90a, cpu-avx512vnni ...; repeatable; this CPU.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Most tokens of one call.")] = 512,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of activations; the checkpoint's own.")] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Kernels of batch-invariant layers instead.")
    ] = False,
    frozen: Annotated[bool, typer.Option("--frozen", help="Whoever loads OUT never compiles.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Copy CHECKPOINT to OUT with every kernel it can need, compiled for the targets.

    A server then needs no compiler. Compiled kernels are code: they run only where LOWBIT_TRUST_KERNELS=1 or
    `lowbit.load(OUT, trust_kernels=True)` says so.
    """
    import torch

    from lowbit.compiler.ir.target import host_target
    from lowbit.compiler.job.export import export_kernels, parse_target

    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"use {', '.join(DTYPES)}", param_hint="--dtype")
    targets = list(dict.fromkeys(map(parse_target, target or []))) or [host_target()]
    with quiet_stdout(json_output):
        report = export_kernels(
            checkpoint,
            out,
            targets,
            max_tokens=tokens,
            frozen=frozen,
            dtype=getattr(torch, dtype) if dtype else None,
            batch_invariant=batch_invariant,
        ).to_dict()
    if json_output:
        print_json(report)
        return
    worst = "none was checked" if report["worst_error"] is None else f"worst error {report['worst_error']:.1e}"
    print_fields(
        [
            ("written to", out),
            ("kernels", f"{report['kernels']}, {size(report['bytes'])}, {worst}"),
            *[(f"for {name}", f"{count} kernels") for name, count in report["targets"].items()],
            ("unchecked", f"{report['unchecked']} (their target is not this machine)"),
            ("use them", f"LOWBIT_TRUST_KERNELS=1, or lowbit.load({str(out)!r}, trust_kernels=True)"),
        ]
    )
