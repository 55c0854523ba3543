"""Building one kernel: choose backend and schedule, emit, compile, check against the reference, store, load."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowbit.codegen.backend import Backend, Launcher, Source
from lowbit.codegen.reference.backend import decode_weight, run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.select import candidates, say_once
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime.cache import KernelCache
from lowbit.quantizers.qtensor import PackedWeight, QTensor
from lowbit.quantizers.weights import QWeight, pack_weights, random_weight

__all__ = ["TOLERANCE", "BuiltKernel", "build_kernel", "check_kernel", "sample_weight"]

TOLERANCE = {"float": 2e-5, "int16": 2e-4, "int8": 2e-2}
"""Largest allowed root-mean-square error relative to the reference's, by how products are formed (float32 output)."""

_OUT_EPS = {"f32": 0.0, "bf16": 2**-8, "f16": 2**-11}
_TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


_locks: dict[str, threading.Lock] = {}


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel ready to launch, with where it came from. artifact: its file, where the backend compiles one."""

    spec: KernelSpec
    backend: str
    schedule: Schedule
    launch: Launcher
    error: float
    artifact: Path | None = None


def build_kernel(spec: KernelSpec, target: Target, m: int, cache_: KernelCache) -> BuiltKernel:
    """The best kernel for `m` tokens that compiles and agrees with the reference.

    Candidates that fail are skipped with one line; when only the reference is left that is said once. A kernel is
    checked when it is built, and its error is stored beside it.
    """
    failed: set[str] = set()
    for _, backend, schedule in candidates(spec, target, m):
        if backend.name in failed:
            continue
        try:
            return _build_with(backend, spec, schedule, target, cache_)
        except KernelError as e:
            failed.add(backend.name)
            say_once(f"backend {backend.name} is left out for {spec.format} on {target}: {e.message}")
    raise KernelError("LB0407", f"no backend runs {spec.format} with layout {spec.layout} on {target}")


def _build_with(
    backend: Backend, spec: KernelSpec, schedule: Schedule, target: Target, cache_: KernelCache
) -> BuiltKernel:
    if backend.name == "reference":
        say_once(f"{spec.format} runs on the reference backend on {target}: correct, but slow")
        return BuiltKernel(spec, backend.name, schedule, backend.load(cache_.root, spec, schedule), 0.0)
    source = backend.emit(spec, schedule, target)
    key = cache_.key(spec, schedule, target, source, backend.toolchain())
    with _locks.setdefault(key, threading.Lock()):  # token classes that share a schedule share one build
        return _find_or_compile(backend, spec, schedule, target, cache_, source, key)


def _find_or_compile(
    backend: Backend,
    spec: KernelSpec,
    schedule: Schedule,
    target: Target,
    cache_: KernelCache,
    source: Source,
    key: str,
) -> BuiltKernel:
    if found := cache_.lookup(key):
        artifact, meta = found
        launch = backend.load(artifact, spec, schedule)
        return BuiltKernel(spec, backend.name, schedule, launch, float(meta["error"]), artifact)
    evidence: dict[str, Any] = {
        "spec": spec.key(),
        "schedule": schedule.to_dict(),
        "target": str(target),
        "backend": backend.name,
        "toolchain": backend.toolchain(),
    }

    def build(artifact: Any) -> None:
        backend.compile(source, artifact)
        evidence["error"] = check_kernel(spec, backend.load(artifact, spec, schedule), target)

    artifact = cache_.store(key, source.suffix, evidence, build)
    launch = backend.load(artifact, spec, schedule)
    return BuiltKernel(spec, backend.name, schedule, launch, float(evidence.get("error", 0.0)), artifact)


def sample_weight(spec: KernelSpec, seed: int = 0) -> PackedWeight:
    """Random codes in the spec's format and layout, for checks and measurements."""
    rng = torch.Generator().manual_seed(seed)
    parts: list[QWeight] = []
    for n in spec.segments:
        parts.append(random_weight(spec.weight_format, n, spec.k, rng))
        if isinstance(parts[0], QTensor) and parts[0].perm is not None:
            parts[-1] = replace(parts[-1], perm=parts[0].perm)  # siblings share the order of their input
    weight = pack_weights(parts, spec.layout_)
    if spec.rounding is None or not spec.rounding.static:
        return weight
    scales = (1 + torch.rand(spec.rounding.groups(spec.k), generator=rng)) * 2 / spec.rounding.tops(spec.k)
    return replace(weight, tensors={**weight.tensors, "input_scale": scales})


def check_kernel(spec: KernelSpec, launch: Launcher, target: Target, m: int = 3) -> float:
    """Relative root-mean-square error of the kernel on random data; raises KernelError (LB0408) beyond tolerance."""
    device = "cuda" if target.kind == "cuda" else "cpu"
    rng = torch.Generator().manual_seed(1)
    dtype = _TORCH_DTYPES[spec.out_dtype]
    weight = sample_weight(spec)
    n_bias = sum(spec.segments)
    x = torch.randn(m, spec.k, generator=rng).to(_TORCH_DTYPES[spec.x_dtype])
    bias = torch.randn(n_bias, generator=rng) if "bias" in spec.epilogue else None
    residual = torch.randn(m, spec.n_out, generator=rng).to(dtype) if "residual" in spec.epilogue else None
    want = run_reference(_as_f32(spec), x, weight, bias, residual)
    # The size of the dot products themselves: a fair yardstick where terms cancel.
    yardstick = (
        (x.float() @ decode_weight(weight).T).square().mean().sqrt() if "silu_mul" not in spec.epilogue else None
    )
    out = torch.full((m, spec.n_out), float("nan"), dtype=dtype, device=device)
    launch(x.to(device), _to(weight, device), _opt(bias, device), _opt(residual, device), out)
    difference = (out.cpu().float() - want.float()).square().mean().sqrt()
    scale = max(float(want.square().mean().sqrt()), float(yardstick) if yardstick is not None else 0.0, 1e-30)
    error = float(difference) / scale
    limit = (
        TOLERANCE["float" if spec.activation else spec.compute]  # rounding that is meant is no error
        + _OUT_EPS[spec.out_dtype]
        + (1e-2 if _OUT_EPS[spec.x_dtype] and device == "cuda" else 0)
    )
    if not error <= limit:
        raise KernelError("LB0408", f"kernel disagrees with the reference: relative error {error:.2g} > {limit:.2g}")
    return error


def _as_f32(spec: KernelSpec) -> KernelSpec:
    return replace(spec, out_dtype="f32")


def _opt(tensor: torch.Tensor | None, device: str) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def _to(weight: PackedWeight, device: str) -> PackedWeight:
    return replace(weight, tensors={name: t.to(device) for name, t in weight.tensors.items()})
