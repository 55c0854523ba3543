"""`quantize run`: a model becomes a small, loadable checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.commands._options import (
    ActivationOption,
    FinetuneOption,
    FormatOption,
    KVOption,
    LengthOption,
    MethodOption,
    ModelArgument,
    RewriteOption,
    SamplesOption,
    SchemeOption,
    Sequential,
    TuneOption,
)
from lowbit.commands._output import JsonFlag, print_fields, print_json, quiet_stdout, size
from lowbit.commands._progress import make_sink

__all__ = ["run"]


def run(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must be absent or empty.")],
    scheme: SchemeOption = "w4a16",
    format: FormatOption = None,
    method: MethodOption = None,
    activation: ActivationOption = None,
    kv: KVOption = None,
    rewrite: RewriteOption = None,
    calib: Annotated[
        str, typer.Option("--calib", "-c", metavar="FILE|DATASET", help="Calibration text; pydoc: Python's own manual.")
    ] = "pydoc",
    samples: SamplesOption = 128,
    length: LengthOption = 512,
    sequential: Sequential = True,
    tune: TuneOption = None,
    finetune: FinetuneOption = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes that quantize matrices side by side.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Chooses the calibration sequences.")] = 0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget an interrupted run instead of continuing it.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Quantize MODEL and write a checkpoint, a report and a model card to OUT.

    An interrupted run is continued by the same command, with the same result. The checkpoint loads with transformers
    and vLLM where they know the format; `quantize plan` says so beforehand.
    """
    from lowbit.compiler.job.report import write_report
    from lowbit.compiler.job.run import run as run_job
    from lowbit.compiler.job.workers import default_workers
    from lowbit.quantizers.scheme import load_scheme

    with quiet_stdout(json_output):
        result = run_job(
            model,
            out,
            load_scheme(
                scheme,
                format=format,
                method=method,
                tune=tune,
                finetune=finetune,
                activation=activation,
                kv=kv,
                rewrites=rewrite,
            ),
            calib,
            samples=samples,
            length=length,
            sequential=sequential,
            seed=seed,
            workers=workers or default_workers(),
            restart=restart,
            progress=make_sink(json_output),
        )
        write_report(out, result.report)
    if json_output:
        print_json({"out": str(out), **result.report})
    else:
        _show(out, result.report)


def _show(out: Path, report: dict[str, Any]) -> None:
    totals = report["totals"]
    inner, everything = totals["bits_per_quantized_weight"], totals["bits_per_weight"]
    print_fields(
        [
            ("written to", out),
            ("size", size(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()))),
            ("bits per weight", f"{inner:.3f} quantized, {everything:.3f} over everything"),
            *_activation_fields(report),
            ("report", out / "report.html"),
            ("try it", f"quantize eval {out} --text FILE"),
        ]
    )


def _activation_fields(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What inputs and the cache are rounded to, where they are."""
    fields: list[tuple[str, str]] = []
    if found := report.get("activations"):
        share = f", {found['share_of_8_bits']:.0%} at 8 bits" if 0 < found["share_of_8_bits"] < 1 else ""
        fields.append(("activations", f"{found['format']}, {found['bits_per_value']:.2f} bits a value{share}"))
    if found := report.get("kv"):
        fields.append(("key-value cache", found["format"]))
    return fields
