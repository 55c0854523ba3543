"""`quantize export`: a checkpoint with every kernel it can need, compiled for named targets.

The kernels are those that its layers ask for one by one (transformers) and fused (`lowbit.compile`), in every token
class, and that of attention over its packed cache. Compiling needs compilers only: nvcc makes cubins where there is no
GPU, and g++ kernels for other CPUs. What can run here is checked against the reference before it is stored.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lowbit.codegen import BACKENDS, load_backend
from lowbit.codegen.attend import AttendSpec
from lowbit.codegen.backend import Backend, Source
from lowbit.codegen.cpp.attend import attend_source
from lowbit.codegen.cpp.attend_launch import load_attend
from lowbit.codegen.cpp.table import load_table, table_problem, table_source
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.select import candidates, kernel_layout, rounded_between
from lowbit.codegen.spec import KernelSpec, rounded_products
from lowbit.codegen.table import TableSpec
from lowbit.compiler.errors import CheckpointError, KernelError
from lowbit.compiler.io.kernels import FOLDER, MANIFEST, KernelFolder, StoredKernel, file_digest
from lowbit.compiler.io.load import load_quantized
from lowbit.compiler.io.source import is_gguf
from lowbit.compiler.io.write import staged_folder, write_json
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime.attend import check_attend
from lowbit.compiler.runtime.build import check_kernel
from lowbit.compiler.runtime.cache import KernelCache
from lowbit.compiler.runtime.compile import fuse_modules
from lowbit.compiler.runtime.dispatch import DTYPE_NAMES, classes_up_to, parse_spec
from lowbit.compiler.runtime.embedding import check_table
from lowbit.compiler.runtime.fused import QuantGatedMLP
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear, make_invariant, target_compute
from lowbit.quantizers.formats import parse_activation, parse_format
from lowbit.quantizers.formats.kv import parse_kv_format
from lowbit.quantizers.hadamard import split_order

__all__ = ["ExportReport", "LayerKernel", "compile_kernels", "export_kernels", "layer_kernels", "parse_target"]

_TRIES = 4  # schedules that may fail to compile before an export gives up
_MARGIN = 1_000_000  # bytes for the manifest
_locks: dict[str, threading.Lock] = {}


@dataclass(frozen=True)
class LayerKernel:
    """What a layer's kernel computes, before a target says how: the fields of `KernelSpec` a checkpoint decides."""

    segments: tuple[int, ...]
    k: int
    format: str
    epilogue: tuple[str, ...] = ()
    activation: str = ""
    rotate: int = 0
    invariant: bool = False

    def spec(self, target: Target, dtype: str) -> KernelSpec:
        """The spec that a layer on `target` asks for, as `PackedLinear` makes it."""
        fmt = parse_format(self.format)
        layout, compute = kernel_layout(fmt, target, self.activation), target_compute(fmt, target)
        if self.activation:
            compute = rounded_products(fmt, self.k, layout, parse_activation(self.activation))
        rotate = self.rotate if self.rotate and layout.container == 8 and split_order(self.rotate)[0] == 1 else 0
        found = KernelSpec(self.segments, self.k, self.format, str(layout), compute, dtype, dtype, self.epilogue)
        return replace(found, activation=self.activation, rotate=rotate, invariant=self.invariant)


@dataclass
class ExportReport:
    """What `export_kernels` made: the entries of the manifest, and the bytes of their files."""

    out: Path
    kernels: list[StoredKernel]
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values. unchecked: kernels that were compiled where they cannot run."""
        errors = [kernel.error for kernel in self.kernels if kernel.error is not None]
        targets = Counter(str(kernel.target) for kernel in self.kernels)
        counts = {"kernels": len(self.kernels), "bytes": self.nbytes, "unchecked": len(self.kernels) - len(errors)}
        return {"out": str(self.out), **counts, "worst_error": max(errors, default=None), "targets": dict(targets)}


@dataclass(frozen=True)
class _Job:
    """One kernel to compile: for token class `m` of a linear layer, or None for attention over a packed cache."""

    spec: KernelSpec | AttendSpec | TableSpec
    target: Target
    m: int | None


def parse_target(text: str) -> Target:
    """A target as the runtime calls it: `sm_90a` is `sm_90`. Raises KernelError (LB0405)."""
    target = Target.parse(text)
    if target.kind == "ref":
        raise KernelError("LB0405", "nothing is compiled for ref", hint="use sm_90a or a CPU target")
    return Target("cuda", target.arch.rstrip("a")) if target.kind == "cuda" else target


def layer_kernels(model: nn.Module) -> list[LayerKernel]:
    """Every different kernel of a model with quantized layers: one by one, then fused. The model is fused in place."""
    found = dict.fromkeys(_layers_of(model))
    fuse_modules(model)
    return list(found | dict.fromkeys(_layers_of(model)))


def _layers_of(model: nn.Module) -> Iterator[LayerKernel]:
    for module in model.modules():
        if isinstance(module, PackedLinear):
            spec = parse_spec(module.key)
            shape, steps = (spec.segments, spec.k, spec.format), (spec.epilogue, module.activation, module.rotate)
            yield LayerKernel(*shape, *steps, spec.invariant)


def _rounded_between(model: nn.Module, target: Target, dtype: str) -> Iterator[KernelSpec]:
    """Those of the fused model that round for each other, where a target has them, each once."""
    found: dict[KernelSpec, None] = {}
    for module in model.modules():
        reader = module.reader if isinstance(module, QuantGatedMLP) else None
        if isinstance(module, QuantGatedMLP) and isinstance(reader, QuantLinear) and reader.activation:
            (first,), (second,) = _layers_of(module.gate_up), _layers_of(reader.prepare())
            if second.rotate:
                continue
            try:
                found |= dict.fromkeys(rounded_between(first.spec(target, dtype), second.spec(target, dtype), target))
            except KernelError:  # each keeps a kernel that is there already
                continue
    yield from found


def export_kernels(
    checkpoint: Path,
    out: Path,
    targets: Sequence[Target],
    *,
    max_tokens: int = 512,
    frozen: bool = False,
    dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Copy `checkpoint` to `out` with every kernel it can need for `targets` and calls of up to `max_tokens` tokens.

    The model is loaded once, without running it. dtype: of activations, the checkpoint's own when None. frozen: whoever
    loads `out` never compiles. batch_invariant: the kernels are those of batch-invariant layers. progress: called with
    kernels done and kernels in all. Raises KernelError LB0481 for a kernel that no backend can compile for a target,
    CheckpointError as `load_quantized` and `staged_folder`.
    """
    if is_gguf(checkpoint.expanduser()):
        why, hint = "kernels are compiled into folders, not into GGUF files", "run `quantize convert --to lowbit` first"
        raise CheckpointError("LB0101", why, where=str(checkpoint), hint=hint)
    model = load_quantized(checkpoint, dtype=dtype, trust_kernels=False)
    dtype = dtype or cast(torch.dtype, model.dtype)
    if batch_invariant:
        make_invariant(model)
    layers, classes = layer_kernels(model), classes_up_to(max_tokens)
    specs = [(layer.spec(target, DTYPE_NAMES[dtype]), target) for target in targets for layer in layers]
    specs += [(spec, target) for target in targets for spec in _rounded_between(model, target, DTYPE_NAMES[dtype])]
    jobs = [_Job(spec, target, m) for spec, target in specs for m in classes if m == 1 or not spec.invariant]
    jobs += [_Job(spec, target, None) for spec in _attention(model) for target in targets if target.kind == "cpu"]
    del model
    with tempfile.TemporaryDirectory(prefix="lowbit-") as scratch:
        kernels = _compile_all(jobs, Path(scratch), progress or (lambda done, total: None))
        files = {k.file: (Path(scratch) / k.file).stat().st_size for k in kernels}
        folder = KernelFolder(out, frozen, max_tokens, str(dtype).removeprefix("torch."), tuple(kernels))
        _write(checkpoint.expanduser(), out, folder, Path(scratch), sum(files.values()))
    return ExportReport(out, kernels, sum(files.values()))


def compile_kernels(
    specs: Sequence[KernelSpec | TableSpec], target: Target, classes: Sequence[int], folder: Path
) -> list[StoredKernel]:
    """Compile specs, dtypes included, for a target and token classes into files of `folder`; raises KernelError
    (LB0481)."""
    tables = [_Job(spec, target, None) for spec in specs if isinstance(spec, TableSpec)]
    linears = [
        _Job(spec, target, m)
        for spec in specs
        if isinstance(spec, KernelSpec)
        for m in (classes[:1] if spec.invariant else classes)
    ]
    return _compile_all(tables + linears, folder, lambda done, total: None)


def _attention(model: nn.Module) -> list[AttendSpec]:
    """Kernels that read the packed key-value cache which the checkpoint is meant for."""
    text = getattr(model, "kv_format", "")
    if not text or (fmt := parse_kv_format(text)).gear is not None:
        return []
    config = cast(Any, model).config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    spec = AttendSpec(str(fmt), size)
    return [spec.unrotated if fmt.rotate else spec]


def _compile_all(jobs: list[_Job], folder: Path, progress: Callable[[int, int], None]) -> list[StoredKernel]:
    """Compile jobs side by side; kernels of token classes that share a schedule are one entry."""
    found: dict[str, StoredKernel] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        running = [pool.submit(_compile, job, folder) for job in jobs]
        try:
            for done, job in enumerate(running, 1):
                made = job.result()
                same = found.get(made.file)
                found[made.file] = replace(made, tokens=(*same.tokens, *made.tokens)) if same else made
                progress(done, len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)
    return sorted(found.values(), key=lambda k: (str(k.target), k.spec, k.tokens))


def _compile(job: _Job, folder: Path) -> StoredKernel:
    """The kernel that selection would choose for a job, among those that can be compiled into files."""
    if isinstance(job.spec, AttendSpec):
        return _attend_kernel(job.spec, job.target, folder)
    if isinstance(job.spec, TableSpec):
        return _table_kernel(job.spec, job.target, folder)
    assert job.m is not None
    why: list[str] = []
    for _, backend, schedule in candidates(job.spec, job.target, job.m, ahead=True)[:_TRIES]:
        try:
            return _linear_kernel(backend, job.spec, schedule, job, folder)
        except KernelError as e:
            why.append(f"{backend.name}: {e.message}")
    for backend in map(load_backend, BACKENDS):
        if backend.name != "reference" and job.target.kind in backend.kinds:
            reason = backend.serves(job.spec.weight_format, job.spec.activation) or backend.builds(job.target)
            why.append(f"{backend.name}: {reason or backend.supports(job.spec, job.target)}")
    raise KernelError(
        "LB0481",
        f"no kernel can be compiled for {job.m} tokens of {job.spec.format} on {job.target}: {'; '.join(why)[:600]}",
        hint="leave the target out, or keep these layers in another format",
    )


def _linear_kernel(backend: Backend, spec: KernelSpec, schedule: Schedule, job: _Job, folder: Path) -> StoredKernel:
    def check(artifact: Path) -> float:
        return check_kernel(spec, backend.load(artifact, spec, schedule), job.target)

    runs = backend.available(job.target) is None
    source = backend.emit(spec, schedule, job.target)
    tokens = () if job.m is None else (job.m,)
    return _store(backend, spec, schedule, job.target, source, tokens, check if runs else None, folder)


def _attend_kernel(spec: AttendSpec, target: Target, folder: Path) -> StoredKernel:
    backend, source = load_backend("cpp"), attend_source(spec, target.arch)

    def check(artifact: Path) -> float:
        return check_attend(spec, load_attend(artifact, spec))

    runs = backend.available(target) is None
    return _store(backend, spec, Schedule(), target, source, (), check if runs else None, folder)


def _table_kernel(spec: TableSpec, target: Target, folder: Path) -> StoredKernel:
    """The lookup in a quantized table; one that C++ has no kernel for is left to torch wherever it runs."""
    if why := table_problem(spec):
        raise KernelError("LB0481", f"no kernel can be compiled for rows of {spec.format} on {target}: {why}")
    backend = load_backend("cpp")

    def check(artifact: Path) -> float:
        check_table(spec, load_table(artifact, spec))
        return 0.0

    runs = backend.available(target) is None
    source = table_source(spec, target.arch)
    return _store(backend, spec, Schedule(), target, source, (), check if runs else None, folder)


def _store(
    backend: Backend,
    spec: KernelSpec | AttendSpec | TableSpec,
    schedule: Schedule,
    target: Target,
    source: Source,
    tokens: tuple[int, ...],
    check: Callable[[Path], float] | None,
    folder: Path,
) -> StoredKernel:
    """Compile into `folder` by way of the user's cache, so that an export that is repeated is quick.

    Kernels that are not checked have a key of their own: nobody else may take them for checked ones.
    """
    toolchain, store = backend.toolchain(), KernelCache()
    key = store.key(spec, schedule, target, source, toolchain if check else f"{toolchain} unchecked")
    evidence: dict[str, Any] = {"spec": spec.key(), "schedule": schedule.to_dict(), "target": str(target)}
    evidence |= {"backend": backend.name, "toolchain": toolchain, "error": None}

    def build(artifact: Path) -> None:
        backend.compile(source, artifact)
        evidence["error"] = check(artifact) if check else None

    with _locks.setdefault(key, threading.Lock()):
        found = store.lookup(key)
        artifact = found[0] if found else store.store(key, source.suffix, evidence, build)
        error = (found[1] if found else evidence).get("error", 0.0)
        file = f"{key}{source.suffix}"
        shutil.copyfile(artifact, folder / file)
    made = (file, file_digest(folder / file), source.digest, toolchain)
    return StoredKernel(spec.key(), backend.name, target, schedule, tokens, *made, error)


def _write(checkpoint: Path, out: Path, folder: KernelFolder, compiled: Path, nbytes: int) -> None:
    """The checkpoint's files and the kernels, as the folder `out`. Weights are linked where the disk allows it."""
    given = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and FOLDER not in p.relative_to(checkpoint).parts]
    needed = nbytes + sum(p.stat().st_size for p in given) + _MARGIN
    with staged_folder(out, needed) as stage:
        for path in given:
            _carry(path, stage / path.relative_to(checkpoint))
        (stage / FOLDER).mkdir()
        for name in {kernel.file for kernel in folder.kernels}:
            shutil.copyfile(compiled / name, stage / FOLDER / name)
        write_json(stage / MANIFEST, folder.manifest())


def _carry(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        try:
            os.link(path.resolve(), to)
            return
        except OSError:
            pass  # another disk, or one without links
    shutil.copyfile(path, to)
