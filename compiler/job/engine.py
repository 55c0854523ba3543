"""One block: run calibration through it, quantize its linear layers, and compute what the next block will see.

parallel: one pass collects the statistics of all layers from the float block, whose outputs go to the next block.
sequential: layers are quantized in order of dependency, statistics are collected again after each group of layers
that share an input, and the quantized block's outputs go on, so that later layers can make up for earlier errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import BlockCall
from lowbit.compiler.job.twin import FloatTwin
from lowbit.compiler.job.workers import Result, Workers
from lowbit.quantizers.calibration import Coverage, InputGroups, LayerStats
from lowbit.quantizers.formats import WeightFormat
from lowbit.quantizers.inputs import LayerInput
from lowbit.quantizers.methods import Method, Quantized
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.weights import QWeight

__all__ = ["BlockEngine", "Group", "LayerEntry", "Meter", "entry", "known_entry"]


_WORK_BYTES = 64  # per entry of a Hessian: float64 copies while it is factored, float32 ones while it is used
_SHIFT_BYTES = 36  # the same of a shift: itself, a damped Hessian, its factor, the solution, and that in float32


@dataclass
class Meter:
    """Bytes of tensors a run holds at a time: what is there now, and the most there was."""

    now: int = 0
    peak: int = 0

    def take(self, nbytes: int) -> None:
        """Note that `nbytes` were allocated (negative: freed)."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class LayerEntry:
    """A report line: proxy_error and rtn_error as in `Quantized`, seconds spent choosing codes. activation: what inputs
    are rounded to, and its bits per number with scales (16 and an empty text where they are not)."""

    path: str
    format: str
    shape: tuple[int, int]
    bits_per_weight: float
    proxy_error: float
    rtn_error: float
    seconds: float
    tokens: int
    dead_channels: int
    notes: tuple[str, ...]
    activation: str = ""
    activation_bits: float = 16.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "shape": list(self.shape), "notes": list(self.notes)}


Group = dict[str, tuple[QWeight, LayerEntry]]
"""Finished layers that share an input, by module path."""


@dataclass
class BlockEngine:
    """Quantizes blocks with one method.

    finished: called after every group of layers that share an input, with their results; the place where a run saves
    them, reports progress, and may stop by raising. workers: processes that quantize independent matrices. inputs: what
    layers do with their inputs; where a layer has an order, that is the order of its matrix's columns.
    """

    method: Method
    sequential: bool = True
    skip_first: int = 0
    meter: Meter = field(default_factory=Meter)
    finished: Callable[[Group], None] = lambda group: None
    workers: Workers = field(default_factory=Workers)
    inputs: Mapping[str, LayerInput] = field(default_factory=dict)

    def run(
        self,
        block: nn.Module,
        call: BlockCall,
        linears: Mapping[str, tuple[nn.Linear, WeightFormat]],
        inputs: Activations,
        outputs: Activations | None,
        done: Mapping[str, QWeight],
        twin: FloatTwin | None = None,
    ) -> None:
        """Quantize `linears` (path -> layer and its format) of a block whose weights are loaded in float32.

        done: layers finished before, which are put in place without being computed again. outputs: where the next
        block's inputs go (None after the last block). twin: for asymmetric methods, in sequential mode.
        """
        modules = {path: linear for path, (linear, _) in linears.items()}
        order = self._grouping(block, call, modules, inputs)
        with torch.no_grad():
            if self.sequential:
                self._sequential(block, call, linears, modules, inputs, outputs, order, done, twin)
            else:
                self._parallel(block, call, linears, modules, inputs, outputs, order, done)

    def run_plain(self, linears: Mapping[str, tuple[nn.Linear, WeightFormat]], done: Mapping[str, QWeight]) -> None:
        """Quantize a block's layers without any calibration."""
        group = [path for path in linears if path not in done]
        if group:
            self.quantize_group(group, linears, None)

    def _grouping(
        self, block: nn.Module, call: BlockCall, modules: Mapping[str, nn.Module], inputs: Activations
    ) -> list[list[str]]:
        """Layers by shared input, in order of first use; layers that are never called come last, one by one."""
        groups = InputGroups(modules)
        with groups, torch.no_grad():
            call(block, inputs.read(slice(0, 1)))
        seen = {path for group in groups.order for path in group}
        return [*groups.order, *([path] for path in modules if path not in seen)]

    def _sequential(
        self,
        block: nn.Module,
        call: BlockCall,
        linears: Mapping[str, tuple[nn.Linear, WeightFormat]],
        modules: Mapping[str, nn.Module],
        inputs: Activations,
        outputs: Activations | None,
        order: list[list[str]],
        done: Mapping[str, QWeight],
        twin: FloatTwin | None,
    ) -> None:
        for index, group in enumerate(order):
            if not all(path in done for path in group):
                stats = self._collect(block, call, modules, inputs, order, [index], None, twin)
                self.quantize_group(group, linears, stats.get(index))
            for path in group:
                if path in done:
                    _put(modules[path], done[path])
        if outputs is not None:
            for samples, hidden in inputs:
                outputs.write(samples, call(block, hidden))

    def _parallel(
        self,
        block: nn.Module,
        call: BlockCall,
        linears: Mapping[str, tuple[nn.Linear, WeightFormat]],
        modules: Mapping[str, nn.Module],
        inputs: Activations,
        outputs: Activations | None,
        order: list[list[str]],
        done: Mapping[str, QWeight],
    ) -> None:
        missing = [i for i, group in enumerate(order) if not all(path in done for path in group)]
        stats = self._collect(block, call, modules, inputs, order, missing, outputs)
        waiting = [(order[i], self._submit(order[i], linears, stats.get(i)), stats.pop(i, None)) for i in missing]
        while waiting:
            self._finish_group(*waiting.pop(0), linears)  # popped, so that its statistics go when it is done

    def _collect(
        self,
        block: nn.Module,
        call: BlockCall,
        modules: Mapping[str, nn.Module],
        inputs: Activations,
        order: list[list[str]],
        wanted: Sequence[int],
        outputs: Activations | None,
        twin: FloatTwin | None = None,
    ) -> dict[int, LayerStats]:
        """Statistics of the wanted groups (of one, if there is a twin); the block's outputs too when `outputs` is
        given."""
        if not wanted and outputs is None:
            return {}
        groups = InputGroups(modules, self.skip_first, [list(g) for g in order], wanted, outputs is None)
        with groups:
            for samples, hidden in inputs:
                groups.start()
                groups.reference = twin.reads(order[wanted[0]][0], samples) if twin is not None else None
                try:
                    result = call(block, hidden)
                except InputGroups.Done:
                    continue
                if outputs is not None:
                    outputs.write(samples, result)
        held = sum(a.nbytes for a in groups.accumulators.values())
        self.meter.take(held)
        self.meter.take(-held)
        return {index: a.stats() for index, a in groups.accumulators.items() if a.tokens}

    def quantize_group(
        self, group: Sequence[str], linears: Mapping[str, tuple[nn.Linear, WeightFormat]], stats: LayerStats | None
    ) -> None:
        """Quantize layers that share statistics, replace their weights when sequential, and hand the results on."""
        self._finish_group(group, self._submit(group, linears, stats), stats, linears)

    def _submit(
        self, group: Sequence[str], linears: Mapping[str, tuple[nn.Linear, WeightFormat]], stats: LayerStats | None
    ) -> list[Result]:
        waiting: list[Result] = []
        stats_by_order: dict[int, LayerStats | None] = {}
        for path in group:
            weight, fmt, order = linears[path][0].weight.detach(), linears[path][1], self._order(path)
            known = stats
            if order is not None:
                weight = weight[:, order]
                if id(order) not in stats_by_order:
                    stats_by_order[id(order)] = stats.in_order(order) if stats is not None else None
                known = stats_by_order[id(order)]
            waiting.append(self.workers.submit(self.method, weight, fmt, known))
        return waiting

    def _order(self, path: str) -> Tensor | None:
        return self.inputs[path].order if path in self.inputs else None

    def _finish_group(
        self,
        group: Sequence[str],
        waiting: Sequence[Result],
        stats: LayerStats | None,
        linears: Mapping[str, tuple[nn.Linear, WeightFormat]],
    ) -> None:
        results: Group = {}
        held = 0
        for path, wait in zip(group, waiting, strict=True):
            quantized, seconds = wait()
            order = self._order(path)
            if order is not None:
                assert isinstance(quantized.qtensor, QTensor)
                quantized = replace(quantized, qtensor=quantized.qtensor.in_order(order))
            results[path] = (quantized.qtensor, entry(path, quantized, stats, seconds, self.inputs.get(path)))
            held += quantized.qtensor.fmt.nbytes(*quantized.qtensor.shape)
        if self.sequential:
            for path, (qtensor, _) in results.items():
                _put(linears[path][0], qtensor)
        each = 0 if stats is None else _WORK_BYTES + (_SHIFT_BYTES if stats.shift is not None else 0)
        worked = each * stats.hessian.numel() if stats is not None else 0
        self.meter.take(held + worked)
        self.finished(results)
        self.meter.take(-held - worked)


def entry(
    path: str, quantized: Quantized, stats: LayerStats | None, seconds: float, what: LayerInput | None = None
) -> LayerEntry:
    """The report line of a layer."""
    notes, coverage = list(quantized.notes), None
    if stats is not None:
        coverage = Coverage.of(stats)
        warning = coverage.warning()
        if warning and not coverage.dead:
            notes.append(warning)
    q = quantized.qtensor
    return LayerEntry(
        path,
        str(q.fmt),
        q.shape,
        q.bits_per_weight,
        quantized.proxy_error,
        quantized.rtn_error,
        round(seconds, 3),
        coverage.tokens if coverage else 0,
        coverage.dead if coverage else 0,
        tuple(notes),
        *_rounding(what, q.shape[1]),
    )


def _rounding(what: LayerInput | None, k: int) -> tuple[str, float]:
    fmt = what.format if what is not None else None
    return ("", 16.0) if fmt is None else (str(fmt), fmt.bits_per_value(k))


def known_entry(path: str, q: QWeight) -> LayerEntry:
    """The report line of a layer whose quantized weight was given."""
    return LayerEntry(path, str(q.fmt), q.shape, q.bits_per_weight, math.nan, math.nan, 0.0, 0, 0, ("was given",))


def _put(linear: nn.Module, qtensor: QWeight) -> None:
    """Replace a layer's weight by what its codes stand for."""
    assert isinstance(linear, nn.Linear)
    linear.weight.data.copy_(qtensor.dequantize())
