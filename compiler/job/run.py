"""The quantization run: a model is read, quantized block by block and written, in bounded memory, journalled.

Only one block's weights are in memory at a time; hidden states live in files. Every finished group of layers is in the
journal before the next begins, so a run that was killed continues with the same command and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.checkpoint import stored_dtype, write_checkpoint
from lowbit.compiler.io.source import open_model
from lowbit.compiler.io.write import explain_os_errors
from lowbit.compiler.job.inmemory import quantize_model
from lowbit.compiler.job.journal import Journal
from lowbit.compiler.job.layers import (
    ProgressSink,
    Quiet,
    layer_totals,
    peak_rss,
    select_layers,
    versions,
)
from lowbit.compiler.job.prepare import (
    Prepared,
    SourceHost,
    calibrates,
    check_inputs,
    ordered,
    prepare_source,
    stored_inputs,
)
from lowbit.compiler.job.stream import BlockStream
from lowbit.quantizers.calibration import calibration_tokens
from lowbit.quantizers.methods import Fmpq, asymmetric, in_mode, make_method
from lowbit.quantizers.rewrites import rewrite_text
from lowbit.quantizers.scheme import Scheme

__all__ = ["RunResult", "quantize_model", "run"]


@dataclass(frozen=True)
class RunResult:
    """Where the checkpoint is, and the report: `layers` (see `LayerEntry`), `totals`, `peak_memory`, settings."""

    out: Path
    report: dict[str, Any]


def run(
    model: str,
    out: Path,
    scheme: Scheme,
    calibration: str | Path | Sequence[str] | Tensor | None = "pydoc",
    *,
    samples: int = 128,
    length: int = 512,
    sequential: bool = True,
    seed: int = 0,
    skip_first: int = 0,
    workers: int = 1,
    restart: bool = False,
    progress: ProgressSink | None = None,
    workdir: Path | None = None,
) -> RunResult:
    """Quantize a model (folder, GGUF file or hub id) and write the checkpoint folder `out`.

    calibration: see `calibration_tokens`; not used by methods that need no statistics. sequential: see `BlockEngine`.
    workers: processes that quantize independent matrices; results do not depend on their number. workdir: where the
    journal is kept while the run lasts; by default beside `out`. restart: forget an interrupted
    run. Raises CheckpointError (LB01xx), FormatError (LB02xx) and RunError (LB05xx); LB0530 when interrupted once by
    Ctrl-C, after the layers in work were saved.
    """
    sink = progress or Quiet()
    started = time.monotonic()
    method = in_mode(make_method(scheme.method, scheme.options), sequential)
    source = open_model(model)
    network = source.empty_model()
    stored = set(source.names())
    selection = select_layers(
        network, scheme, lambda path: f"{path}.weight" in stored, need_blocks=method.needs_hessian
    )
    out = out.expanduser().resolve()
    folder = (workdir or out.parent / f".{out.name}.lowbit-run").expanduser().resolve()
    if not folder.exists():
        _refuse_occupied(out)
    check_inputs(scheme, method, selection.formats, selection.shapes)
    tokens = None
    if method.needs_hessian or calibrates(scheme, method, list(selection.formats)):
        text = "pydoc" if calibration is None else calibration
        tokenizer = None if isinstance(text, Tensor) else source.tokenizer()
        tokens = calibration_tokens(tokenizer, text, samples, length, seed)
    settings = {
        "model": source.digest(),
        "scheme": {**scheme.to_dict(), "overrides": [list(o) for o in scheme.to_dict()["overrides"].items()]},
        "samples": len(tokens) if tokens is not None else 0,
        "length": tokens.shape[1] if tokens is not None else 0,
        "seed": seed,
        "sequential": sequential,
        "skip_first": skip_first,
        "asymmetric": asymmetric(method),
        "calibration": _token_digest(tokens),
        **versions(),
    }
    kept = "finished layers are kept for the same command"
    with explain_os_errors(out, kept=kept), Journal(folder, settings, restart=restart) as journal:
        report = _finished_report(out, journal)
        if report is None:
            _refuse_occupied(out)
            host = SourceHost(source, tokens, sink, folder)
            prepared = prepare_source(host, network, selection, scheme, method, journal)
            if host.source is not source:
                source = host.source
                network = source.empty_model()
                names = set(source.names())
                selection = select_layers(
                    network, scheme, lambda path: f"{path}.weight" in names, need_blocks=method.needs_hessian
                )
            stream = BlockStream(
                source,
                network,
                selection,
                method,
                tokens if method.needs_hessian else None,
                journal,
                sink,
                sequential,
                skip_first,
                scheme.tune,
                scheme.finetune,
                workers,
                prepared.inputs,
                isinstance(method, Fmpq) and method.aware,
            )
            stream.run()
            named = str(calibration) if isinstance(calibration, str | Path) else "given"
            report = _report(
                stream, prepared, scheme, named if tokens is not None else "none", time.monotonic() - started
            )
            if not journal.events("writing"):  # so that a kill after the checkpoint is in place is understood
                journal.append({"event": "writing"})
            formats = {p: ordered(fmt, prepared.inputs.get(p)) for p, fmt in selection.formats.items()}
            write_checkpoint(
                out, source, stream.done(), scheme,
                report=report, replaced=stream.plain(), formats=formats, inputs=stored_inputs(prepared.inputs),
            )  # fmt: skip
        journal.remove()
    return RunResult(out, report)


def _refuse_occupied(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            "LB0110", "already exists and is not an empty folder", where=str(out), hint="choose another output folder"
        )


def _token_digest(tokens: Tensor | None) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest() if tokens is not None else "none"


def _finished_report(out: Path, journal: Journal) -> dict[str, Any] | None:
    """The report of `out` when this very run wrote it and was killed before it could clean up."""
    if journal.events("writing"):
        for stale in out.parent.glob(f".{out.name}.partial-*"):  # of the writer that was killed
            shutil.rmtree(stale, ignore_errors=True)
        with suppress(OSError, ValueError):
            report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
            if report.get("run") == journal.digest:
                return report
    return None


def _report(
    stream: BlockStream, prepared: Prepared, scheme: Scheme, calibration: str, seconds: float
) -> dict[str, Any]:
    """The run's figures."""
    source, journal = stream.source, stream.journal
    by_path = {layer["path"]: layer for r in journal.events("group") for layer in r["layers"]}
    layers = [by_path[path] for path in stream.selection.formats]
    kept = [n for n in source.names() if n.removesuffix(".weight") not in by_path]
    sizes = [(torch.Size(source.shape(n)).numel(), stored_dtype(source, n).itemsize) for n in kept]
    settings = journal.settings
    return {
        "model": source.origin,
        "run": journal.digest,
        "scheme": scheme.to_dict(),
        "calibration": {
            "source": calibration,
            **{k: settings[k] for k in ("samples", "length", "seed", "skip_first", "asymmetric")},
            "mode": "sequential" if stream.sequential else "parallel",
            "sha256": settings["calibration"],
        },
        "totals": layer_totals(layers, 8 * sum(n * b for n, b in sizes), sum(n for n, _ in sizes)),
        "peak_memory": {"process_bytes": peak_rss(), "tensor_bytes": stream.meter.peak},
        "seconds": round(seconds, 1),
        "resumed_layers": stream.resumed,
        "tuning": stream.tuning_report(),
        **_activation_report(prepared, scheme, layers),
        "versions": versions(),
        "notes": [*source.notes, *stream.selection.notes, *_counted(prepared.notes), *_aggregate(layers)],
        "layers": layers,
    }


def _activation_report(
    prepared: Prepared, scheme: Scheme, layers: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What inputs are rounded to, over all layers, and how the model was rewritten; nothing where neither was done."""
    found: dict[str, dict[str, Any]] = {}
    if prepared.share is not None:
        columns = sum(layer["shape"][1] for layer in layers)
        found["activations"] = {
            "format": str(scheme.activation),
            "bits_per_value": sum(layer["activation_bits"] * layer["shape"][1] for layer in layers) / max(1, columns),
            "share_of_8_bits": prepared.share,
        }
    if scheme.rewrites:
        found["rewrites"] = {"done": [rewrite_text(r) for r in scheme.rewrites], "declined": list(prepared.notes)}
    return {**found, **({"kv": {"format": str(scheme.kv)}} if scheme.kv is not None else {})}


def _counted(notes: Sequence[str]) -> list[str]:
    """Notes that begin with a module path, one line per kind."""
    return _aggregate([{"path": n.partition(" ")[0], "notes": [n.partition(" ")[2]]} for n in notes])


def _aggregate(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes of layers, one line per kind of note."""
    counts: dict[str, list[str]] = {}
    for layer in layers:
        for note in layer["notes"]:
            words = ["N" if w.isdigit() else w for w in note.split()]
            counts.setdefault(" ".join(words), []).append(layer["path"])
    return [f"{len(paths)} layers, such as {paths[0]}: {note}" for note, paths in counts.items()]
