"""Cubins inside a checkpoint, from the command line to the launch: made without a GPU, found without a compiler.

The server is played: its architecture is named, nothing compiles there, and where it would launch a cubin the kernel's
own source runs on the CPU with the very arguments. All else is what a server does.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from _cli import invoke_json
from _models import dequantized, swap_linears, tiny_llama

import lowbit
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.cuda import launch, nvrtc, toolchain
from lowbit.codegen.cuda.any_plan import make_plan
from lowbit.codegen.cuda.arguments import Args
from lowbit.codegen.cuda.emulate import Emulation, _Range
from lowbit.codegen.triton.backend import TritonBackend
from lowbit.compiler.errors import KernelError
from lowbit.compiler.io.kernels import KernelFolder, file_digest, read_kernels
from lowbit.compiler.ir.target import Target
from lowbit.compiler.job.export import layer_kernels
from lowbit.compiler.runtime import compile as compile_
from lowbit.compiler.runtime import dispatch, fused, modules
from lowbit.compiler.runtime.dispatch import parse_spec

pytestmark = pytest.mark.skipif(toolchain.no_compiler() is not None, reason="neither nvcc nor NVRTC was found")

IDS = torch.tensor([[5]])
KEPT = ("lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
MACHINE_CUDA, MULTIPROCESSORS = 190, 3
SERVER = """
import sys, torch, lowbit
from lowbit.codegen.cuda import nvrtc, toolchain
from lowbit.compiler.ir.target import Target
from lowbit.compiler.job.export import layer_kernels
from lowbit.compiler.runtime import dispatch

folder, arch = sys.argv[1:]
target = Target("cuda", arch)
toolchain.find_nvcc = nvrtc._library = lambda: None
dispatch._cuda_target = lambda index: target
layers = layer_kernels(lowbit.load(folder))
for layer in layers:
    for m in (1, 2):
        kernel = dispatch.kernel_for(layer.spec(target, "bf16").key(), torch.bfloat16, torch.device("cuda", 0), m)
        assert kernel.backend == "cuda" and str(kernel.artifact).startswith(folder), kernel
print(len(layers))
"""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dispatch.reset()
    yield
    dispatch.reset()


def export(folder: Path, skip: tuple[str, ...], tokens: int) -> Path:
    """A Llama of two layers, and its frozen copy with kernels for two architectures."""
    model = swap_linears(tiny_llama().to(torch.bfloat16), "int4.g32.asym", skip)
    lowbit.save(model, folder / "plain")
    targets = ("--target", "sm_90a", "--target", "sm_80")
    report = invoke_json("export", folder / "plain", "-o", folder / "out", *targets, "--tokens", tokens, "--frozen")
    assert report["unchecked"] == report["kernels"]
    assert set(report["targets"]) == {"sm_80", "sm_90"}
    return folder / "out"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("cubins"), KEPT, 1)


def stored(folder: Path) -> KernelFolder:
    found = read_kernels(folder)
    assert found is not None
    return found


def test_every_cubin_is_there_with_its_hash(exported: Path) -> None:
    manifest = stored(exported)
    assert manifest.frozen
    assert [(k.backend, k.tokens, k.error) for k in manifest.kernels] == [("cuda", (1,), None)] * 2
    assert {k.file for k in manifest.kernels} == {p.name for p in (exported / "kernels").glob("*.cubin")}
    for kernel in manifest.kernels:
        image = manifest.path(kernel).read_bytes()
        assert image[:4] == b"\x7fELF"
        assert int.from_bytes(image[18:20], "little") == MACHINE_CUDA
        assert b"lb_kernel" in image
        assert file_digest(manifest.path(kernel)) == kernel.sha256


@dataclass
class Server:
    """A machine with a GPU, Triton and no compiler. launched: (kernel, file) in order."""

    folder: Path
    launched: list[tuple[str, str]] = field(default_factory=list)

    def kernel(self, cubin: Path, name: str, threads: int, shared_bytes: int, early: bool = False) -> Played:
        return Played(self, cubin, name, threads, shared_bytes)


@dataclass
class Played:
    """Stands for `driver.Kernel`."""

    server: Server
    cubin: Path
    name: str
    threads: int
    shared_bytes: int

    def launch(self, grid: tuple[int, int], args: Args, device: torch.device) -> None:
        entry = next(k for k in stored(self.server.folder).kernels if k.file == self.cubin.name)
        plan = make_plan(launch.core_spec(parse_spec(entry.spec)), entry.schedule)
        assert (self.threads, self.shared_bytes) == (plan.threads, plan.shared_bytes)
        everything = (_Range * 1)(_Range(0, ctypes.c_size_t(-1).value))
        Emulation(plan)._launch(args, 0, grid, self.threads, self.shared_bytes, range(grid[0] * grid[1]), everything)
        self.server.launched.append((self.name, self.cubin.name))


@pytest.fixture
def server(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    found = Server(exported)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    monkeypatch.setattr(nvrtc, "_library", lambda: None)
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(TritonBackend, "available", lambda self, target: None)  # it reads another layout
    monkeypatch.setattr(launch, "Kernel", found.kernel)
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: MULTIPROCESSORS)
    return found


def pose_as(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    for module in (dispatch, modules, fused, compile_):
        monkeypatch.setattr(module, "device_target", lambda device: Target("cuda", arch))


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.real_kernels
def test_a_frozen_server_launches_them(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with torch.no_grad():
        want = dequantized(lowbit.load(server.folder, trust_kernels=False).float())(IDS).logits
        pose_as(monkeypatch, "sm_90")
        got = lowbit.load(server.folder, trust_kernels=True)(IDS).logits.float()
    assert float((got - want).norm() / want.norm()) < 1e-2
    (file,) = [k.file for k in stored(server.folder).kernels if str(k.target) == "sm_90"]
    assert server.launched == [("lb_kernel", file)] * 2  # both layers' projections have one shape
    assert not (tmp_path / "empty").exists()


def test_other_gpus_of_a_family_take_them_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, "sm_86")
    model = lowbit.load(server.folder, trust_kernels=True)
    (layer,) = layer_kernels(model)
    key = layer.spec(Target("cuda", "sm_86"), "bf16").key()
    kernel = dispatch.kernel_for(key, torch.bfloat16, torch.device("cpu"), 1)
    assert kernel.artifact is not None
    (entry,) = [k for k in stored(server.folder).kernels if k.file == kernel.artifact.name]
    assert str(entry.target) == "sm_80"
    with pytest.raises(KernelError, match="LB0409"):
        dispatch.kernel_for(key, torch.bfloat16, torch.device("cpu"), 9)
    dispatch.reset()
    pose_as(monkeypatch, "sm_100")
    lowbit.load(server.folder, trust_kernels=True)
    with pytest.raises(KernelError, match=r"LB0409.*sm_100"):
        dispatch.kernel_for(key, torch.bfloat16, torch.device("cpu"), 1)


@pytest.mark.slow
def test_a_whole_model_in_a_process_without_compilers(tmp_path: Path) -> None:
    """Every kernel that layers ask for, one by one and fused, for one and two tokens."""
    folder = export(tmp_path, ("lm_head",), 2)
    bare = {"PATH": str(tmp_path), "CXX": "/nonexistent", "LOWBIT_CACHE": str(tmp_path / "cache")}
    env = {**os.environ, **bare, "LOWBIT_TRUST_KERNELS": "1"}
    for arch in ("sm_90", "sm_89"):
        command = [sys.executable, "-c", SERVER, str(folder), arch]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        layers = int(done.stdout)
        assert layers > 4
    assert not (tmp_path / "cache").exists()
    values = json.loads((folder / "kernels" / "manifest.json").read_text())
    assert {tuple(k["tokens"]) for k in values["kernels"]} <= {(1,), (2,), (1, 2), (2, 1)}
    assert sum(len(k["tokens"]) for k in values["kernels"]) == layers * 2 * 2
