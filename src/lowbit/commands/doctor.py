"""`quantize doctor`: what this machine can do."""

from __future__ import annotations

import sys

import typer

from lowbit.commands._output import JsonFlag, print_json, quiet_stdout

__all__ = ["doctor"]

_MARKS = {"ok": "ok", "missing": "--", "bad": "BAD"}
_STYLES = {"ok": "green", "missing": "yellow", "bad": "red"}


def doctor(json_output: JsonFlag = False) -> None:
    """Check CPU, compilers, libraries, cache, disk and GPU, with one line of advice for what is missing.

    Exits with 2 when lowbit cannot work here at all.
    """
    from lowbit.compiler.job.doctor import diagnose

    with quiet_stdout(json_output):
        checks = diagnose()
    broken = any(c.status == "bad" for c in checks)
    if json_output:
        print_json({"ok": not broken, "checks": [c.to_dict() for c in checks]})
    else:
        width = max(len(c.name) for c in checks)
        for c in checks:
            mark = _MARKS[c.status].ljust(3)
            if sys.stdout.isatty():
                mark = typer.style(mark, fg=_STYLES[c.status])
            typer.echo(f"{mark} {c.name.ljust(width)}  {c.detail}")
            if c.fix:
                typer.echo(f"    {' ' * width}  -> {c.fix}")
    if broken:
        raise typer.Exit(2)
