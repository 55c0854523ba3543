"""Timing kernels as a model meets them: with cold weights, in turns, by medians.

Every call reads another copy of the weights, and all copies together are several times the last-level cache. On CPUs a
burst of calls is timed by the clock. On GPUs all calls are captured into one CUDA graph and its replays are timed with
events, so that launch gaps of Python are not in it. Candidates take turns, burst by burst, so that a machine that slows
down slows them all.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["Burst", "copies_of", "cpu_burst", "graph_burst", "race", "seconds_of"]

Burst = Callable[[], float]
"""Runs a kernel some times; returns mean seconds of a call."""

_BURST_S = 2e-3  # seconds of one burst on a CPU: long against the clock, short against changes of the machine's load
_LEAST_COPIES, _MOST_COPIES = 4, 1024
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 40
_LEAST_TURNS = 7  # of a race: what it settles is kept
_HOPELESS = 1.3  # times the best median: what is slower after a few rounds is not measured further


def copies_of(weight: PackedWeight, total: int) -> list[PackedWeight]:
    """The weight and copies of it, about `total` bytes together, at least 4."""
    count = min(max(_LEAST_COPIES, math.ceil(total / max(weight.nbytes(), 1))), _MOST_COPIES)
    copies = [{name: t.clone() for name, t in weight.tensors.items()} for _ in range(count - 1)]
    return [weight, *[replace(weight, tensors=tensors) for tensors in copies]]


def cpu_burst(call: Callable[[PackedWeight], object], weights: Iterator[PackedWeight]) -> Burst:
    """Bursts of about two milliseconds. `weights` goes round the copies, and may be shared by candidates: then each
    goes on where the one before it stopped."""
    count = 0

    def run(calls: int) -> float:
        begin = time.perf_counter()
        for weight in itertools.islice(weights, calls):
            call(weight)
        return (time.perf_counter() - begin) / calls

    def burst() -> float:
        nonlocal count
        if not count:
            count = max(1, min(1000, int(_BURST_S / max(run(1), 1e-7))))
        return run(count)

    return burst


def graph_burst(calls: Sequence[Callable[[], object]]) -> Burst:
    """Replays of one CUDA graph that makes all `calls` once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()

    def burst() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / len(calls)

    return burst


def seconds_of(burst: Burst, budget_s: float = 0.05) -> float:
    """Median seconds of a call, over bursts that take about `budget_s` together."""
    taken, begin = [burst()], time.perf_counter()
    while len(taken) < _LEAST_ROUNDS or (len(taken) < _MOST_ROUNDS and time.perf_counter() - begin < budget_s):
        taken.append(burst())
    return statistics.median(taken)


def race(bursts: Sequence[Burst], budget_s: float, before: Callable[[int], None] = lambda _: None) -> list[float]:
    """Median seconds of a call of each, measured in turns until `budget_s` is used up, at least seven rounds.

    before: called with a candidate's index before each of its bursts. One that is far behind drops out early.
    """
    taken: list[list[float]] = [[] for _ in bursts]
    running, begin = list(range(len(bursts))), time.perf_counter()
    for rounds in range(_MOST_ROUNDS):
        if rounds >= _LEAST_TURNS and time.perf_counter() - begin > budget_s:
            break
        if rounds >= _LEAST_ROUNDS:
            medians = {i: statistics.median(taken[i]) for i in running}
            running = [i for i in running if medians[i] <= _HOPELESS * min(medians.values())]
        for i in running:
            before(i)
            taken[i].append(bursts[i]())
    return [statistics.median(t) for t in taken]
