"""`quantize convert`: a quantized checkpoint in another program's layout, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.commands._output import JsonFlag, print_fields, print_json, quiet_stdout, size

__all__ = ["convert"]


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A quantized checkpoint's folder.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write; must be absent or empty. For gguf the file.")
    ],
    to: Annotated[str, typer.Option("--to", help="gguf, gptq, compressed-tensors, vptq or lowbit.")],
    json_output: JsonFlag = False,
) -> None:
    """Write CHECKPOINT in another program's layout, with exactly its numbers, for programs that read only that one.

    Codes, scales and zero points are moved; nothing is quantized again. What the layout cannot hold is refused.
    """
    from lowbit.compiler.io.convert import LAYOUTS
    from lowbit.compiler.io.convert import convert as write

    layout = next((name for name in LAYOUTS if name == to), None)
    if layout is None:
        raise typer.BadParameter(f"use {', '.join(LAYOUTS)}", param_hint="--to")
    with quiet_stdout(json_output):
        done = write(checkpoint, out, layout)
    if json_output:
        print_json(done.to_dict())
        return
    print_fields(
        [
            ("written to", done.out),
            ("layout", f"{done.layout}, from {done.source}"),
            ("quantized layers", done.layers),
            ("size", size(done.nbytes)),
            *[("note", note) for note in done.notes],
        ]
    )
