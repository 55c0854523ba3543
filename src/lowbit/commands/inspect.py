"""`quantize inspect`: what is inside a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lowbit.commands._options import ModelArgument
from lowbit.commands._output import JsonFlag, print_fields, print_json, print_table, quiet_stdout, size

__all__ = ["inspect"]


def inspect(
    model: ModelArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not only totals.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Show the tensors, formats, bits per weight and sizes of a checkpoint, from its headers."""
    from lowbit.compiler.job.contents import read_contents

    with quiet_stdout(json_output):
        contents = read_contents(model)
    if json_output:
        print_json(contents.to_dict())
        return
    if tensors:
        rows: list[tuple[Any, ...]] = [
            (t.name, " x ".join(map(str, t.shape)) or "scalar", t.kind, f"{t.bits_per_weight:.3f}", size(t.nbytes))
            for t in contents.tensors
        ]
        print_table(("tensor", "shape", "stored as", "bits/weight", "size"), rows)
        typer.echo("")
    print_table(
        ("stored as", "tensors", "weights", "bits/weight", "size"),
        [(k.kind, k.count, k.weights, f"{k.bits_per_weight:.3f}", size(k.nbytes)) for k in contents.by_kind()],
    )
    typer.echo("")
    print_fields(
        [
            ("model", contents.architecture),
            ("quantization", contents.method),
            ("parameters", f"{contents.weights:,}"),
            ("size", size(contents.nbytes)),
            ("bits per weight", contents.describe_bits()),
        ]
    )
