"""The blocks of a model on disk, one after the other, with everything that is finished in the journal.

Only one block's weights are in memory at a time; hidden states live in files. Every finished group of layers is in the
journal before the next begins.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from lowbit.compiler.errors import CheckpointError, LowbitError, RunError
from lowbit.compiler.io.source import ModelSource
from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import BlockCall, Trunk, linears_in, materialize, outside_modules, release
from lowbit.compiler.job.blockwise import States, run_tuned, run_untuned
from lowbit.compiler.job.engine import BlockEngine, Group, Meter
from lowbit.compiler.job.finetune import finetune
from lowbit.compiler.job.interrupt import Interrupt
from lowbit.compiler.job.journal import Journal, load_plain, load_qtensor, save_qtensors
from lowbit.compiler.job.layers import BATCH_TOKENS, ProgressSink, Selection
from lowbit.compiler.job.tail import quantize_outside
from lowbit.compiler.job.tune import TuneResult
from lowbit.compiler.job.twin import float_twin
from lowbit.compiler.job.workers import Workers
from lowbit.quantizers.inputs import LayerInput, input_hooks
from lowbit.quantizers.methods import Method, asymmetric, check_finite
from lowbit.quantizers.scheme import Tuning
from lowbit.quantizers.weights import QWeight

__all__ = ["BlockStream"]


@dataclass
class BlockStream:
    """One run over an open journal. `tokens` is None for methods that need no statistics. inputs: what layers do with
    their inputs; `rounding` calibrates on rounded ones."""

    source: ModelSource
    network: nn.Module
    selection: Selection
    method: Method
    tokens: Tensor | None
    journal: Journal
    sink: ProgressSink
    sequential: bool
    skip_first: int
    tune: Tuning | None = None
    finetune: Tuning | None = None
    workers: int = 1
    inputs: Mapping[str, LayerInput] = field(default_factory=dict)
    rounding: bool = False
    meter: Meter = field(default_factory=Meter)
    resumed: int = 0

    def run(self) -> None:
        """Everything up to the last quantized layer."""
        done = self.done()
        self.resumed = len(done)
        names = list(self.selection.formats)
        self.sink.start(len(names), names)
        try:
            if done:
                self.sink.message(f"continuing an interrupted run: {len(done)} of {len(names)} layers are done")
            elif not self.journal.records:
                self._preflight_or_leave_nothing()
            with Interrupt(self.sink) as interrupt, Workers(self.workers) as self._pool:
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
        needed = (4 if self.tune or self.finetune else 2) * codes + (
            4 if self._two_streams else 2
        ) * self._hidden_bytes()
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

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.source.names())

    def done(self) -> dict[str, Callable[[], QWeight]]:
        """Loaders of the layers the journal has, in their latest state: quantized, tuned, fine-tuned."""
        found: dict[str, Callable[[], QWeight]] = {}
        for record in self._saved():
            path = self.journal.folder / record["file"]
            for layer in record["layers"]:
                found[layer["path"]] = partial(load_qtensor, path, layer["path"])
        return found

    def plain(self) -> dict[str, Callable[[], Tensor]]:
        """Loaders of the other tensors that tuning changed, by name in the model."""
        found: dict[str, Callable[[], Tensor]] = {}
        for record in self._saved():
            path = self.journal.folder / record["file"]
            found.update({name: partial(load_plain, path, name) for name in record.get("plain", ())})
        return found

    def _saved(self) -> list[dict[str, Any]]:
        return [record for kind in ("group", "tuned", "finetuned") for record in self.journal.events(kind)]

    def _run_blocks(self, interrupt: Interrupt) -> None:
        for record in self._saved():
            self.journal.verified(record)
        blocks = self.selection.blocks
        calls: list[BlockCall] = []
        states: States | None = None
        passed = len(self.journal.events("block"))
        count = len(blocks.modules) if blocks else 0
        done = self.done()
        outside = any(path not in done for path in self.selection.outside)
        if self.tokens is not None and (passed < count or outside):
            calls, states = self._start()
        for index in range(passed, count):
            states = self._run_block(index, calls, states, interrupt)
        if outside:
            hidden = states.hidden if states else None
            quantize_outside(
                self.network, self.selection, self.method, self.tokens, hidden, self._load, self._saver(-1, interrupt),
                self.skip_first, self.inputs,
            )  # fmt: skip
        self._finetune()

    def _start(self) -> tuple[list[BlockCall], States]:
        """How blocks are called, and the hidden states that enter the first unfinished one."""
        assert self.tokens is not None
        assert self.selection.blocks is not None
        trunk = Trunk(self.network, self.selection.blocks)
        taken = self._materialize_around()
        calls = trunk.calls(self.tokens[:2])
        records = [*self.journal.events("embedded"), *self.journal.events("block")]
        states = States(**{name: self._reopen(s) for name, s in records[-1]["streams"].items()}) if records else None
        states = states or self._embed(trunk)
        self._release_around()
        self.meter.take(-taken)
        return calls, states

    def _reopen(self, stream: dict[str, Any]) -> Activations:
        path = self.journal.folder / stream["file"]
        hidden = Activations(tuple(stream["shape"]), self._batch, path, create=False)
        if hidden.digest() != stream["sha256"]:
            raise RunError("LB0534", "is damaged", where=str(path), hint="begin the run again with --restart")
        return hidden

    @property
    def _two_streams(self) -> bool:
        return self.tune is not None or asymmetric(self.method) > 0

    def _embed(self, trunk: Trunk) -> States:
        assert self.tokens is not None
        self.sink.message(f"embedding {len(self.tokens)} samples of {self.tokens.shape[1]} tokens")
        width = trunk.embed(self.tokens[:1]).shape[-1]
        states = self._states(0, (*self.tokens.shape, width))
        for samples in states.hidden.batches:
            embedded = trunk.embed(self.tokens[samples])
            for stream in states.streams.values():
                stream.write(samples, embedded)
        self._seal("embedded", -1, states)
        return states

    @property
    def _batch(self) -> int:
        assert self.tokens is not None
        return max(1, BATCH_TOKENS // self.tokens.shape[1])

    def _states(self, index: int, shape: tuple[int, ...]) -> States:
        samples, length, width = shape

        def stream(name: str) -> Activations:
            path = self.journal.folder / f"acts_{index:04d}{name}.bin"
            return Activations((samples, length, width), self._batch, path, create=True)

        return States(stream(""), stream("_reference") if self._two_streams else None)

    def _seal(self, event: str, block: int, states: States | None) -> None:
        streams = {}
        for name, stream in states.streams.items() if states else ():
            assert stream.path is not None
            streams[name] = {"file": stream.path.name, "sha256": stream.seal(), "shape": list(stream.shape)}
        self.journal.append({"event": event, "block": block, "streams": streams})

    def _materialize_around(self) -> int:
        """Weights of everything but the blocks and the output layer."""
        assert self.selection.blocks is not None
        head = getattr(self.network, "get_output_embeddings", lambda: None)()
        skip = [*self.selection.blocks.modules, *([head] if head is not None else [])]
        self._around = outside_modules(self.network, skip)
        taken = sum(materialize(m, name, self._load, recurse=False) for name, m in self._around)
        self.meter.take(taken)
        return taken

    def _release_around(self) -> None:
        for _, module in self._around:
            release(module, recurse=False)

    def _run_block(
        self, index: int, calls: list[BlockCall], inputs: States | None, interrupt: Interrupt
    ) -> States | None:
        blocks = self.selection.blocks
        assert blocks is not None
        block, name = blocks.modules[index], blocks.name(index)
        last = index + 1 == len(blocks.modules)
        unused = last and not self.selection.outside
        outputs = None
        if inputs is not None and not (unused and self.tune is None):
            outputs = self._states(index + 1, inputs.hidden.shape)
        taken = materialize(block, name, self._load)
        self.meter.take(taken)
        layers = linears_in(block, name)
        linears = {path: (layers[path], fmt) for path, fmt in self.selection.inside[index].items()}
        finished = self.done()
        done = {path: finished[path]() for path in linears if path in finished}
        engine = BlockEngine(
            self.method,
            self.sequential,
            self.skip_first,
            self.meter,
            self._saver(index, interrupt),
            self._pool,
            self.inputs,
        )
        reference = inputs.reference if inputs is not None and asymmetric(self.method) else None
        kept = float_twin(block, name, calls[index], reference, self.inputs) if reference else None
        rounding = self.rounding and self.tune is None
        with kept or nullcontext() as twin, input_hooks(layers, self.inputs, rounding=rounding):
            self.meter.take(taken if twin else 0)
            if inputs is None:
                engine.run_plain(linears, done)
            elif self.tune is not None and outputs is not None:
                tuned = self._tuned(index)
                result = run_tuned(engine, block, calls[index], linears, inputs, outputs, done, tuned, self.tune, twin)
                if tuned is None:
                    self._save_tuned("tuned", index, name, result)
            else:
                run_untuned(engine, block, calls[index], linears, inputs, outputs, done, twin)
            self.meter.take(-taken if twin else 0)
        release(block)
        self.meter.take(-taken)
        self._seal("block", index, None if unused else outputs)
        for stream in [
            *(inputs.streams.values() if inputs else ()),
            *(outputs.streams.values() if unused and outputs else ()),
        ]:
            if stream.path is not None:
                stream.path.unlink()
        return None if unused else outputs

    def _tuned(self, index: int) -> TuneResult | None:
        """What an interrupted run saved after tuning this block."""
        for record in self.journal.events("tuned"):
            if record["block"] == index:
                path = self.journal.folder / record["file"]
                weights = {layer["path"]: load_qtensor(path, layer["path"]) for layer in record["layers"]}
                prefix = f"{record['prefix']}."
                plain = {name.removeprefix(prefix): load_plain(path, name) for name in record["plain"]}
                return TuneResult(weights, plain, record["before"], record["after"])
        return None

    def _save_tuned(self, event: str, index: int, prefix: str, result: TuneResult) -> None:
        name = f"{event}_{index + 1:05d}.safetensors"
        plain = {f"{prefix}.{key}" if prefix else key: value for key, value in result.plain.items()}
        digest = self.journal.store(name, lambda path: save_qtensors(path, result.weights, plain))
        self.journal.append(
            {
                "event": event,
                "block": index,
                "prefix": prefix,
                "file": name,
                "sha256": digest,
                "layers": [{"path": path} for path in result.weights],
                "plain": list(plain),
                "before": result.before,
                "after": result.after,
            }
        )
        what = f"tuned {prefix}: error" if prefix else "fine-tuned: divergence"
        self.sink.message(f"{what} {result.before:.4g} -> {result.after:.4g}")

    def tuning_report(self) -> dict[str, Any]:
        """Mean relative error of blocks before and after tuning, and divergence before and after fine-tuning."""
        found: dict[str, Any] = {}
        for event in ("tuned", "finetuned"):
            if records := self.journal.events(event):
                found[event] = {key: sum(r[key] for r in records) / len(records) for key in ("before", "after")}
        return found

    def _finetune(self) -> None:
        """The whole model in memory, trained against itself."""
        if self.finetune is None or self.tokens is None or self.journal.events("finetuned"):
            return
        materialize(self.network, "", self._load)
        self.network.tie_weights()  # type: ignore[operator]
        weights = {path: load() for path, load in self.done().items()}
        plain = {name: load() for name, load in self.plain().items()}
        with input_hooks(linears_in(self.network, ""), self.inputs, rounding=False):
            result = finetune(self.network, weights, plain, self.tokens, self.finetune, self.sink.message)
        release(self.network)
        self._save_tuned("finetuned", -1, "", result)

    def _saver(self, index: int, interrupt: Interrupt) -> Callable[[Group], None]:
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
