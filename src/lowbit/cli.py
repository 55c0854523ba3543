"""The `quantize` command.

Exit codes: 0 done; 1 unexpected error (a defect: run again with --debug for the traceback); 2 refused (bad input or
usage, one line says why); 3 the plan says it cannot work; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lowbit import __version__
from lowbit.commands import _output
from lowbit.commands.convert import convert
from lowbit.commands.doctor import doctor
from lowbit.commands.eval import evaluate
from lowbit.commands.explain import explain
from lowbit.commands.export import export
from lowbit.commands.formats import formats, schemes
from lowbit.commands.inspect import inspect
from lowbit.commands.opt import opt, passes
from lowbit.commands.plan import plan
from lowbit.commands.run import run
from lowbit.commands.tune import tune
from lowbit.compiler.errors import LowbitError

__all__ = ["EXIT_ERROR", "EXIT_IMPOSSIBLE", "EXIT_INTERRUPTED", "EXIT_REFUSED", "app", "main"]

EXIT_ERROR, EXIT_REFUSED, EXIT_IMPOSSIBLE, EXIT_INTERRUPTED = 1, 2, 3, 130

_STOPPED = "LB0530"  # a run that was asked to stop, saved what it had, and did


class _Group(TyperGroup):
    """Turns exceptions of any command into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LowbitError as e:
            stopped = e.code == _STOPPED
            _fail(ctx, e.render() if stopped else f"error {e.render()}", EXIT_INTERRUPTED if stopped else EXIT_REFUSED)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; the same command continues where it stopped", EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader of a pipe left (`quantize formats | head`): not an error, and nobody to tell.
            sys.stdout = open(os.devnull, "w")
            raise typer.Exit(0) from None
        except Exception as e:
            if type(e).__module__.startswith(("typer", "click")):
                raise  # usage errors and exits, which typer reports itself
            what = " ".join(str(e).split())
            _fail(ctx, f"error: unexpected {type(e).__name__}: {what} (--debug shows where)", EXIT_ERROR)


def _fail(ctx: Any, line: str, code: int) -> None:
    if ctx.params.get("debug"):
        traceback.print_exc()
    typer.echo(line, err=True)
    raise typer.Exit(code) from None


app = typer.Typer(
    name="quantize",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a model small and fast: choose its quantized values, compile kernels for them, and export it.",
    epilog="Exit codes: 0 done, 1 unexpected error, 2 refused, 3 the plan is impossible, 130 interrupted.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lowbit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LOWBIT_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    # Must be set before transformers is imported; its progress bars and advice would drown ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Read when torch is loaded. Threads that spin while they wait make a machine with other work on it crawl: GPTQ was
    # measured 16 times slower on two shared cores, against 1.1 times slower without spinning on idle ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _output.setup_logging()


app.command("run")(run)
app.command("plan")(plan)
app.command("export")(export)
app.command("convert")(convert)
app.command("explain")(explain)
app.command("eval")(evaluate)
app.command("inspect")(inspect)
app.command("formats")(formats)
app.command("schemes")(schemes)
app.command("opt")(opt)
app.command("passes")(passes)
app.command("tune")(tune)
app.command("doctor")(doctor)


def main() -> None:
    """Entry point of the `quantize` script."""
    app()


if __name__ == "__main__":
    main()
