"""Shapes nobody chose: shards of tensor-parallel models, vocabularies, ragged groups. Every GPU layout pads inside."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from _cuda import Layer
from _cuda import spec_of as cuda_spec

from lowbit.codegen import load_backend
from lowbit.codegen.check import sample_weight
from lowbit.codegen.reference.backend import decode_weight, run_reference
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.interpret import Call, run_interpreted
from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.weights import pack_weights, unpack_weights

# (N, K) as issues of other projects name them: shards of 5632 and 16896 on 8 ranks, a vocabulary, primes.
SHAPES = [(2112, 96), (96, 704), (64, 1408), (49152, 32), (2112, 704), (1, 1), (17, 33), (131, 257), (72, 3520)]
FAMILIES = {
    "integers": ["int4.g128.sym", "int3.g64.asym", "int2.g32.fz", "int5.g48.sym", "int8.ch.sym", "int1.g64.sym"],
    "floats": ["e3m2.ch", "e2m1.g16.e4m3.t32", "e2m1.g32.e8m0", "e4m3.ch", "e2m3.g64", "e2m2.g48.f32"],
    "vectors": ["vq.d4.k16", "vq.d8.k32.r8", "vq.d2.k64", "vq.d3.k16.r8.in.rn"],
}
TARGETS = [Target("cuda", "sm_80"), Target("cuda", "sm_90")]


def layouts(fmt: str) -> list[str]:
    """The packed layouts of GPU kernels that hold a format."""
    return ["vectors"] if fmt.startswith("vq") else ["fragments", "words"]


def spec_of(fmt: str, layout: str, segments: tuple[int, ...], k: int) -> KernelSpec | None:
    """A layer in bfloat16, or None where the format does not fit the shape."""
    try:
        for n in segments:
            parse_format(fmt).check(n, k, "shape")
    except FormatError:
        return None
    return KernelSpec(segments, k, fmt, str(LAYOUTS[layout]), "float", "bf16", "f32")


def check_packing(spec: KernelSpec) -> None:
    """Packing is undone to the bit, and what is packed decodes to the matrix."""
    weight = sample_weight(spec)
    back = unpack_weights(weight)
    assert [q.shape for q in back] == [(n, spec.k) for n in spec.segments]
    assert torch.equal(torch.cat([q.dequantize() for q in back]), decode_weight(weight))
    again = pack_weights(back, spec.layout_)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in weight.tensors.items())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", ["int4.g128.sym", "int3.g64.asym", "e3m2.ch", "vq.d4.k16"])
def test_packing_named_shapes(fmt: str, shape: tuple[int, int]) -> None:
    found = [spec_of(fmt, layout, (shape[0],), shape[1]) for layout in layouts(fmt)]
    if fmt.endswith("ch"):
        assert all(found)
    for spec in filter(None, found):
        check_packing(spec)


@pytest.mark.parametrize("shape", [(2112, 704), (49152, 1408), (7, 704)], ids=str)
def test_some_kernel_takes_every_shape(shape: tuple[int, int]) -> None:
    for target in TARGETS:
        spec = cuda_spec("int4.g128.sym", (shape[0],), shape[1])
        schedule = next(iter(load_backend("cuda").schedules(spec, target, 3)))
        assert "lb_kernel" in load_backend("cuda").emit(spec, schedule, target).text


@pytest.mark.parametrize(
    "shape",
    [(70, 704), *[pytest.param(s, marks=pytest.mark.slow) for s in ((2112, 192), (33, 1408), (130, 3520))]],
    ids=str,
)
def test_emulated(shape: tuple[int, int]) -> None:
    spec = cuda_spec("int4.g128.asym", (shape[0],), shape[1])
    schedule = next(iter(load_backend("cuda").schedules(spec, TARGETS[1], 3)))
    assert Layer.make(spec).error(schedule, 3) < 1e-2


def draw(family: str, seed: int) -> KernelSpec:
    """An odd shape in some format of a family, and some layout that holds it."""
    r = random.Random(f"{family} {seed}")
    while True:
        fmt = r.choice(FAMILIES[family])
        unit = 8 if family == "vectors" else 1  # vectors are whole
        segments = tuple(unit * r.randrange(1, 200 // unit) for _ in range(r.choice((1, 1, 2, 3))))
        spec = spec_of(fmt, r.choice(layouts(fmt)), segments, r.randrange(1, 400))
        if spec is not None:
            return spec


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [12, pytest.param(320, marks=pytest.mark.slow)])
def test_packing_odd_shapes(family: str, count: int) -> None:
    for seed in range(count):
        check_packing(draw(family, seed))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_interpreted_odd_shapes(family: str) -> None:
    """320 shapes of each family through Triton's kernels, a few tokens each."""
    backend, calls, wants = load_backend("triton"), [], []
    for seed in range(320):
        spec = draw(family, 10_000 + seed)
        spec = replace(spec, layout=str(LAYOUTS[backend.layout_of(spec.weight_format)]))
        if backend.supports(spec, TARGETS[0]):
            continue
        m, rng = 1 + seed % 5, torch.Generator().manual_seed(seed)
        weight, x = sample_weight(spec, seed), torch.randn(m, spec.k, generator=rng).bfloat16()
        calls.append(Call(spec, next(iter(backend.schedules(spec, TARGETS[0], m))), x, weight))
        wants.append(run_reference(spec, x, weight))
    assert len(calls) >= 300
    for call, got, want in zip(calls, run_interpreted(calls), wants, strict=True):
        scale = (call.x.float() @ decode_weight(call.weight).T).square().mean().sqrt().clamp_min(1e-6)
        assert float((got - want).square().mean().sqrt() / scale) < 2e-2, call.spec.key()
