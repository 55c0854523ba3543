"""The blocks of a model on disk, one after the other, with everything that is finished in the journal.

Only one block's weights are in memory at a time; hidden states live in files. Every finished group of layers is in the
journal before the next begins.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from torch import Tensor, nn

from lowbit.compiler.errors import CheckpointError, LowbitError, RunError
from lowbit.compiler.io.source import ModelSource
from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import BlockCall, Trunk, linears_in, materialize, release
from lowbit.compiler.job.engine import BlockEngine, Group, Meter
from lowbit.compiler.job.interrupt import Interrupt
from lowbit.compiler.job.journal import Journal, load_qtensor, save_qtensors
from lowbit.compiler.job.layers import BATCH_TOKENS, ProgressSink, Selection
from lowbit.compiler.job.tail import quantize_outside
from lowbit.quantizers.methods import Method, check_finite
from lowbit.quantizers.qtensor import QTensor

__all__ = ["BlockStream"]


@dataclass
class BlockStream:
    """One run over an open journal. `tokens` is None for methods that need no statistics."""

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
        done = self.done()
        self.resumed = len(done)
        names = list(self.selection.formats)
        self.sink.start(len(names), names)
        try:
            if done:
                self.sink.message(f"continuing an interrupted run: {len(done)} of {len(names)} layers are done")
            elif not self.journal.records:
                self._preflight_or_leave_nothing()
            with Interrupt(self.sink) as interrupt:
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

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.source.names())

    def done(self) -> dict[str, Callable[[], QTensor]]:
        """Loaders of the layers the journal has."""
        found: dict[str, Callable[[], QTensor]] = {}
        for record in self.journal.events("group"):
            path = self.journal.folder / record["file"]
            for layer in record["layers"]:
                found[layer["path"]] = partial(load_qtensor, path, layer["path"])
        return found

    def _run_blocks(self, interrupt: Interrupt) -> None:
        for record in self.journal.events("group"):
            self.journal.verified(record)
        blocks = self.selection.blocks
        calls: list[BlockCall] = []
        hidden: Activations | None = None
        passed = len(self.journal.events("block"))
        count = len(blocks.modules) if blocks else 0
        done = self.done()
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
        return max(1, BATCH_TOKENS // self.tokens.shape[1])

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
        self, index: int, calls: list[BlockCall], inputs: Activations | None, interrupt: Interrupt
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
        finished = self.done()
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


def _outside_modules(network: nn.Module, skip: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Modules that are neither in `skip` nor below one of them."""
    hidden = {id(m) for top in skip for m in top.modules()}
    return [(name, m) for name, m in network.named_modules() if id(m) not in hidden]
