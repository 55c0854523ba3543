"""`DecoderProgram`: builds a model's program and runs steps of it."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lowbit.codegen import load_backend
from lowbit.codegen.attend import MAX_QUERIES
from lowbit.codegen.cpp.attend import partial_floats
from lowbit.codegen.cpp.decoder.emit import emit_program
from lowbit.codegen.cpp.decoder.spec import PARTS, DecoderSpec
from lowbit.codegen.cpp.launch import load_openmp
from lowbit.compiler.errors import KernelError, RunError
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.runtime import prebuilt
from lowbit.compiler.runtime.cache import KernelCache
from lowbit.compiler.runtime.modules import PackedLinear
from lowbit.compiler.runtime.program.cache import ProgramCache
from lowbit.compiler.runtime.program.kernels import KernelTable, step_sizes
from lowbit.compiler.runtime.program.linears import Gated, LinearPart
from lowbit.compiler.runtime.program.mixture import MixtureParts
from lowbit.compiler.runtime.program.parts import DecoderParts, LayerParts
from lowbit.compiler.runtime.program.structures import CGated, CLayer, CLinear, CMixture, CModel, CState

__all__ = ["DecoderProgram"]


class DecoderProgram:
    """One sequence at a time, a step per call: embeddings to logits without coming back to Python.

    max_tokens: tokens of one step; longer prompts are cut. context: positions a cache can have. threads: the most a
    step uses (`torch.get_num_threads` when it is called). Calls from several Python threads wait for each other.
    """

    def __init__(self, parts: DecoderParts, *, max_tokens: int, context: int, threads: int | None = None) -> None:
        self.spec, self.parts = parts.spec, parts
        self.max_tokens, self.context = max_tokens, context
        self.threads = threads or max(1, torch.get_num_threads())
        self._lock = threading.Lock()
        self._keep: list[Any] = []
        self._tables: dict[str, KernelTable] = {}
        self._step = _load(self.spec)
        self._model = self._build_model(parts)
        self._state = self._build_state()
        self._times = (ctypes.c_double * len(PARTS))()

    @property
    def kernels(self) -> list[str]:
        """The linear kernels, one line each."""
        built = [(t, b) for t in self._tables.values() for b, _ in t.built]
        return [f"{b.spec.format} {b.spec.segments}x{b.spec.k} {'+'.join(b.spec.epilogue)}" for _, b in built]

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderProgram:
        """A copied model shares the program: its weights never change."""
        return self

    def new_cache(self, positions: int = 256) -> ProgramCache:
        """An empty cache with room for `positions`; it grows as needed."""
        return ProgramCache(self.spec, positions, self.context)

    def run(self, tokens: torch.Tensor, cache: ProgramCache, keep: int = 1) -> torch.Tensor:
        """float32 logits [keep, vocabulary] of the last `keep` of `tokens` [T], which extend `cache`.

        Raises RunError LB0562 when they do not fit the cache, LB0563 for the cache of another program, LB0564 for
        tokens outside the vocabulary.
        """
        if cache.spec != self.spec or cache.limit > self.context:
            raise RunError("LB0563", "the cache is another program's", hint="start a new sequence")
        ids = tokens.to(torch.int64).contiguous()
        total = ids.numel()
        logits = torch.empty(keep, self.spec.vocab)
        with self._lock:
            cache.reserve(cache.length + total)
            for start in range(0, total, self.max_tokens):
                count = min(self.max_tokens, total - start)
                first = max(start, total - keep)  # of the tokens whose logits are wanted
                self._call(ids, start, count, cache, max(0, start + count - first), logits, first - (total - keep))
        return logits

    def _call(
        self,
        ids: torch.Tensor,
        start: int,
        count: int,
        cache: ProgramCache,
        keep: int,
        logits: torch.Tensor,
        row: int,
        times: Any = None,
    ) -> None:
        state = self._state
        state.keys, state.values, state.context = cache.keys.data_ptr(), cache.values.data_ptr(), cache.capacity
        if cache.packed:
            pointers, state.k_rows, state.v_rows = cache.pointers()
            state.packed[:] = pointers
            self._fit_prompt(cache.capacity if count > MAX_QUERIES else 0)
        self._fit_scores(cache.capacity)
        status = self._step(
            ctypes.byref(self._model),
            ctypes.byref(state),
            ids.data_ptr() + 8 * start,
            count,
            cache.length,
            keep,
            logits.data_ptr() + 4 * self.spec.vocab * row,
            None,
            times,
            min(self.threads, torch.get_num_threads()),
        )
        if status:
            raise RunError(
                "LB0564", f"the program refused the step (status {status})", hint="check that ids fit the vocabulary"
            )
        cache.length += count

    def profile(self, tokens: torch.Tensor, cache: ProgramCache) -> dict[str, float]:
        """Seconds by part of one step of `tokens` (at most `max_tokens`), which extend `cache`."""
        ids, logits = tokens.to(torch.int64).contiguous(), torch.empty(1, self.spec.vocab)
        times = (ctypes.c_double * len(PARTS))()
        with self._lock:
            cache.reserve(cache.length + ids.numel())
            self._call(ids, 0, ids.numel(), cache, 1, logits, 0, times)
        return dict(zip(PARTS, times, strict=True))

    def routes(self, tokens: int) -> dict[int, torch.Tensor]:
        """The experts, int64 [tokens, active], that each sparse layer chose for the `tokens` of the last step."""
        sparse = {i: layer.mlp for i, layer in enumerate(self.parts.layers) if isinstance(layer.mlp, MixtureParts)}
        return {i: self._chosen[i, : tokens * m.active].view(tokens, m.active).long() for i, m in sparse.items()}

    def generate(
        self, tokens: torch.Tensor, new_tokens: int, stop: Iterable[int] = (), cache: ProgramCache | None = None
    ) -> torch.Tensor:
        """Greedy text: `tokens` [T] and up to `new_tokens` more, ending with the first of `stop`."""
        cache = cache or self.new_cache(tokens.numel() + new_tokens)
        ends, out, step = set(stop), tokens.tolist(), tokens
        for _ in range(new_tokens):
            best = int(self.run(step, cache).argmax())
            out.append(best)
            if best in ends:
                break
            step = torch.tensor([best])
        return torch.tensor(out)

    def _build_model(self, parts: DecoderParts) -> Any:
        sizes = step_sizes(self.max_tokens)
        for linear in [*(x for layer in parts.layers for x in layer.all_linears()), parts.head]:
            if linear.packed is not None:
                key = linear.packed.spec_key(linear.epilogue)
                self._tables.setdefault(key, KernelTable(key, sizes))
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(lambda table: table.built, self._tables.values()))
        layers = (CLayer * self.spec.layers)(*[self._layer(layer) for layer in parts.layers])
        model = CModel(
            layers=ctypes.addressof(layers),
            embedding=self._table(parts.embedding),
            norm=self._address(parts.norm),
            head=self._linear(parts.head),
        )
        model.rope[0] = model.rope[1] = self._address(parts.rope)
        self._keep.append(layers)
        return model

    def _table(self, table: torch.Tensor | PackedLinear) -> int:
        """Where the embedding table is: its numbers, or the addresses of its packed operands."""
        if isinstance(table, torch.Tensor):
            return self._address(table)
        pointers = (ctypes.c_void_p * len(table.operands()))(*[self._address(t) for t in table.operands()])
        self._keep.append(pointers)
        return ctypes.addressof(pointers)

    def _layer(self, layer: LayerParts) -> Any:
        norms = {name: self._address(tensor) for name, tensor in layer.norms.items()}
        linears = {name: self._linear(part) for name, part in layer.linears.items()}
        if isinstance(layer.mlp, MixtureParts):
            mixture = self._mixture(layer.mlp)
            self._keep.append(mixture)
            return CLayer(window=layer.window, rope=0, **norms, **linears, mixture=ctypes.addressof(mixture))
        return CLayer(window=layer.window, rope=0, **norms, **linears, mlp=self._gated(layer.mlp))

    def _gated(self, part: Gated) -> Any:
        return CGated(**{name: self._linear(linear) for name, linear in part.items()})

    def _mixture(self, part: MixtureParts) -> Any:
        experts = (CGated * len(part.experts))(*[self._gated(expert) for expert in part.experts])
        self._keep.append(experts)
        shared = {} if part.shared is None else {"shared": self._gated(part.shared)}
        if part.shared_gate is not None:
            shared["shared_gate"] = self._linear(part.shared_gate)
        return CMixture(
            experts=ctypes.addressof(experts),
            count=len(part.experts),
            active=part.active,
            normalised=part.normalised,
            router=self._linear(part.router),
            **shared,
        )

    def _linear(self, part: LinearPart) -> Any:
        bias = 0 if part.bias is None else self._address(part.bias.float())
        if part.packed is None:
            dense = _readable(part.dense)
            type_ = _DENSE_TYPES.index(dense.dtype)
            return CLinear(dense=self._address(dense), type=type_, bias=bias, n=part.n, k=part.k)
        operands = [self._address(t) for t in part.packed.operands()]
        pointers = (ctypes.c_void_p * len(operands))(*operands)
        table = self._tables[part.packed.spec_key(part.epilogue)].structure
        self._keep += [pointers, table]
        return CLinear(kernel=ctypes.addressof(table), weight=ctypes.addressof(pointers), bias=bias, n=part.n, k=part.k)

    def _address(self, tensor: torch.Tensor) -> int:
        """Where `tensor` is, which is kept for as long as the program."""
        tensor = tensor.detach().contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _build_state(self) -> Any:
        s, m = self.spec, self.max_tokens
        floats = {
            "hidden": m * s.hidden,
            "normed": m * s.hidden,
            "qkv": m * (s.q_width + 2 * s.kv_width),
            "mixed": m * s.q_width,
            "inner": 3 * m * s.inner,
        }
        if s.experts:
            floats |= {"rows": m * s.hidden, "given": m * s.hidden, "odds": m * s.experts, "shares": m * s.active}
        room = max((t.scratch(m, self.threads) for t in self._tables.values()), default=0)
        state = CState(tokens=m, threads=self.threads, scratch_bytes=room)
        for name, size in floats.items():
            setattr(state, name, self._address(torch.zeros(size)))
        self._chosen = torch.zeros(s.layers, m * s.active, dtype=torch.int32)
        state.chosen = self._address(self._chosen)
        for name, size in {"places": m * s.active, "ends": s.experts}.items():
            setattr(state, name, self._address(torch.zeros(size, dtype=torch.int32)))
        state.scratch = self._address(torch.zeros(room, dtype=torch.uint8))
        self._scores = self._prompt = torch.empty(0)
        if s.packed is not None:
            rows = MAX_QUERIES * s.heads // s.kv_heads
            splits = 4 * self.threads + 2 * s.kv_heads  # of all heads together
            state.partial = self._address(torch.zeros(splits * rows * partial_floats(s.packed)))
            state.few = self._address(torch.zeros(2 * MAX_QUERIES * s.q_width))
        return state

    def _fit_prompt(self, positions: int) -> None:
        """Float buffers of one layer's keys and values, for steps that do not attend to the packed cache."""
        s = self.spec
        keys, values = (s.kv_heads * positions * width for width in (s.head_dim, s.value_stride))
        if self._prompt.numel() < keys + values:
            self._prompt = torch.empty(keys + values)
        self._state.keys = self._prompt.data_ptr()
        self._state.values = self._prompt.data_ptr() + 4 * keys

    def _fit_scores(self, positions: int) -> None:
        """Room for four rows of scores per thread."""
        if self._scores.numel() < 4 * positions * self.threads:
            self._scores = torch.empty(4 * positions * self.threads)
            self._state.scores = self._scores.data_ptr()


_DENSE_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # `Type` in model.h


def _readable(weight: torch.Tensor | None) -> torch.Tensor:
    """A dense matrix as it is, if programs read its type, else as float32."""
    assert weight is not None
    return weight if weight.dtype in _DENSE_TYPES else weight.float()


def _load(spec: DecoderSpec) -> Any:
    """The compiled program's entry point, from the kernel cache or freshly built."""
    target, backend, store = host_target(), load_backend("cpp"), KernelCache()
    if why := backend.available(target):
        raise RunError("LB0561", f"no program can be built: {why}", hint="use mode='modules'")
    source = emit_program(spec, target.arch)
    parts = ("decoder", source.text, " ".join(source.flags), str(target), backend.toolchain())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
    found = store.lookup(key)
    if found is None and (why := prebuilt.frozen()):
        hint = "use mode='modules', or compile the program into the cache first"
        raise KernelError("LB0409", f"the native program is not there, and nothing is compiled: {why}", hint=hint)
    evidence = {"program": "decoder", "target": str(target), "toolchain": backend.toolchain(), "error": 0.0}
    artifact: Path = found[0] if found else store.store(key, ".so", evidence, lambda out: backend.compile(source, out))
    load_openmp()
    try:
        step = ctypes.CDLL(str(artifact)).lb_step
    except (OSError, AttributeError) as e:
        raise KernelError("LB0414", f"cannot load the program: {e}") from e
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    step.argtypes = [pointer, pointer, pointer, number, number, number, pointer, pointer, pointer, ctypes.c_int]
    step.restype = ctypes.c_int
    return step
