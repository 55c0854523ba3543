"""NVRTC in place of nvcc: text that needs no header, errors that are shown, cubins where the library is there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _cuda import spec_of

from lowbit.codegen.cuda import nvrtc, toolchain
from lowbit.codegen.cuda.backend import CudaBackend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target

BACKEND, AMPERE = CudaBackend(), Target.parse("sm_80")
SPECS = [
    spec_of("int4.g64.asym", (64,), 128, activation="int8.g64"),
    spec_of("vq.d4.k256", (64,), 128),
]


def source(spec: KernelSpec) -> Any:
    return BACKEND.emit(spec, next(iter(BACKEND.schedules(spec, AMPERE, 4))), AMPERE)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_header_is_needed(spec: KernelSpec) -> None:
    text = source(spec).text
    inside, _, rest = text.partition("#else")
    assert "__CUDACC_RTC__" in inside
    assert rest.split("#endif")[0].strip() == "#include <stdint.h>"
    assert text.count("#include") == 1


@pytest.mark.skipif(nvrtc.nvrtc_version() is None, reason="cuda-bindings or NVRTC is not installed")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_kernels_compile(spec: KernelSpec) -> None:
    made = source(spec)
    assert nvrtc.compile_in_process(made.text, made.flags)[:4] == b"\x7fELF"
    with pytest.raises(KernelError, match=r"LB0464.*undefined"):
        nvrtc.compile_in_process("__global__ void f() { g(); }", made.flags)


def _library(status: int, options: list[bytes]) -> SimpleNamespace:
    """What the bindings answer, for a program that compiles or does not."""

    def compiled(program: str, count: int, given: list[bytes]) -> tuple[int]:
        assert (program, count) == ("program", len(given))
        options.extend(given)
        return (status,)

    return SimpleNamespace(
        nvrtcVersion=lambda: (0, 13, 0), nvrtcCreateProgram=lambda *_: (0, "program"), nvrtcCompileProgram=compiled,
        nvrtcGetProgramLogSize=lambda _: (0, 9), nvrtcGetProgramLog=lambda _, log: (0,),
        nvrtcGetCUBINSize=lambda _: (0, 4), nvrtcGetCUBIN=lambda _, cubin: (0,), nvrtcDestroyProgram=lambda _: (0,),
    )  # fmt: skip


def test_it_stands_in_for_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options: list[bytes] = []
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    monkeypatch.setattr(nvrtc, "_library", lambda: _library(0, options))
    assert toolchain.no_compiler() is None
    assert BACKEND.toolchain() == "nvrtc 13.0"
    BACKEND.compile(source(SPECS[0]), tmp_path / "kernel.cubin")
    assert (tmp_path / "kernel.cubin").stat().st_size == 4
    assert b"--gpu-architecture=sm_80" in options
    monkeypatch.setattr(nvrtc, "_library", lambda: _library(6, options))
    with pytest.raises(KernelError, match=r"LB0464.*NVRTC failed"):
        BACKEND.compile(source(SPECS[0]), tmp_path / "kernel.cubin")


def test_nothing_compiles_without_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    monkeypatch.setattr(nvrtc, "_library", lambda: None)
    assert "NVRTC" in str(BACKEND.builds(AMPERE))
    with pytest.raises(KernelError, match="LB0463"):
        BACKEND.toolchain()
    with pytest.raises(KernelError, match="LB0463"):
        nvrtc.compile_in_process("", ("code=sm_80",))
    with pytest.raises(KernelError, match="LB0463"):
        BACKEND.compile(source(SPECS[0]), tmp_path / "kernel.cubin")


def test_schedules_name_their_kernels() -> None:
    """With a kernel before it, without one."""
    rounded = BACKEND.emit(SPECS[0], Schedule(8, 64, 64, 4, 3), AMPERE).text
    plain = BACKEND.emit(spec_of("int4.g64.asym", (64,), 128), Schedule(8, 64, 64, 4, 3), AMPERE).text
    assert ("lb_prepare" in rounded, "lb_prepare" in plain) == (True, False)
