"""Which device a measurement belongs to."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch

from lowbit.compiler.ir.target import Target, host_target, isa_runs_here

__all__ = ["cold_bytes", "device_name", "file_name"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LEAST_COLD, _MOST_COLD = 64 << 20, 512 << 20


def device_name(target: Target) -> str | None:
    """What measurements for `target` on this machine are filed under; None when the target is not this machine.

    CPUs are told apart by model, instruction set and the threads a kernel uses (torch's), GPUs by name, architecture
    and multiprocessors (parts of a GPU are other GPUs).
    """
    if target.kind == "cpu":
        if not isa_runs_here(target.arch):
            return None
        threads = torch.get_num_threads()
        return f"{target}; {_cpu_model()}; {threads} {'thread' if threads == 1 else 'threads'}"
    if target.kind != "cuda" or not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    here = f"sm_{p.major}{p.minor}"
    return f"{here}; {p.name}; {p.multi_processor_count} multiprocessors" if here == str(target) else None


@cache
def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return " ".join(found[1].split()) if found else f"unknown {host_target()}"


def file_name(device: str) -> str:
    """The device as a file's name.

    >>> file_name("sm_90; NVIDIA H200; 132 multiprocessors")
    'sm_90-nvidia-h200-132-multiprocessors.json'
    """
    return re.sub(r"[^a-z0-9_]+", "-", device.lower()).strip("-") + ".json"


def cold_bytes(target: Target) -> int:
    """Bytes that, read in turn, leave nothing of the first in any cache: several times the last level."""
    if target.kind == "cuda":
        last = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return max(4 * int(last), _LEAST_COLD)
    return min(max(2 * _last_level_bytes(), _LEAST_COLD), _MOST_COLD)


@cache
def _last_level_bytes() -> int:
    """The largest cache of the first core, 32 MB where the system does not say."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) << (10 if found[2] == "K" else 20))
    return max(sizes, default=32 << 20)
