"""Options that several commands share, spelled once."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "ActivationOption",
    "FinetuneOption",
    "FormatOption",
    "KVOption",
    "LengthOption",
    "MethodOption",
    "ModelArgument",
    "RewriteOption",
    "SamplesOption",
    "SchemeOption",
    "Sequential",
    "TuneOption",
]

TuneOption = Annotated[
    int | None, typer.Option("--tune", min=0, help="Passes of training scales, codebooks and norms block by block.")
]
FinetuneOption = Annotated[
    int | None,
    typer.Option("--finetune", min=0, help="Passes of training them together; needs the whole model in memory."),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file or a hub id.")]
SchemeOption = Annotated[str, typer.Option("--scheme", "-s", help="A preset (`quantize schemes`) or a .toml file.")]
FormatOption = Annotated[str | None, typer.Option("--format", "-f", help="Weight format, such as int4.g64.sym.")]
MethodOption = Annotated[
    str | None, typer.Option("--method", "-m", help="How values are chosen: rtn, gptq, fmpq, decoupleq or vptq.")
]
ActivationOption = Annotated[
    str | None,
    typer.Option("--activation", "-a", help="What layers' inputs are rounded to, such as int8.token; none: nothing."),
]
KVOption = Annotated[
    str | None, typer.Option("--kv", help="Format of the key-value cache, such as kv4.kc64.vt.w64; none: as it is.")
]
RewriteOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rewrite", "-r", help="smooth, rotate or permute, before quantizing; repeatable; none: no rewrites."
    ),
]
SamplesOption = Annotated[int, typer.Option("--samples", "-n", min=1, help="Calibration sequences.")]
LengthOption = Annotated[int, typer.Option("--length", "-l", min=2, help="Tokens per calibration sequence.")]
Sequential = Annotated[
    bool,
    typer.Option(
        "--sequential/--parallel",
        help="Calibrate each block on the outputs of the quantized blocks before it, or of the original ones.",
    ),
]
