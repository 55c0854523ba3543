"""Kernels for AArch64 on other machines: compiled by a cross compiler with a small main program, run by qemu."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from lowbit.codegen.backend import Source
from lowbit.codegen.cpp.plan import KernelPlan
from lowbit.codegen.cpp.toolchain import FLAGS
from lowbit.quantizers.qtensor import PackedWeight

_MAIN = r"""
#include <cstdio>
#include <cstdlib>
// Input: numbers (int64: m, scratch bytes, threads, output bytes, count of blocks), sizes of blocks, blocks: x, bias,
// residual, operands. Empty blocks are null pointers.
int main(int, char** name) {
  FILE* in = fopen(name[1], "rb");
  int64_t head[5], size[64];
  if (!in || fread(head, 8, 5, in) != 5 || fread(size, 8, head[4], in) != size_t(head[4])) return 2;
  void* block[64] = {};
  for (int i = 0; i < head[4]; ++i) {
    if (!size[i]) continue;
    block[i] = aligned_alloc(64, (size[i] + 63) / 64 * 64);
    if (fread(block[i], 1, size[i], in) != size_t(size[i])) return 3;
  }
  void* out = malloc(head[3]);
  void* scratch = malloc(head[1]);
  const int status = lb_run(block[0], head[0], block + 3, (const float*)block[1], block[2], out, scratch, head[1],
                            int(head[2]));
  if (status) return 10 + status;
  FILE* to = fopen(name[2], "wb");
  return fwrite(out, 1, head[3], to) == size_t(head[3]) && !fclose(to) ? 0 : 4;
}
"""


def cross_tools() -> tuple[str, str]:
    """Cross compiler and emulator; skips where one is missing."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    emulator = emulator or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    return compiler, emulator


def compile_program(source: Source, folder: Path) -> Path:
    """An AArch64 program that makes one call of the kernel."""
    text, program = folder / "kernel.cpp", folder / "kernel"
    text.write_text(source.text + _MAIN)
    flags = [f for f in source.flags if f not in ("-shared", "-fPIC", "-O3")]
    assert set(FLAGS) & set(flags) < set(FLAGS)
    command = [cross_tools()[0], *flags, "-O1", "-static", "-o", str(program), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return program


def run_program(
    program: Path,
    plan: KernelPlan,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """Output float32 [M, n_out] of the kernel of `plan`."""
    m, none = x.shape[0], torch.empty(0)
    scratch = plan.shared_bytes + plan.token_bytes * m + plan.thread_bytes * threads + 256
    operands = [weight.tensors[name] for name in plan.spec.operands]
    blocks = [_bytes(t) for t in (x, none if bias is None else bias, none, *operands)]
    head = [m, scratch, threads, m * plan.spec.n_out * 4, len(blocks), *map(len, blocks)]
    given, got = program.with_suffix(".in"), program.with_suffix(".out")
    given.write_bytes(struct.pack(f"<{len(head)}q", *head) + b"".join(blocks))
    done = subprocess.run([cross_tools()[1], program, given, got], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return torch.frombuffer(bytearray(got.read_bytes()), dtype=torch.float32).view(m, plan.spec.n_out)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
