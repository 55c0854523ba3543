"""Sums of terms on GPUs: one matrix of all terms over repeated activations, in every layout and both backends."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from _cuda import Layer
from _cuda import spec_of as cuda_spec

from lowbit.codegen import load_backend
from lowbit.codegen.check import sample_weight
from lowbit.codegen.cuda.any_plan import make_plan
from lowbit.codegen.cuda.emulate import Emulation
from lowbit.codegen.cuda.launch import core_spec
from lowbit.codegen.reference.backend import decode_weight, run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.sums import one_matrix, over_repeated, repeated
from lowbit.codegen.triton.interpret import Call, run_interpreted
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.weights import unpack_weights

SM_90 = Target("cuda", "sm_90")
CASES = [("bcq2.g64", 200), ("bcq3.g48.f32", 160), ("bcq2.ch", 96), ("bcq4.g128.e8m0", 256)]


def spec_of(fmt: str, k: int, layout: str) -> KernelSpec:
    return KernelSpec((33, 20), k, fmt, str(LAYOUTS[layout]), "float", "bf16", "f32")


@pytest.mark.parametrize("layout", ["panel16", "words", "fragments"])
@pytest.mark.parametrize(("fmt", "k"), CASES)
def test_packed_operands_are_those_of_one_plain_matrix(fmt: str, k: int, layout: str) -> None:
    spec = spec_of(fmt, k, layout)
    weight, flat = sample_weight(spec), one_matrix(spec)
    back = unpack_weights(weight)
    assert torch.equal(torch.cat([q.dequantize() for q in back]), decode_weight(weight))
    assert flat.blocks == spec.blocks
    assert flat.groups == spec.groups
    assert flat.operands == spec.operands
    plain = decode_weight(replace(weight, fmt=flat.weight_format, k=flat.k))
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(repeated(spec, x) @ plain.T, x @ decode_weight(weight).T, atol=1e-4)


def test_formats_without_terms_are_left_alone() -> None:
    spec = spec_of("int2.g64.sym", 128, "words")
    assert one_matrix(spec) is spec


@pytest.mark.parametrize(("fmt", "k"), CASES)
@pytest.mark.parametrize("m", [1, 5])
def test_cuda_kernels(fmt: str, k: int, m: int) -> None:
    layer = Layer.make(cuda_spec(fmt, (33, 20), k, epilogue=("bias",)))
    schedule = next(iter(load_backend("cuda").schedules(layer.spec, SM_90, m)))
    if schedule.get("wgmma", 0):
        schedule = Schedule(16, 64, 64, 2, 3)
    emulation = Emulation(make_plan(core_spec(layer.spec), schedule))
    run = over_repeated(layer.spec, lambda *args: emulation.launch(*args, 3))
    (x, _), out = layer.inputs(m), torch.full((m, 53), float("nan"))
    run(x, layer.weight, layer.bias, None, out)
    want = run_reference(layer.spec, x, layer.weight, layer.bias)
    assert float((out - want).norm() / want.norm()) < 3e-3


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels() -> None:
    calls, wanted = [], []
    for (fmt, k), m in zip(CASES, (1, 5, 17, 2), strict=True):
        spec = spec_of(fmt, k, "words")
        weight, flat = sample_weight(spec), one_matrix(spec)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
        whole = replace(weight, fmt=flat.weight_format, k=flat.k)
        schedule = next(iter(load_backend("triton").schedules(spec, SM_90, m)))
        calls.append(Call(flat, schedule, repeated(spec, x), whole))
        wanted.append(run_reference(spec, x, weight))
    for got, want in zip(run_interpreted(calls), wanted, strict=True):
        assert float((got - want).norm() / want.norm()) < 6e-3


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_rounded_activations_are_declined(name: str) -> None:
    backend, layout = load_backend(name), "fragments" if name == "cuda" else "words"
    assert backend.supports(spec_of("bcq2.g64", 128, layout), SM_90) is None
    rounded = replace(spec_of("bcq2.g64", 128, layout), activation="int8.token")
    assert "repeated" in str(backend.supports(rounded, SM_90))


def test_rounded_rows_are_declined() -> None:
    with pytest.raises(KernelError, match="LB0422"):
        replace(spec_of("bcq2.g64", 128, "panel16"), activation="int8.token", compute="int8", x_dtype="rounded")
    spec = replace(spec_of("bcq2.g64", 128, "panel16"), activation="int8.g64", compute="int8")
    assert "one scale per token" in str(spec.rounding_problem)
