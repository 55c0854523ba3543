"""The process that builds and runs candidates, so that one that crashes or hangs takes nobody with it.

Forked by the nursery, with two pipes. It answers one request after the other, both lines of JSON, and says at which
stage it is before every step that could be its last.

    build   {spec, target, backend, schedule, path}     emits and compiles into `path`, unless it is there
    try     the same, and tokens, seed, time            loads, checks, and times a burst if asked to
    race    spec, target, backend, tokens, seconds, and lists of schedules and paths: times them in turns
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lowbit.codegen.backend import Backend, Launcher
from lowbit.codegen.check import Oracle, Sample
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune.device import cold_bytes
from lowbit.codegen.tune.measure import Burst, copies_of, cpu_burst, graph_burst, race, seconds_of
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["Bench", "work"]

Say = Callable[[str], None]


class Bench:
    """One kernel on one device: random weights, the reference's results, copies to keep weights cold."""

    def __init__(self, spec: KernelSpec, target: Target) -> None:
        self.spec, self.target = spec, target
        self._samples: dict[int, Sample] = {}
        self._oracles: dict[tuple[int, int], Oracle] = {}

    def oracle(self, tokens: int, seed: int) -> Oracle:
        """Operands and results for a number of tokens; other seeds are other weights."""
        sample = self._samples.setdefault(seed, Sample(self.spec, self.target, seed))
        return self._oracles.setdefault((tokens, seed), Oracle(sample, tokens, seed + 1))

    @cached_property
    def copies(self) -> list[PackedWeight]:
        """Copies of the weight of seed 0."""
        return copies_of(self.oracle(1, 0).sample.weight, cold_bytes(self.target))

    @cached_property
    def turns(self) -> itertools.cycle[PackedWeight]:
        """The copies, round and round."""
        return itertools.cycle(self.copies)

    def burst(self, launch: Launcher, tokens: int) -> Burst:
        """A burst of calls of a kernel."""
        x, _, bias, residual = self.oracle(tokens, 0).operands
        out = self.oracle(tokens, 0).output()
        if self.target.kind == "cuda":
            return graph_burst([lambda w=w: launch(x, w, bias, residual, out) for w in self.copies])  # type: ignore[misc]
        return cpu_burst(lambda w: launch(x, w, bias, residual, out), self.turns)


class _Worker:
    def __init__(self, say: Say) -> None:
        self.say = say
        self.bench: Bench | None = None
        self.loaded: dict[tuple[str, Schedule], Launcher] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request."""
        spec, target = spec_of(request["spec"]), Target.parse(request["target"])
        backend = backend_of(request["backend"])
        if self.bench is None or self.bench.spec != spec or self.bench.target != target:
            self.bench, self.loaded = None, {}  # the old weights go first
            self.bench = Bench(spec, target)
        step = {"build": self._build, "try": self._try, "race": self._race}[request["op"]]
        return step(request, self.bench, backend)

    def _build(self, request: dict[str, Any], bench: Bench, backend: Backend) -> dict[str, Any]:
        path, schedule = Path(request["path"]), Schedule.from_dict(request["schedule"])
        self.say("build")
        if not path.exists():
            staged = path.with_name(f".{os.getpid()}-{path.name}")
            backend.compile(backend.emit(bench.spec, schedule, bench.target), staged)
            os.replace(staged, path)
        if backend.compiles_when_loaded:
            backend.load(path, bench.spec, schedule)
        return {}

    def _try(self, request: dict[str, Any], bench: Bench, backend: Backend) -> dict[str, Any]:
        tokens, seed = request["tokens"], request["seed"]
        self.say("prepare")
        oracle = bench.oracle(tokens, seed)
        _ = oracle.want, oracle.size
        self.say("run")
        launch = self._load(request["path"], Schedule.from_dict(request["schedule"]), bench, backend)
        error = oracle.check(launch)
        if not request["time"]:
            return {"error": error}
        self.say("prepare")
        _ = bench.copies
        self.say("run")
        return {"error": error, "seconds": seconds_of(bench.burst(launch, tokens))}

    def _race(self, request: dict[str, Any], bench: Bench, backend: Backend) -> dict[str, Any]:
        tokens, bursts = request["tokens"], []
        self.say("prepare")
        _ = bench.copies
        for i, (path, values) in enumerate(zip(request["paths"], request["schedules"], strict=True)):
            self.say(f"run {i}")
            launch = self._load(path, Schedule.from_dict(values), bench, backend)
            bursts.append(bench.burst(launch, tokens))
        return {"seconds": race(bursts, request["seconds"], lambda i: self.say(f"run {i}"))}

    def _load(self, path: str, schedule: Schedule, bench: Bench, backend: Backend) -> Launcher:
        if (path, schedule) not in self.loaded:  # schedules that are the same code may be launched differently
            self.loaded[path, schedule] = backend.load(Path(path), bench.spec, schedule)
        return self.loaded[path, schedule]


def spec_of(values: dict[str, Any]) -> KernelSpec:
    """The spec of `KernelSpec.key`'s values."""
    return KernelSpec(**{**values, "segments": tuple(values["segments"]), "epilogue": tuple(values["epilogue"])})


def backend_of(place: str) -> Backend:
    """The backend at `module:class`."""
    module, cls = place.split(":")
    backend: Backend = getattr(import_module(module), cls)()
    return backend


def work(read: int, write: int) -> None:
    """Answer requests until the pipe is closed."""
    with open(read, encoding="utf-8") as requests, open(write, "w", encoding="utf-8") as replies:

        def tell(document: dict[str, Any]) -> None:
            replies.write(json.dumps(document) + "\n")
            replies.flush()

        worker = _Worker(lambda stage: tell({"stage": stage}))
        for line in requests:
            request = json.loads(line)
            if "threads" in request:
                torch.set_num_threads(request["threads"])
                continue
            try:
                tell({"done": worker.answer(request)})
            except KernelError as e:
                tell({"failed": e.message, "code": e.code})
            except Exception as e:  # whatever a candidate throws is a finding about it
                tell({"failed": f"{type(e).__name__}: {' '.join(str(e).split())[:400]}", "code": ""})
