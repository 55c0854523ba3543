"""Kernels for machines other than this one: AArch64 under qemu, and instruction sets that are only compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _cpp import BACKEND, error, expected, spec_of, tensors_of
from _qemu import compile_program, cross_tools, run_program

from lowbit.codegen.cpp.bytes_plan import vector_plan
from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.compiler.ir.target import CPU_ISAS, Target, isa_compiles_here, isa_runs_here
from lowbit.quantizers.weights import pack_weights

# Instruction set, format, products, token class: both kernel shapes; codes below and above 127; tables of levels, of
# words, of floats; float16 codes, each type of scale; lookups of centroids of every length.
CASES = [
    ("neondot", "int4.g128.asym", "int16", 1),
    ("neondot", "int8.ch.asym", "int8", 17),
    ("neondot", "e3m2.ch", "int16", 2),
    ("neon", "int3.g48.fz", "int8", 2),
    ("neon", "int8.g32.asym", "int16", 1),
    ("neondot", "bcq2.g48", "int8", 1),
    ("neondot", "tcq2.ch", "int8", 1),
    ("neon", "tcq3.g32", "int16", 17),
    ("neon", "nvfp4", "int16", 17),
    ("neon", "mxfp8_e4m3", "float", 1),
    ("neon", "vq.d6.k256.o5v4k16.cn", "float", 2),
    ("neon", "vq.d16.k256.r16", "float", 17),
    ("neondot", "vq.d4.k256.s8", "int16", 1),
    ("neon", "vq.d16.k16.r16.s8", "int8", 17),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_for_aarch64_agree_with_the_definition(case: tuple[str, str, str, int], tmp_path: Path) -> None:
    cross_tools()
    arch, fmt, compute, m = case
    spec = spec_of(fmt, compute, (131,), 160, epilogue=("bias",))
    target = Target("cpu", arch)
    schedule = next(iter(BACKEND.schedules(spec, target, m)))
    plan = vector_plan(spec, schedule) if spec.vector else Plan(spec, schedule)
    program = compile_program(BACKEND.emit(spec, schedule, target), tmp_path)
    weights, bias = tensors_of(spec), torch.randn(131, generator=torch.Generator().manual_seed(1))
    packed = pack_weights(weights, spec.layout_)
    for tokens in (1, 5, 19):
        x = torch.randn(tokens, 160, generator=torch.Generator().manual_seed(tokens))
        got = run_program(program, plan, x, packed, bias)
        assert error(got, expected(spec, x, weights) + bias) < 1e-5
        assert torch.equal(run_program(program, plan, x, packed, bias, threads=3), got)


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("arch", [a for a in CPU_ISAS if isa_compiles_here(a) and not isa_runs_here(a)])
def test_instruction_sets_this_machine_lacks_compile(arch: str, tmp_path: Path) -> None:
    target = Target("cpu", arch)
    for fmt, compute, m in (("e3m2.ch", "int8", 1), ("int4.g128.asym", "int16", 1), ("vq.d4.k256", "float", 17),
                            ("vq.d4.k256.s8", "int8", 1)):  # fmt: skip
        spec = spec_of(fmt, compute, (64,), 128)
        schedule = next(iter(BACKEND.schedules(spec, target, m)))
        BACKEND.compile(BACKEND.emit(spec, schedule, target), tmp_path / "kernel.so")


def test_what_cannot_be_compiled_here_is_said() -> None:
    foreign = next(a for a in CPU_ISAS if not isa_compiles_here(a))
    assert "makes no code" in str(BACKEND.builds(Target("cpu", foreign)))
    assert not isa_runs_here(foreign)
    assert "does not have" in str(BACKEND.available(Target("cpu", foreign)))
