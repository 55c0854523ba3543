"""What every command prints with: tables for people, plain lines for pipes, one JSON document for machines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

__all__ = ["JsonFlag", "print_fields", "print_json", "print_table", "quiet_stdout", "setup_logging", "size"]

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to whatever stderr is when a record arrives, so that redirection works."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_logging() -> None:
    """Send lowbit's log lines to stderr; does nothing the second time."""
    log = logging.getLogger("lowbit")
    if not any(isinstance(h, _StderrHandler) for h in log.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        log.addHandler(handler)
        log.propagate = False


@contextmanager
def quiet_stdout(json_output: bool) -> Iterator[None]:
    """While a command works under --json, what libraries print goes to stderr."""
    if not json_output:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def print_json(document: Any) -> None:
    """One JSON document, keys in the order given."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A rich table on a terminal, else aligned plain columns under one header line."""
    cells = [[str(c) for c in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text

        # In a narrow window cells go on in the next line; an ellipsis would hide what has to be typed.
        table = Table(*(Column(name, overflow="fold") for name in columns), title=title or None, header_style="bold")
        for row in cells:
            table.add_row(*(Text(c) for c in row))
        Console().print(table)
        return
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    for row in [list(columns), *cells]:
        typer.echo("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """`name  value` lines, aligned."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        typer.echo(f"{name.ljust(width)}  {value}")


def size(count: float) -> str:
    """Bytes for people, in powers of 1000: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
