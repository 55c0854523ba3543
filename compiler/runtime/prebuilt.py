"""Kernels that came compiled inside a checkpoint: found before the user's cache, and before anything is compiled.

They are code, so `use_kernels` takes them only from folders that the user trusts. A kernel is used when its file has
the digest of the manifest, its target runs here, and this version of lowbit generates the very source it was compiled
from; none of that needs a compiler. Frozen means that nothing is compiled: what is missing is one clear error.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from lowbit.codegen import load_backend
from lowbit.codegen.backend import Backend, Source
from lowbit.codegen.select import candidates, count_prebuilt, forget_prebuilt, say_once
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import CheckpointError, KernelError
from lowbit.compiler.io.kernels import FOLDER, KernelFolder, StoredKernel, read_kernels
from lowbit.compiler.ir.target import CPU_ISAS, Target, isa_runs_here
from lowbit.compiler.runtime.build import BuiltKernel, check_kernel
from lowbit.compiler.runtime.cache import KernelCache

__all__ = [
    "forget_kernels",
    "freeze",
    "frozen",
    "missing_kernel",
    "prebuilt_file",
    "prebuilt_kernel",
    "runnable_targets",
    "stored_kernel",
    "trusted_by_environment",
    "use_kernels",
]

_log = logging.getLogger("lowbit")
_folders: list[KernelFolder] = []
_frozen_by = ""


def trusted_by_environment() -> bool:
    """Whether `$LOWBIT_TRUST_KERNELS` is set (not to 0): kernels of every checkpoint that is loaded may run."""
    return os.environ.get("LOWBIT_TRUST_KERNELS", "0") not in ("", "0")


def frozen() -> str:
    """Why nothing may be compiled in this process, as part of a sentence; empty while it may."""
    if os.environ.get("LOWBIT_FROZEN", "0") not in ("", "0"):
        return "LOWBIT_FROZEN is set"
    return _frozen_by


def freeze(why: str) -> None:
    """From now on a missing kernel is an error instead of a compile; an empty text lifts that."""
    global _frozen_by
    _frozen_by = why


def use_kernels(folder: Path, trust: bool | None = None) -> KernelFolder | None:
    """Let kernels compiled into a checkpoint be used in this process, and return them; None where there are none, or
    they are not trusted.

    trust: True takes them, False compiles instead, whatever the checkpoint says; None asks the environment. Loading a
    trusted checkpoint that is frozen freezes the process. Raises CheckpointError: LB0120 for a damaged manifest (in a
    frozen process; otherwise that is one line in the log), LB0121 for a frozen checkpoint that nobody trusts.
    """
    _folders[:] = [f for f in _folders if f.folder != folder]
    if trust is False:
        return None
    trust = trust or trusted_by_environment()
    try:
        found = read_kernels(folder)
    except CheckpointError as e:
        if frozen():
            raise
        _log.warning("%s; kernels are compiled instead", e)
        return None
    if found is None or not found.kernels:
        return None
    if not trust:
        _decline(found)
        return None
    _folders.insert(0, found)
    for kernel in found.kernels:
        for target in _devices(kernel.target):
            count_prebuilt(kernel.backend, target)
    if found.frozen:
        freeze(f"the checkpoint {found.folder} is frozen")
    return found


def _decline(found: KernelFolder) -> None:
    """Say that kernels are left alone; raises CheckpointError (LB0121) where nothing else may run."""
    how = "trust_kernels=True, or LOWBIT_TRUST_KERNELS=1"
    if found.frozen:
        raise CheckpointError(
            "LB0121",
            "is frozen, and its compiled kernels are code, which nobody said to trust",
            where=str(found.folder),
            hint=f"use {how}; trust_kernels=False compiles them here instead",
        )
    _log.warning("%s/%s: compiled kernels are code, and are left alone without %s", found.folder, FOLDER, how)


def forget_kernels() -> None:
    """Use no checkpoint's kernels any more, and compile again: for tests."""
    _folders.clear()
    forget_prebuilt()
    _refused.cache_clear()
    freeze("")


def runnable_targets(target: Target) -> list[Target]:
    """Targets whose kernels run on `target`, best first.

    A CPU runs kernels of lesser instruction sets, a GPU those of earlier ones of its family; sm_90's use instructions
    that only it has.
    """
    if target.kind == "cpu":
        lesser = CPU_ISAS[CPU_ISAS.index(target.arch) + 1 :]
        return [target, *(Target("cpu", isa) for isa in lesser if isa_runs_here(isa))]
    number = int(target.arch.removeprefix("sm_").rstrip("a") or 0) if target.kind == "cuda" else 0
    if number in (0, 90):
        return [target]
    return [target, *(Target("cuda", f"sm_{n}") for n in range(number - 1, number // 10 * 10 - 1, -1))]


def _devices(target: Target) -> list[Target]:
    """What runs the kernels of `target`, as `runnable_targets` has it: GPUs decide by it how weights are packed."""
    number = int(target.arch.removeprefix("sm_").rstrip("a") or 0) if target.kind == "cuda" else 0
    if number in (0, 90):
        return [target]
    return [Target("cuda", f"sm_{n}") for n in range(number, number // 10 * 10 + 10)]


def prebuilt_kernel(spec: KernelSpec, target: Target, m: int) -> BuiltKernel | None:
    """The kernel for `m` tokens from a trusted checkpoint, loaded; None where there is none.

    One that was compiled where it could not run is checked against the reference here, unless the process is frozen.
    Raises KernelError (LB0480) for a refused file in a frozen process; otherwise that is one line in the log.
    """
    for folder in _folders:
        for stored in _matching(folder, spec.key(), target, m):
            backend = load_backend(stored.backend)
            emit = functools.partial(backend.emit, spec, stored.schedule, stored.target)
            if (path := _accept(folder, stored, emit)) is None:
                continue
            try:
                return _load(backend, spec, stored, path, target)
            except KernelError as e:
                _refuse(folder, stored, e)
    return None


def _load(backend: Backend, spec: KernelSpec, stored: StoredKernel, path: Path, target: Target) -> BuiltKernel:
    launch, error = backend.load(path, spec, stored.schedule), stored.error
    if error is None and frozen():
        say_once(f"{path.parent}: kernels for {target} were never checked on a device")
    elif error is None:
        error = check_kernel(spec, launch, target)
    return BuiltKernel(spec, backend.name, stored.schedule, launch, error or 0.0, path)


def prebuilt_file(key: str, target: Target, emit: Callable[[Target], Source]) -> Path | None:
    """The compiled file of a kernel that serves any number of tokens, by its spec's text, from a trusted checkpoint."""
    for folder in _folders:
        for stored in _matching(folder, key, target, None):
            if (path := _accept(folder, stored, functools.partial(emit, stored.target))) is not None:
                return path
    return None


def _matching(folder: KernelFolder, key: str, target: Target, m: int | None) -> list[StoredKernel]:
    """Kernels of a folder for `target` itself, or for lesser ones where nothing better can be compiled."""
    mine = [k for k in folder.kernels if k.spec == key and (m in k.tokens if m is not None else not k.tokens)]
    usable = runnable_targets(target)
    found = sorted((k for k in mine if k.target in usable), key=lambda k: usable.index(k.target))
    if frozen() or not found or load_backend(found[0].backend).available(target):
        return found
    return [k for k in found if k.target == target]


def _accept(folder: KernelFolder, stored: StoredKernel, emit: Callable[[], Source]) -> Path | None:
    """The file of a kernel that is what its manifest says and what this lowbit would compile. None, and a line in the
    log, for one that is refused; raises KernelError (LB0480) instead where nothing may be compiled."""
    try:
        if emit().digest != stored.source:
            where = f"{folder.folder}/{FOLDER}/{stored.file}"
            why = "was compiled from other source than this version of lowbit generates"
            raise KernelError("LB0480", why, where=where, hint=_command(folder, stored.target))
        return folder.path(stored)
    except KernelError as e:
        _refuse(folder, stored, e)
        return None


def _refuse(folder: KernelFolder, stored: StoredKernel, why: KernelError) -> None:
    where = f"{folder.folder}/{FOLDER}/{stored.file}"
    refusal = why if why.code == "LB0480" else KernelError("LB0480", why.message, where=where, hint=why.hint)
    if frozen():
        raise refusal from why
    _refused(str(refusal))


@functools.cache
def _refused(why: str) -> None:
    _log.warning("%s; the kernel is compiled instead", why)


def _command(folder: KernelFolder | None, target: Target, m: int = 0) -> str:
    """The command that makes a checkpoint's kernels for a target and at least `m` tokens."""
    where = folder.folder if folder else "CHECKPOINT"
    targets = dict.fromkeys([*(folder.targets if folder else []), str(target)])
    tokens = max(m, folder.max_tokens if folder else 512)
    options = " ".join(f"--target {t}" for t in targets)
    return f"run `quantize export {where} -o OUT {options} --tokens {tokens} --frozen`"


def missing_kernel(what: str, target: Target, m: int = 0) -> KernelError:
    """The error (LB0409) for a kernel that is not there in a frozen process, with the command that makes it."""
    folder = _folders[0] if _folders else None
    dtype = f" (its kernels are for {folder.dtype}: load it so, or add --dtype)" if folder else ""
    return KernelError(
        "LB0409",
        f"no kernel is there for {what} on {target}, and none is compiled: {frozen()}",
        hint=f"{_command(folder, target, m)}{dtype}, or compile before freezing",
    )


def stored_kernel(spec: KernelSpec, target: Target, m: int, cache_: KernelCache) -> BuiltKernel:
    """The best kernel for `m` tokens that the user's cache already has, for a frozen process; raises KernelError
    (LB0409) where it has none. The reference does not stand in: it would be slow in silence."""
    for _, backend, schedule in candidates(spec, target, m):
        if backend.name != "reference":
            source = backend.emit(spec, schedule, target)
            if found := cache_.lookup(cache_.key(spec, schedule, target, source, backend.toolchain())):
                launch = backend.load(found[0], spec, schedule)
                return BuiltKernel(spec, backend.name, schedule, launch, float(found[1]["error"]), found[0])
    shape = f"{'+'.join(map(str, spec.segments))} x {spec.k}"
    what = f"{spec.format} {shape} {'+'.join(spec.epilogue)}".rstrip() + f", {m} tokens of {spec.x_dtype}"
    raise missing_kernel(what, target, m)
