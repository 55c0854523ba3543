"""Running a kernel's own source on the CPU, thread by thread: a slow oracle for index arithmetic, waits and reductions.

The text is what a GPU gets, except that `text/host.cuh` stands for the machine. Matrix instructions, asynchronous
copies and barriers are played there; copies are aligned and in bounds, or the call fails.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.cuda.arguments import Args, fill
from lowbit.codegen.cuda.emit import emit_text
from lowbit.codegen.cuda.plan import Plan
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["Emulation"]

_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE",
          "-w")  # fmt: skip
_TIMEOUT_S = 900.0  # a few seconds on a machine that does nothing else
_LAUNCH = "void lb_launch(const Args& a) { lb_kernel(a); }\n"


def _compile(text: Path, library: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        raise KernelError("LB0461", "kernels cannot be emulated without a C++ compiler", hint="install g++ or set CXX")
    command = [compiler, *_FLAGS, "-o", str(library), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise KernelError("LB0461", f"the kernel is not C++: {done.stderr[-800:]}")


class _Range(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class Emulation:
    """One kernel, compiled for this machine's CPU."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
            text, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            text.write_text(emit_text(plan, "host") + _LAUNCH)
            _compile(text, library)
            self._run = ctypes.CDLL(str(library)).lb_emulate
        self._run.restype = ctypes.c_char_p

    def launch(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
        blocks: int = 3,
        order: Sequence[int] | None = None,
    ) -> None:
        """As a `Launcher`, with `blocks` thread blocks along the matrix that run in `order`.

        Raises KernelError (LB0461) when a copy is out of bounds or not aligned, or threads wait for each other.
        """
        plan = self.plan
        token_blocks = -(-x.shape[0] // plan.schedule.tile_m)
        blocks = min(blocks, plan.units)
        part = torch.full((plan.part_floats(blocks, token_blocks),), float("nan"))
        count = torch.zeros(plan.tile_sets * token_blocks, dtype=torch.int32)
        args = fill(Args(), x, weight, bias, residual, out)
        args.part, args.count = part.data_ptr(), count.data_ptr()
        held = [x, *weight.tensors.values()]
        ranges = (_Range * len(held))(*[_Range(t.data_ptr(), t.numel() * t.element_size()) for t in held])
        sequence = list(order or range(blocks * token_blocks))
        failed = self._run(
            ctypes.byref(args), blocks, token_blocks, plan.schedule.warps * 32, plan.shared_bytes,
            (ctypes.c_int * len(sequence))(*sequence), ranges, len(held),
        )  # fmt: skip
        if failed:
            raise KernelError("LB0461", f"emulated kernel: {failed.decode()}", where=plan.spec.format)
        if bool(count.any()):
            raise KernelError("LB0461", "emulated kernel: arrival counters are not reset", where=plan.spec.format)
