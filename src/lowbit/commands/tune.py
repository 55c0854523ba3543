"""`quantize tune`: measure the kernels a checkpoint needs on this machine, and remember the best schedules."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.commands._output import JsonFlag, print_fields, print_json, print_table, quiet_stdout

if TYPE_CHECKING:
    from lowbit.compiler.job.kernel_tuning import Explained, TunedKernel, TuneReport

__all__ = ["tune"]

_SHOWN = 12  # candidates of a kernel that are listed


def tune(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A folder `quantize run` wrote.")],
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="Time for the whole run: 60s, 5m, 1h; it is not exceeded.")
    ] = "60s",
    tokens: Annotated[
        str, typer.Option("--tokens", "-t", help="Token counts, with commas; each stands for its class.")
    ] = "1,16,512",
    mode: Annotated[str, typer.Option("--mode", help="How the model will run: modules or program.")] = "modules",
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; a GPU if there is one.")] = None,
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="Schedules measured for each kernel.")] = 8,
    restart: Annotated[bool, typer.Option("--restart", help="Measure again what is known.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List kernels, predicted times and what is known; measure nothing.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also list the candidates of every kernel, and why others are rejected.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option("--export", help="Also write this device's complete measurements to a file.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Find the fastest kernels for CHECKPOINT on this machine, by measurement, within a time budget.

    What is found is kept in a database beside the kernel cache and used by everything that runs here afterwards;
    nothing is ever measured while a model serves. The same command goes on where it was stopped. Kernels that crash,
    hang or compute something else are left out and remembered.
    """
    from lowbit.compiler.job import kernel_tuning as job

    with quiet_stdout(json_output):
        report = job.tune_model(
            checkpoint,
            budget=budget,
            tokens=_counts(tokens),
            mode=mode,
            device=device,
            candidates=candidates,
            restart=restart,
            dry_run=dry_run,
            progress=_progress(json_output),
        )
        target = report.target
        details = [job.explain(k.outlook, target) for k in report.kernels] if explain else []
        exported = job.export(target, export) if export else None
    if json_output:
        document = report.to_dict()
        for row, found in zip(document["kernels"], details, strict=False):
            row["candidates"] = [c.to_dict() for c in found]
        print_json({"checkpoint": checkpoint, **document})
        return
    _show(report, dry_run)
    for kernel, found in zip(report.kernels, details, strict=False):
        _show_candidates(kernel, found)
    if export:
        typer.echo(f"{exported} measurements written to {export}")


def _counts(text: str) -> tuple[int, ...]:
    """The numbers of `1,16,512`."""
    from lowbit.compiler.errors import KernelError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise KernelError("LB0477", f"{text[:40]!r} are no token counts", hint="write 1,16,512") from e


def _progress(json_output: bool) -> Callable[[int, int, TunedKernel], None]:
    """One line a kernel on stderr, or one JSON object."""
    from lowbit.compiler.job.kernel_tuning import kernel_text

    def say(i: int, n: int, kernel: TunedKernel) -> None:
        if json_output:
            record = {"event": "kernel", "index": i, "of": n, **kernel.to_dict()}
            print(json.dumps(record), file=sys.stderr, flush=True)
            return
        result = f"{_time(kernel.entry.seconds)}{_gain(kernel, ', ')}" if kernel.entry else kernel.why
        where = f"{kernel_text(kernel.outlook)}, {kernel.outlook.tokens} tokens"
        print(f"kernel {i}/{n} {where}: {kernel.status}, {result}", file=sys.stderr, flush=True)
        for line in kernel.failures:
            print(f"  left out: {line}", file=sys.stderr, flush=True)

    return say


def _show(report: TuneReport, dry_run: bool) -> None:
    from lowbit.compiler.job.kernel_tuning import kernel_schedule, kernel_text

    rows: list[tuple[Any, ...]] = [
        (
            kernel_text(k.outlook),
            k.outlook.tokens,
            k.outlook.need.count,
            "compiled" if k.outlook.need.fused else "loaded",
            k.entry.backend if k.entry else k.outlook.backend,
            _time(k.outlook.predicted),
            _time(k.entry.seconds) if k.entry else "-",
            _gain(k) or "-",
            k.status,
            kernel_schedule(k),
        )
        for k in report.kernels
    ]
    columns = (
        "kernel",
        "tokens",
        "calls",
        "used when",
        "backend",
        "predicted",
        "measured",
        "gain",
        "state",
        "schedule",
    )
    print_table(columns, rows)
    typer.echo("")
    done = sum(k.status in ("tuned", "known") for k in report.kernels)
    fields: list[tuple[str, object]] = [
        ("device", report.device),
        ("kernels", f"{done} of {len(report.kernels)} tuned"),
        ("database", report.database or "turned off by LOWBIT_TUNING=off"),
    ]
    if not dry_run and not report.complete:
        fields.append(("next", "the same command goes on; --budget gives it more time"))
    print_fields(fields)


def _show_candidates(kernel: TunedKernel, found: list[Explained]) -> None:
    from lowbit.codegen.tune.space import rejections, schedule_text
    from lowbit.compiler.job.kernel_tuning import kernel_text

    legal = [e for e in found if e.candidate.predicted is not None]
    typer.echo("")
    typer.echo(f"{kernel_text(kernel.outlook)}, {kernel.outlook.tokens} tokens: {len(legal)} of {len(found)} are legal")
    measured = [e for e in legal if e.seconds is not None or e.quarantined]
    listed = [*legal[:_SHOWN], *(e for e in measured if e not in legal[:_SHOWN])]
    rows = [
        (
            e.backend,
            schedule_text(e.candidate.schedule),
            _time(e.candidate.predicted),
            _time(e.seconds) if e.seconds else "-",
            e.quarantined,
        )
        for e in listed
    ]
    print_table(("backend", "schedule", "predicted", "measured", "quarantined"), rows)
    if len(legal) > len(listed):
        typer.echo(f"  and {len(legal) - len(listed)} more (--json lists all)")
    for _, count, example in rejections([e.candidate for e in found]):
        typer.echo(f"  rejected, {count} times: {example}")


def _time(seconds: float | None) -> str:
    if seconds is None or seconds == float("inf"):
        return "-"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _gain(kernel: TunedKernel, before: str = "") -> str:
    return f"{before}{kernel.gain:.2f}x" if kernel.gain is not None else ""
