"""`quantize eval`: perplexity, and KL divergence from a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.commands._options import ModelArgument
from lowbit.commands._output import JsonFlag, print_fields, print_json, quiet_stdout
from lowbit.commands._progress import window_progress

__all__ = ["evaluate"]


def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", "-t", help="UTF-8 text; tokenized once, cut into windows.")],
    windows: Annotated[int, typer.Option("--windows", "-w", min=1, help="Windows to run, from the start.")] = 16,
    length: Annotated[int, typer.Option("--length", "-l", min=2, help="Tokens per window.")] = 1024,
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", metavar="MODEL", help="Also KL(reference || MODEL).")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Perplexity of MODEL on a text, in float32, and KL divergence from --reference when given.

    The text is tokenized once without special tokens and cut into consecutive windows that do not overlap.
    """
    from lowbit.compiler.job import evaluate as job
    from lowbit.compiler.job.models import check_same_vocabulary, find_model

    with quiet_stdout(json_output):
        content = job.read_text(text)
        found = find_model(model)
        other = find_model(reference) if reference else None
        ids = job.tokenize(found.tokenizer(), content)
        cut = job.cut_windows(ids, windows, length, str(text))  # a text that is too short is refused before loading
        loaded, compared = found.load(), other.load() if other else None
        if compared is not None:
            check_same_vocabulary(loaded, compared)
        with window_progress(len(cut), json_output) as progress:
            result = job.evaluate(loaded, ids, windows, length, reference=compared, progress=progress)
    document: dict[str, Any] = {"model": model, "text": str(text), **result.to_dict(), "reference": reference}
    if json_output:
        print_json(document)
        return
    fields: list[tuple[str, object]] = [
        ("perplexity", f"{result.perplexity:.4f}"),
        ("nll", f"{result.nll:.5f} +- {result.stderr:.5f} nats per token (standard error over windows)"),
        ("tokens", f"{result.tokens} in {result.windows} windows of {result.length}"),
        ("seconds", f"{result.seconds:.1f} ({result.tokens_per_second:.0f} tokens/s)"),
    ]
    if result.kl:
        fields.append(
            ("KL to reference", f"mean {result.kl.mean:.6f}, p99 {result.kl.p99:.6f}, max {result.kl.max:.4f}")
        )
        fields.append(("same first choice", f"{100 * result.kl.same_top1:.2f} %"))
    print_fields(fields)
    if result.windows < windows:
        typer.echo(f"note: the text has only {result.windows} windows", err=True)
