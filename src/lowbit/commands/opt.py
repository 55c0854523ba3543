"""`quantize opt` and `quantize passes`: run compiler passes on IR text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.commands._output import JsonFlag, print_json, print_table, quiet_stdout

__all__ = ["opt", "passes"]


def opt(
    file: Annotated[Path, typer.Argument(help="IR text; - reads stdin.")],
    passes: Annotated[
        str, typer.Option("--passes", "-p", help='Such as "fuse-siblings,choose-layout{target=sm_90a}".')
    ] = "",
    print_after: Annotated[
        list[str] | None, typer.Option("--print-after", help="Print the module to stderr after this pass, or `all`.")
    ] = None,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Say how long each pass took, on stderr.")] = False,
    dump_ir: Annotated[Path | None, typer.Option("--dump-ir", help="Write the module after each pass here.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Read IR text, run passes, print IR text."""
    from lowbit.compiler.errors import IRError
    from lowbit.compiler.pipeline import parse_module, parse_passes, print_module, run_pipeline

    with quiet_stdout(json_output):
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise IRError("LB0350", f"cannot be read as IR text: {e}", where=str(file)) from e
        module = parse_module(text, str(file))
        steps = parse_passes(passes) if passes else []
        seconds = run_pipeline(
            module, steps, print_after=print_after or (), time_passes=time_passes, dump_ir=dump_ir, log=sys.stderr
        )
        result = print_module(module)
    if json_output:
        print_json({"passes": passes, "seconds": seconds, "module": result})
    else:
        typer.echo(result, nl=False)


def passes(json_output: JsonFlag = False) -> None:
    """List the compiler's passes in the order they run, with their options and defaults."""
    rows = _pass_rows()
    if json_output:
        print_json({"passes": rows})
        return
    table = [(r["name"], r["summary"], " ".join(f"{k}={v}" for k, v in r["options"].items())) for r in rows]
    print_table(("pass", "what it does", "options"), table)


def _pass_rows() -> list[dict[str, Any]]:
    from dataclasses import fields, is_dataclass

    from lowbit.compiler.pipeline import PASSES

    rows = []
    for name, cls in PASSES.items():
        doc = sys.modules[cls.__module__].__doc__ or ""
        options = {f.name.replace("_", "-"): str(f.default) for f in fields(cls)} if is_dataclass(cls) else {}
        rows.append({"name": name, "summary": doc.strip().split("\n")[0].removeprefix(f"{name}: "), "options": options})
    return rows
