"""`quantize plan`: what a run will give and cost, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from lowbit.commands._output import JsonFlag, print_fields, print_json, print_table, quiet_stdout, size

if TYPE_CHECKING:
    from lowbit.compiler.job.plan import Plan

__all__ = ["plan"]


def plan(
    model: ModelArgument,
    scheme: SchemeOption = "w4a16",
    format: FormatOption = None,
    method: MethodOption = None,
    activation: ActivationOption = None,
    kv: KVOption = None,
    rewrite: RewriteOption = None,
    samples: SamplesOption = 128,
    length: LengthOption = 512,
    sequential: Sequential = True,
    tune: TuneOption = None,
    finetune: FinetuneOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the result would go (its disk is checked).")] = Path(),
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Dry run from file headers: size, memory, disk, time, and who can run the result. Exits with 3 if impossible."""
    from lowbit.compiler.io.source import open_model
    from lowbit.compiler.job.plan import make_plan
    from lowbit.quantizers.methods import make_method
    from lowbit.quantizers.scheme import load_scheme

    with quiet_stdout(json_output):
        chosen = load_scheme(
            scheme, format=format, method=method, tune=tune, finetune=finetune,
            activation=activation, kv=kv, rewrites=rewrite,
        )  # fmt: skip
        make_method(chosen.method, chosen.options)  # refuses unknown methods and options
        found = make_plan(
            open_model(model), chosen, name=model, samples=samples, length=length, sequential=sequential, out=out
        )
    if json_output:
        print_json(found.to_dict())
    else:
        _show(found, layers)
    if not found.possible:
        raise typer.Exit(3)


def _show(found: Plan, layers: bool) -> None:
    if layers:
        rows = [
            (
                x.path,
                f"{x.n} x {x.k}",
                x.format or "kept",
                f"{x.bits_per_weight:.2f}" if x.format else "",
                x.activation,
                x.problem,
            )
            for x in found.layers
        ]
        print_table(("layer", "shape", "format", "bits/weight", "inputs", "problem"), rows)
        typer.echo("")
    s, (low, likely, high) = found.sizes, found.seconds
    quantized = sum(1 for x in found.layers if x.format)
    print_fields(
        [
            ("model", found.model),
            ("scheme", f"{found.scheme['name']}: {found.scheme['weight']} by {found.scheme['method']}"),
            *[(what, f"{found.activations[what]}") for what in found.activations],
            ("layers", f"{quantized} of {len(found.layers)} linear layers are quantized"),
            ("size", f"{size(s.source_bytes)} -> {size(s.output_bytes)}"),
            (
                "bits per weight",
                f"{s.bits_per_quantized_weight:.3f} quantized, {s.bits_per_weight:.3f} over everything",
            ),
            ("peak memory", f"about {size(found.peak_memory)}"),
            ("disk", f"{size(found.disk_needed)} needed, {size(found.disk_free)} free"),
            ("time", f"about {_minutes(likely)}, between {_minutes(low)} and {_minutes(high)}"),
            *[(f"on {name}", why or "every layer runs") for name, why in found.runs.items()],
            *[(f"for {name}", answer) for name, answer in found.consumers.items()],
        ]
    )
    for note in found.notes:
        typer.echo(f"note: {note}")
    for problem in found.problems:
        typer.echo(f"impossible: {problem}", err=True)


def _minutes(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
