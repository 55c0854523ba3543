"""What this machine can do, and one line of advice for each thing that is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Check", "diagnose"]

Status = Literal["ok", "missing", "bad"]

_MIN_DISK = 5e9


@dataclass(frozen=True)
class Check:
    """One finding. `missing` costs speed or a feature; `bad` means lowbit cannot work until `fix` is done."""

    name: str
    status: Status
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def diagnose(folder: Path = Path()) -> list[Check]:
    """All checks, in the order a newcomer should fix them; `folder` is where disk space is looked at."""
    return [
        *_python(),
        *_cpu(),
        *_libraries(),
        *_compilers(),
        *_backends(),
        *_calls(),
        _gpu(),
        _cache(),
        *_tuning(),
        _disk(folder),
    ]


def _python() -> Iterator[Check]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    yield Check("python", "ok" if good else "bad", version, "" if good else "install Python 3.11 or newer")


def _cpu() -> Iterator[Check]:
    from lowbit.compiler.ir.target import host_target

    target = host_target()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    slow = target.arch == "generic"
    yield Check(
        "cpu",
        "missing" if slow else "ok",
        f"{platform.machine()}, kernels for {target}, {cores} cores",
        "portable kernels will be used; a CPU with AVX2 or AVX-512 runs them several times faster" if slow else "",
    )


def _libraries() -> Iterator[Check]:
    needed = ("torch", "numpy", "safetensors", "xdsl", "transformers")
    optional = {
        "triton": "GPU kernels",
        "apache-tvm": "CPU kernels without a C++ compiler",
        "nvidia-cutlass-dsl": "GPU kernels for many tokens",
        "gguf": "reading GGUF files",
        "compressed-tensors": "loading exports without lowbit",
    }
    for name in needed:
        version = _version(name)
        yield Check(
            name, "ok" if version else "bad", version or "not installed", "" if version else f"pip install {name}"
        )
    for name, why in optional.items():
        version = _version(name)
        fix = "" if version else f"pip install {name} (for {why})"
        yield Check(name, "ok" if version else "missing", version or "not installed", fix)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compilers() -> Iterator[Check]:
    explicit = os.environ.get("CXX")
    names = [explicit] if explicit else ["g++", "clang++"]
    found = [path for name in names if (path := shutil.which(name))]
    fix = "unset CXX or point it at a compiler" if explicit else "install g++ or clang (apt install g++)"
    instead = "kernels of TVM" if importlib.util.find_spec("tvm") else "the slow reference"
    detail = ", ".join(found) if found else f"none of {', '.join(names)} found: layers run on {instead}"
    yield Check("c++ compiler", "ok" if found else "missing", detail, "" if found else fix)
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Check("nvcc", "ok", nvcc)


def _backends() -> Iterator[Check]:
    """Whether each backend can build kernels for this machine, in the backend's own words."""
    if not importlib.util.find_spec("torch"):
        return
    from lowbit.codegen import BACKENDS, load_backend
    from lowbit.compiler.ir.target import host_target

    target = host_target()
    for name in BACKENDS:
        try:
            backend = load_backend(name)
        except ImportError as e:
            yield Check(f"backend {name}", "missing", f"cannot be imported: {e}", "install what it names")
            continue
        if target.kind not in backend.kinds:
            continue
        why = backend.available(target)
        yield Check(
            f"backend {name}", "missing" if why else "ok", why or f"ready for {target}", "see above" if why else ""
        )


def _calls() -> Iterator[Check]:
    """Whether calls of CPU kernels can do without Python."""
    if not importlib.util.find_spec("torch"):
        return
    from lowbit.compiler.runtime import native_op

    why = native_op.missing()
    detail = f"through Python, some microseconds more: {why}" if why else "C++, compiled with the first kernel"
    fix = "unset LOWBIT_NATIVE_OPERATOR" if native_op.switched_off() else "install g++, and torch from its own packages"
    yield Check("kernel calls", "missing" if why else "ok", detail, fix if why else "")


def _gpu() -> Check:
    if not importlib.util.find_spec("torch"):
        return Check("gpu", "missing", "unknown without torch")
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Check("gpu", "ok", f"{names} (CUDA {torch.version.cuda})")
    if not shutil.which("nvidia-smi"):
        return Check("gpu", "missing", "none found: CPU kernels are used", "nothing to do unless you have a GPU")
    built = torch.version.cuda
    fix = "check the driver with nvidia-smi" if built else "install a CUDA build of torch"
    return Check("gpu", "missing", f"nvidia-smi is there, but torch {torch.__version__} sees no GPU", fix)


def _cache() -> Check:
    from lowbit.compiler.runtime.cache import default_cache_dir

    folder = default_cache_dir()
    probe = next(p for p in (folder, *folder.parents) if p.exists())
    if not probe.is_dir() or not os.access(probe, os.W_OK | os.X_OK):
        return Check("kernel cache", "missing", f"{probe} is not writable", "set LOWBIT_CACHE to a folder you own")
    if hasattr(os, "getuid") and folder.exists() and folder.stat().st_uid != os.getuid():
        return Check("kernel cache", "bad", f"{folder} belongs to another user", "set LOWBIT_CACHE to a folder you own")
    held = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.exists() else 0
    return Check("kernel cache", "ok", f"{folder} ({held / 1e6:.1f} MB)")


def _tuning() -> Iterator[Check]:
    """How many kernels were measured on this device."""
    if not importlib.util.find_spec("torch"):
        return
    from lowbit.codegen.tune.database import known
    from lowbit.codegen.tune.device import device_name
    from lowbit.compiler.ir.target import host_target

    for device in filter(None, [device_name(host_target())]):
        found = known(device)
        bad = f", {len(found.failures)} schedules quarantined" if found.failures else ""
        fix = (
            ""
            if found.entries
            else "quantize tune CHECKPOINT measures what a model needs; cost models are used without"
        )
        yield Check("tuning", "ok", f"{len(found.entries)} kernels measured{bad} on {device}", fix)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    low = free < _MIN_DISK
    fix = "free some space, or write the output elsewhere; `quantize plan` says how much a model needs" if low else ""
    return Check("disk", "missing" if low else "ok", f"{free / 1e9:.1f} GB free in {folder.resolve()}", fix)
