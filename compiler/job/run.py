"""The quantization run: a model is read, quantized block by block and written, in bounded memory, journalled.

Only one block's weights are in memory at a time; hidden states live in files. Every finished group of layers is in the
journal before the next begins, so a run that was killed continues with the same command and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.compiler.errors import CheckpointError, LowbitError, RunError
from lowbit.compiler.io.checkpoint import stored_dtype, write_checkpoint
from lowbit.compiler.io.source import ModelSource, open_model
from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import BlockCall, Trunk, linears_in, materialize, release
from lowbit.compiler.job.engine import BlockEngine, Group, Meter
from lowbit.compiler.job.inmemory import quantize_model
from lowbit.compiler.job.journal import Journal, load_qtensor, save_qtensors
from lowbit.compiler.job.layers import (
    ProgressSink,
    Quiet,
    Selection,
    layer_totals,
    peak_rss,
    select_layers,
    versions,
)
from lowbit.compiler.job.tail import quantize_outside
from lowbit.quantizers.calibration import calibration_tokens
from lowbit.quantizers.methods import Method, check_finite, make_method
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.scheme import Scheme

__all__ = ["RunResult", "quantize_model", "run"]

_BATCH_TOKENS = 2048


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
    restart: bool = False,
    progress: ProgressSink | None = None,
    workdir: Path | None = None,
) -> RunResult:
    """Quantize a model (folder, GGUF file or hub id) and write the checkpoint folder `out`.

    calibration: see `calibration_tokens`; not used by methods that need no statistics. sequential: see `BlockEngine`.
    workdir: where the journal is kept while the run lasts; by default beside `out`. restart: forget an interrupted
    run. Raises CheckpointError (LB01xx), FormatError (LB02xx) and RunError (LB05xx); LB0530 when interrupted once by
    Ctrl-C, after the layers in work were saved.
    """
    sink = progress or Quiet()
    started = time.monotonic()
    method = make_method(scheme.method, scheme.options)
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
    tokens = None
    if method.needs_hessian:
        text = "pydoc" if calibration is None else calibration
        tokenizer = None if isinstance(text, Tensor) else source.tokenizer()
        tokens = calibration_tokens(tokenizer, text, samples, length, seed)
    settings = {
        "model": source.digest(),
        "scheme": scheme.to_dict(),
        "samples": len(tokens) if tokens is not None else 0,
        "length": tokens.shape[1] if tokens is not None else 0,
        "seed": seed,
        "sequential": sequential,
        "skip_first": skip_first,
        "calibration": _token_digest(tokens),
        **versions(),
    }
    with Journal(folder, settings, restart=restart) as journal:
        job = _Job(source, network, selection, method, tokens, journal, sink, sequential, skip_first)
        report = job.finished_report(out)
        if report is None:
            _refuse_occupied(out)
            job.run()
            report = job.report(model, scheme, calibration, time.monotonic() - started)
            job.write(out, scheme, report)
        journal.remove()
    return RunResult(out, report)


def _refuse_occupied(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            "LB0110", "already exists and is not an empty folder", where=str(out), hint="choose another output folder"
        )


def _token_digest(tokens: Tensor | None) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest() if tokens is not None else "none"


class _Interrupt:
    """Turns the first Ctrl-C into a flag that is looked at between layers; the second one interrupts at once."""

    def __init__(self, sink: ProgressSink) -> None:
        self.asked = False
        self._sink = sink
        self._before: Any = None
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Interrupt:
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._sink.message("stopping after this layer; press Ctrl-C again to stop now")

    def check(self, where: str) -> None:
        """Raise RunError (LB0530) when Ctrl-C was pressed."""
        if self.asked:
            raise RunError(
                "LB0530", f"stopped after {where}, everything up to there is saved",
                hint="run the same command again to continue",
            )  # fmt: skip


@dataclass
class _Job:
    """One run over an open journal."""

    source: ModelSource
    network: nn.Module
    selection: Selection
    method: Method
    tokens: Tensor | None
    journal: Journal
    sink: ProgressSink
    sequential: bool
    skip_first: int
    meter: Meter = field(default_factory=Meter)
    resumed: int = 0

    def run(self) -> None:
        """Everything up to the last quantized layer."""
        done = self._done()
        self.resumed = len(done)
        names = list(self.selection.formats)
        self.sink.start(len(names), names)
        try:
            if done:
                self.sink.message(f"continuing an interrupted run: {len(done)} of {len(names)} layers are done")
            elif not self.journal.records:
                self._preflight_or_leave_nothing()
            with _Interrupt(self.sink) as interrupt:
                self._run_blocks(interrupt)
        finally:
            self.sink.finish()

    def _preflight_or_leave_nothing(self) -> None:
        try:
            self._preflight()
        except LowbitError:
            self.journal.remove()
            raise

    def _preflight(self) -> None:
        """What would fail late is looked at first: values that are not finite, and room on the disk."""
        self.sink.message("checking the model's weights")
        for name in self.source.names():
            check_finite(self.source.tensor(name), name)
        codes = sum(fmt.nbytes(*self.selection.shapes[path]) for path, fmt in self.selection.formats.items())
        needed = 2 * codes + 2 * self._hidden_bytes()
        free = shutil.disk_usage(self.journal.folder).free
        if free < needed:
            raise CheckpointError(
                "LB0111",
                f"the run needs about {needed:,} bytes on disk, {free:,} are free",
                where=str(self.journal.folder),
                hint="free some space, or calibrate with fewer samples",
            )

    def _hidden_bytes(self) -> int:
        width = getattr(self.source.config, "hidden_size", 0) or 0
        return self.tokens.numel() * int(width) * 4 if self.tokens is not None else 0

    def _load(self, name: str) -> Tensor | None:
        return self.source.tensor(name) if name in self._names else None

    @property
    def _names(self) -> frozenset[str]:
        if not hasattr(self, "_name_set"):
            self._name_set = frozenset(self.source.names())
        return self._name_set

    def _done(self) -> dict[str, Callable[[], QTensor]]:
        """Loaders of the layers the journal has."""
        found: dict[str, Callable[[], QTensor]] = {}
        for record in self.journal.events("group"):
            path = self.journal.folder / record["file"]
            for layer in record["layers"]:
                found[layer["path"]] = partial(load_qtensor, path, layer["path"])
        return found

    def _run_blocks(self, interrupt: _Interrupt) -> None:
        for record in self.journal.events("group"):
            self.journal.verified(record)
        blocks = self.selection.blocks
        calls: list[BlockCall] = []
        hidden: Activations | None = None
        passed = len(self.journal.events("block"))
        count = len(blocks.modules) if blocks else 0
        done = self._done()
        outside = any(path not in done for path in self.selection.outside)
        if self.tokens is not None and (passed < count or outside):
            calls, hidden = self._start()
        for index in range(passed, count):
            hidden = self._run_block(index, calls, hidden, interrupt)
        if outside:
            quantize_outside(
                self.network, self.selection, self.method, self.tokens, hidden, self._load, self._saver(-1, interrupt),
                self.skip_first,
            )  # fmt: skip

    def _start(self) -> tuple[list[BlockCall], Activations]:
        """How blocks are called, and the hidden states that enter the first unfinished one."""
        assert self.tokens is not None
        assert self.selection.blocks is not None
        trunk = Trunk(self.network, self.selection.blocks)
        taken = self._materialize_around()
        calls = trunk.calls(self.tokens[:2])
        records = [*self.journal.events("embedded"), *self.journal.events("block")]
        if records:
            path = self.journal.folder / records[-1]["file"]
            hidden = Activations(tuple(records[-1]["shape"]), self._batch, path, create=False)
            if hidden.digest() != records[-1]["sha256"]:
                raise RunError("LB0534", "is damaged", where=str(path), hint="begin the run again with --restart")
        else:
            hidden = self._embed(trunk)
        self._release_around()
        self.meter.take(-taken)
        return calls, hidden

    def _embed(self, trunk: Trunk) -> Activations:
        assert self.tokens is not None
        self.sink.message(f"embedding {len(self.tokens)} samples of {self.tokens.shape[1]} tokens")
        width = trunk.embed(self.tokens[:1]).shape[-1]
        hidden = self._activations(0, (*self.tokens.shape, width))
        for samples in hidden.batches:
            hidden.write(samples, trunk.embed(self.tokens[samples]))
        self._seal("embedded", -1, hidden)
        return hidden

    @property
    def _batch(self) -> int:
        assert self.tokens is not None
        return max(1, _BATCH_TOKENS // self.tokens.shape[1])

    def _activations(self, index: int, shape: tuple[int, ...]) -> Activations:
        samples, length, width = shape
        return Activations(
            (samples, length, width), self._batch, self.journal.folder / f"acts_{index:04d}.bin", create=True
        )

    def _seal(self, event: str, block: int, hidden: Activations) -> None:
        assert hidden.path is not None
        digest = hidden.seal()
        self.journal.append(
            {"event": event, "block": block, "file": hidden.path.name, "sha256": digest, "shape": list(hidden.shape)}
        )

    def _materialize_around(self) -> int:
        """Weights of everything but the blocks and the output layer."""
        assert self.selection.blocks is not None
        head = getattr(self.network, "get_output_embeddings", lambda: None)()
        skip = [*self.selection.blocks.modules, *([head] if head is not None else [])]
        self._around = _outside_modules(self.network, skip)
        taken = sum(materialize(m, name, self._load, recurse=False) for name, m in self._around)
        self.meter.take(taken)
        return taken

    def _release_around(self) -> None:
        for _, module in self._around:
            release(module, recurse=False)

    def _run_block(
        self, index: int, calls: list[BlockCall], inputs: Activations | None, interrupt: _Interrupt
    ) -> Activations | None:
        blocks = self.selection.blocks
        assert blocks is not None
        block, name = blocks.modules[index], blocks.name(index)
        last = index + 1 == len(blocks.modules)
        outputs = None
        if inputs is not None and not (last and not self.selection.outside):
            outputs = self._activations(index + 1, inputs.shape)
        taken = materialize(block, name, self._load)
        self.meter.take(taken)
        layers = linears_in(block, name)
        linears = {path: (layers[path], fmt) for path, fmt in self.selection.inside[index].items()}
        finished = self._done()
        done = {path: finished[path]() for path in linears if path in finished}
        engine = BlockEngine(self.method, self.sequential, self.skip_first, self.meter, self._saver(index, interrupt))
        if inputs is None:
            engine.run_plain(linears, done)
        else:
            engine.run(block, calls[index], linears, inputs, outputs, done)
        release(block)
        self.meter.take(-taken)
        if outputs is not None:
            self._seal("block", index, outputs)
            if inputs is not None and inputs.path is not None:
                inputs.path.unlink()
        else:
            self.journal.append({"event": "block", "block": index, "file": "", "sha256": "", "shape": []})
        return outputs

    def _saver(self, index: int, interrupt: _Interrupt) -> Callable[[Group], None]:
        """Saves a finished group, reports it, and stops the run when that was asked for."""

        def save(group: Group) -> None:
            number = len(self.journal.events("group"))
            name = f"group_{number:05d}.safetensors"
            digest = self.journal.store(name, lambda path: save_qtensors(path, {p: q for p, (q, _) in group.items()}))
            layers = [entry.to_dict() for _, entry in group.values()]
            self.journal.append({"event": "group", "block": index, "file": name, "sha256": digest, "layers": layers})
            count = sum(len(r["layers"]) for r in self.journal.events("group"))
            for i, layer in enumerate(layers, count - len(layers) + 1):
                self.sink.layer(i, len(self.selection.formats), layer["path"], layer)
            interrupt.check(layers[-1]["path"])

        return save

    def report(self, model: str, scheme: Scheme, calibration: Any, seconds: float) -> dict[str, Any]:
        """The run's figures."""
        by_path = {layer["path"]: layer for r in self.journal.events("group") for layer in r["layers"]}
        layers = [by_path[path] for path in self.selection.formats]
        kept = [n for n in self.source.names() if n.removesuffix(".weight") not in by_path]
        sizes = [(torch.Size(self.source.shape(n)).numel(), stored_dtype(self.source, n).itemsize) for n in kept]
        named = calibration if isinstance(calibration, str | Path) else "given"
        return {
            "model": self.source.origin or model,
            "run": self.journal.digest,
            "scheme": scheme.to_dict(),
            "calibration": {
                "source": str(named) if self.tokens is not None else "none",
                **{k: self.journal.settings[k] for k in ("samples", "length", "seed", "skip_first")},
                "mode": "sequential" if self.sequential else "parallel",
                "sha256": self.journal.settings["calibration"],
            },
            "totals": layer_totals(layers, 8 * sum(n * b for n, b in sizes), sum(n for n, _ in sizes)),
            "peak_memory": {"process_bytes": peak_rss(), "tensor_bytes": self.meter.peak},
            "seconds": round(seconds, 1),
            "resumed_layers": self.resumed,
            "versions": versions(),
            "notes": [*self.source.notes, *self.selection.notes, *_aggregate(layers)],
            "layers": layers,
        }

    def write(self, out: Path, scheme: Scheme, report: Mapping[str, Any]) -> None:
        """Write the checkpoint. The journal says so first, so that a kill after the rename is understood."""
        if not self.journal.events("writing"):
            self.journal.append({"event": "writing"})
        write_checkpoint(out, self.source, self._done(), scheme, report=report)

    def finished_report(self, out: Path) -> dict[str, Any] | None:
        """The report of `out` when this very run wrote it and was killed before it could clean up."""
        if self.journal.events("writing"):
            for stale in out.parent.glob(f".{out.name}.partial-*"):  # of the writer that was killed
                shutil.rmtree(stale, ignore_errors=True)
            with suppress(OSError, ValueError):
                report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
                if report.get("run") == self.journal.digest:
                    return report
        return None


def _outside_modules(network: nn.Module, skip: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Modules that are neither in `skip` nor below one of them."""
    hidden = {id(m) for top in skip for m in top.modules()}
    return [(name, m) for name, m in network.named_modules() if id(m) not in hidden]


def _aggregate(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes of layers, one line per kind of note."""
    counts: dict[str, list[str]] = {}
    for layer in layers:
        for note in layer["notes"]:
            words = ["N" if w.isdigit() else w for w in note.split()]
            counts.setdefault(" ".join(words), []).append(layer["path"])
    return [f"{len(paths)} layers, such as {paths[0]}: {note}" for note, paths in counts.items()]
