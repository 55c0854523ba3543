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
from lowbit.codegen.cuda.any_plan import AnyPlan
from lowbit.codegen.cuda.arguments import Args, fill, order_of
from lowbit.codegen.cuda.emit import emit_text
from lowbit.codegen.cuda.plan import PREPARE_THREADS
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["Emulation"]

# Hidden symbols: else all emulated kernels of a process share one copy of inline variables, and of inline functions'
# static ones, whose sizes differ from kernel to kernel.
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off",
          "-U_FORTIFY_SOURCE", "-w")  # fmt: skip
_TIMEOUT_S = 900.0  # a few seconds on a machine that does nothing else
_LAUNCH = "void lb_launch(const Args& a, int kernel) {{ {} }}\n"
_KERNELS = ("lb_kernel(a);", "kernel ? lb_prepare(a) : lb_kernel(a);")
_PREPARE_SHARED = 1024


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

    def __init__(self, plan: AnyPlan) -> None:
        self.plan = plan
        with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
            text, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            text.write_text(emit_text(plan, "host") + _LAUNCH.format(_KERNELS[plan.prepared]))
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
        plan, x = self.plan, order_of(self.plan, x, weight)
        token_blocks = plan.token_blocks(x.shape[0])
        lines = token_blocks if plan.warpgroup else 1
        grid = (min(blocks, plan.units * lines), token_blocks // lines)
        part = torch.full((plan.part_floats(grid, x.shape[0]),), float("nan"))
        count = torch.zeros(plan.counts(grid, x.shape[0]), dtype=torch.int32)
        args = fill(Args(), x, weight, bias, residual, out)
        args.part, args.count = part.data_ptr(), count.data_ptr()
        held = [x, *weight.tensors.values()]
        if plan.prepared:
            ready, scales = (torch.full((n,), 0xFF, dtype=torch.uint8) for n in plan.x_bytes(x.shape[0]))
            args.ready, args.x_scale = ready.data_ptr(), scales.data_ptr()
            held += [ready, scales]
        ranges = (_Range * len(held))(*[_Range(t.data_ptr(), t.numel() * t.element_size()) for t in held])
        width = plan.operand_bits // 8
        line = plan.spec.x_width if plan.reads_rows else plan.x_columns * width
        args.map = (args.ready, plan.x_columns, x.shape[0], line, width, plan.schedule.tile_m)
        if plan.prepared:
            self._launch(args, 1, (x.shape[0], 1), PREPARE_THREADS, _PREPARE_SHARED, range(x.shape[0]), ranges)
        blocks_in_order = order or range(grid[0] * grid[1])
        self._launch(args, 0, grid, plan.threads, plan.shared_bytes, blocks_in_order, ranges)
        if bool(count.any()):
            raise KernelError("LB0461", "emulated kernel: arrival counters are not reset", where=plan.spec.format)

    def _launch(
        self,
        args: Args,
        kernel: int,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        order: Sequence[int],
        ranges: ctypes.Array[_Range],
    ) -> None:
        sequence = (ctypes.c_int * len(order))(*order)
        failed = self._run(ctypes.byref(args), kernel, *grid, threads, shared, sequence, ranges, len(ranges))
        if failed:
            raise KernelError("LB0461", f"emulated kernel: {failed.decode()}", where=self.plan.spec.format)
