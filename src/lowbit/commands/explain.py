"""`quantize explain`: what the compiler does with a model, and what it leaves alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.commands._options import ModelArgument, SchemeOption
from lowbit.commands._output import JsonFlag, print_fields, print_json, quiet_stdout

if TYPE_CHECKING:
    from lowbit.compiler.job.explain import Explanation

__all__ = ["explain"]


def explain(
    model: ModelArgument,
    scheme: SchemeOption = "w4a16",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the call that is captured.")] = 16,
    json_output: JsonFlag = False,
) -> None:
    """Say what torch.compile(model, backend="lowbit") fuses, what not and why, graph breaks, and what is left to torch.

    Nothing is computed and no kernel is built. A model that is not quantized is taken as --scheme would quantize it.
    """
    from lowbit.compiler.job.explain import explain_model, layered
    from lowbit.compiler.job.models import find_model
    from lowbit.quantizers.scheme import load_scheme

    with quiet_stdout(json_output):
        found = explain_model(layered(find_model(model), load_scheme(scheme)), tokens)
    if json_output:
        print_json({"model": model, **found.to_dict()})
        return
    _show(model, found)


def _show(model: str, found: Explanation) -> None:
    print_fields(
        [
            ("model", model),
            ("graphs", f"{found.graphs}, {len(found.breaks)} graph breaks"),
            ("kernels", f"{found.kernels} calls, about {found.microseconds:.0f} us for one token (cost model)"),
            ("as a program", found.program or "yes"),
        ]
    )
    for title, lines in (
        ("graph break", found.breaks),
        ("fused", found.fused),
        ("not fused", found.kept),
        ("left to torch", found.left),
        ("note", found.notes),
    ):
        for line in lines:
            typer.echo(f"{title}: {line}")
