"""Generated C++ kernels with rounded activations, against `ActivationFormat` and 64-bit integer sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _cpp import BACKEND, DTYPES, Job, build, error, finished, launch, spec_of, tensors_of

from lowbit.codegen.backend import Launcher
from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.reference.backend import prepare_activations
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import CPU_ISAS, Target, host_target, isa_runs_here
from lowbit.quantizers.formats import parse_activation
from lowbit.quantizers.qtensor import PackedWeight, QTensor
from lowbit.quantizers.weights import pack_weights

pytestmark = pytest.mark.skipif(
    BACKEND.available(host_target()) is not None, reason=str(BACKEND.available(host_target()))
)
HOST = host_target().arch
ARCHES = [a for a in CPU_ISAS if isa_runs_here(a)]
TOKENS = (0, 1, 2, 3, 7, 17, 33)
LIMIT = 2e-6
SILU = ("silu_mul",)

# (weights, activations, products, N, K, M class, more): formats, group sizes that do and do not divide K, static
# scales, clips, small floats, orders of columns and rotations; both kernel shapes.
CASES = [
    ("int8.ch.asym.f32", "int8.token", "int8", 33, 576, 17, {}),
    ("int4.g128.asym.i8ch", "int8.token", "int8", 33, 576, 1, {}),
    ("int4.g64.sym.perm", "int4.g64.w3.c90", "int8", 17, 200, 1, {}),
    ("int3.g48.fz", "int8.g96", "int8", 17, 200, 17, {}),
    ("int8.ch.sym.perm", "int8.token.w64x16", "int8", 17, 200, 17, {}),
    ("int4.g64.asym", "int8.g64.w2x16.c90", "int8", 17, 200, 1, {}),
    ("int4.g32.fz", "int4.token.w32x16.static", "int8", 17, 100, 17, {}),
    ("e2m1.ch", "int8.token.w32", "float", 17, 100, 1, {}),
    ("int4.g16.asym", "int6.g32.static", "int8", 17, 100, 1, {}),
    ("e3m2.ch", "int8.g64", "int8", 17, 160, 1, {"rotate": 32}),
    ("int4.g64.sym.perm", "int4.g64.w1.asym", "int8", 17, 200, 17, {}),
    ("int4.ch.asym", "int5.token.c90.asym", "int8", 17, 100, 1, {}),
    ("e2m1.ch", "int4.g32.asym", "float", 17, 100, 1, {}),
    ("int4.g48.sym", "int8.g64", "float", 17, 200, 1, {}),
    ("int4.g32.sym.perm", "e2m1.g16.c90", "float", 17, 128, 1, {"rotate": 64, "x_dtype": "bf16"}),
    ("e4m3.ch", "e5m2.g48.static", "float", 17, 100, 17, {}),
    ("int4.g32.sym.perm", "", "int16", 17, 192, 1, {"rotate": 32}),
]


def spec_for(fmt: str, activation: str, compute: str, n: int, k: int, **rest: object) -> KernelSpec:
    return spec_of(fmt, compute, (n,), k, activation=activation, **rest)


def scales_for(spec: KernelSpec) -> torch.Tensor:
    """Static scales that make some activations saturate."""
    assert spec.rounding is not None
    return 2.0 / spec.rounding.tops(spec.k) * (0.5 + torch.arange(spec.rounding.groups(spec.k)) % 3)


def packed(spec: KernelSpec, weights: list[QTensor]) -> PackedWeight:
    weight = pack_weights(weights, spec.layout_)
    if spec.rounding is not None and spec.rounding.static:
        weight = replace(weight, tensors={**weight.tensors, "input_scale": scales_for(spec)})
    return weight


def call(run: Launcher, spec: KernelSpec, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    out = torch.full((x.shape[0], spec.n_out), float("nan"), dtype=DTYPES[spec.out_dtype])
    run(x.contiguous(), weight, None, None, out)
    return out


def wanted(spec: KernelSpec, x: torch.Tensor, weights: list[QTensor], weight: PackedWeight) -> torch.Tensor:
    """float64: the definition of rotation, order and rounding, times the dequantized matrix in stored order."""
    dense = torch.cat([w.dequantize() for w in weights]).double()
    if weights[0].perm is not None:
        dense = dense[:, weights[0].perm.long()]
    return prepare_activations(spec, x, weight).double() @ dense.T


def test_kernels_compute_with_rounded_activations() -> None:
    jobs = [Job(spec_for(*case[:5], **case[6]), HOST, case[5]) for case in CASES]
    for job, run in zip(jobs, build(jobs), strict=True):
        spec, weights = job.spec, tensors_of(job.spec)
        weight = packed(spec, weights)
        for m in TOKENS:
            x = torch.randn(m, spec.k, generator=torch.Generator().manual_seed(m)).to(DTYPES[spec.x_dtype])
            limit = LIMIT if spec.activation else 3e-4  # two digits a chunk
            assert error(call(run, spec, x, weight), wanted(spec, x, weights, weight)) < limit, (spec.key(), m)


@pytest.mark.parametrize("arch", [pytest.param(a, marks=[] if a == HOST else pytest.mark.slow) for a in ARCHES])
def test_sums_of_integers_are_exact(arch: str) -> None:
    """Integer inputs under scales of 1 give integers below 2**24, equal to 64-bit sums; extremes included."""
    cases = [("int8.ch.asym.f32", "int8.token.static", 200), ("int4.g64.sym.f32", "int4.g64.w1.static", 320)]
    jobs = [Job(spec_for(fmt, a, "int8", 33, k), arch, m) for (fmt, a, k), m in zip(cases, (1, 17), strict=True)]
    for job, run in zip(jobs, build(jobs), strict=True):
        spec = job.spec
        assert spec.rounding is not None
        (q,) = tensors_of(spec)
        q.scale.fill_(1.0)
        q.codes[:3], q.codes[3:6] = 0, 2**spec.fmt.bits - 1
        if q.zero is not None:
            q.zero[::2] = 0
        weight = pack_weights([q], spec.layout_)
        weight = replace(weight, tensors={**weight.tensors, "input_scale": torch.ones(spec.rounding.groups(spec.k))})
        x = torch.randint(-130, 131, (9, spec.k), generator=torch.Generator().manual_seed(3)).float()
        x[0], x[1] = 127.0, -128.0
        levels, _ = spec.rounding.round(x, torch.ones(spec.rounding.groups(spec.k)))
        want = levels.to(torch.int64) @ q.dequantize().to(torch.int64).T
        assert want.abs().max() < 2**24
        assert torch.equal(call(run, spec, x, weight).to(torch.int64), want)


@pytest.mark.parametrize("arch", [a for a in dict.fromkeys((HOST, "avx2")) if isa_runs_here(a)])
def test_sums_of_several_chunks_are_carried_where_they_fit(arch: str) -> None:
    """Codes where they stand, two digits, offsets, zero points, magnitudes and signs: one conversion a group."""
    cases: list[tuple[str, int, int, dict[str, object]]] = [
        ("int8.ch.sym", 1, 700, {}),
        ("int4.ch.asym.perm", 2, 700, {}),
        ("e3m2.ch", 1, 420, {"x_dtype": "bf16"}),
        ("int2.g512.fz", 2, 1100, {}),
        ("int3.g256.asym", 1, 700, {}),
        ("e2m3.ch", 2, 300, {"rotate": 4}),
    ]
    jobs = [
        Job(spec_of(f, "int8", (33,), k, arch, activation="int8.token", **rest), arch, m) for f, m, k, rest in cases
    ]
    jobs += [Job(spec_of("int8.ch.asym", "int8", (24, 24), 400, arch, activation="int8.token", epilogue=SILU), arch, 2)]
    for job, run in zip(jobs, build(jobs), strict=True):
        spec, weights, plan = job.spec, tensors_of(job.spec), Plan(job.spec, job.chosen())
        assert plan.carried or plan.lut or (plan.words and plan.magnitudes)
        for m in (1, 2, 3, 7):
            x = torch.randn(m, spec.k, generator=torch.Generator().manual_seed(m)).to(DTYPES[spec.x_dtype])
            weight = packed(spec, weights)
            want = finished(spec, wanted(spec, x, weights, weight), torch.empty(0), torch.empty(0))
            assert error(call(run, spec, x, weight), want) < LIMIT, (spec.format, m)
    short, long = (Plan(spec_for("e3m2.ch", "int8.token", "int8", 16, k), Schedule()) for k in (37000, 38000))
    assert (short.carried, long.carried) == (True, False)
    for rounding in ("int8.g128", "int8.token.w256x16"):
        assert not Plan(spec_for("int8.ch.sym", rounding, "int8", 16, 512), Schedule()).carried


def test_a_row_that_is_not_finite_is_nan_and_no_other() -> None:
    for fmt, m in (("int8.ch.sym", 1), ("int4.g64.asym", 1), ("int2.g64.fz", 17)):
        spec = spec_for(fmt, "int8.token", "int8", 33, 300)
        (run,), weights = build([Job(spec, HOST, m)]), tensors_of(spec)
        x = torch.randn(3, 300)
        x[1, 5] = float("inf")
        got = call(run, spec, x, packed(spec, weights))
        assert torch.isnan(got[1]).all()
        assert torch.isfinite(got[[0, 2]]).all()


def test_maps_of_precision_agree_where_they_must() -> None:
    """No wide group is plain int4; all groups wide is int8; a permuted layer equals the plain one; threads agree."""
    k, names = 320, ("int4.g64", "int4.g64.w5", "int8.g64", "int4.g64.w2")
    specs = [spec_for("int4.g64.sym", a, "int8", 70, k) for a in names]
    ordered = spec_for("int4.g64.sym.perm", "int4.g64.w2", "int8", 70, k)
    runs = build([Job(s, HOST, 17) for s in [*specs, ordered]])
    (q,) = tensors_of(specs[0])
    x = torch.randn(19, k, generator=torch.Generator().manual_seed(5))
    none, every, int8, some = (call(r, s, x, packed(s, [q])) for r, s in zip(runs, specs, strict=False))
    assert torch.equal(every, int8)
    levels, steps = parse_activation("int4.g64").round(x)
    assert levels.abs().max() <= 8
    want = (levels * steps.repeat_interleave(64, -1)).double() @ q.dequantize().double().T
    assert error(none, want) < LIMIT
    assert not torch.equal(some, none)
    perm = torch.randperm(k, generator=torch.Generator().manual_seed(1))
    shuffled = torch.empty_like(x)
    shuffled[:, perm] = x  # column j of the stored order is column perm[j] of the input
    assert torch.equal(call(runs[-1], ordered, shuffled, packed(ordered, [q.in_order(perm)])), some)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(call(runs[3], specs[3], x, packed(specs[3], [q])), some)
    finally:
        torch.set_num_threads(before)


def test_values_that_are_not_finite_reach_only_their_own_token() -> None:
    spec = spec_for("int4.g32.asym", "int8.token", "int8", 17, 100)
    weights, (run,) = tensors_of(spec), build([Job(spec, HOST, 1)])
    x = torch.randn(4, 100)
    clean = launch(run, spec, x, weights)
    x[1, 40], x[2, 99] = float("nan"), float("inf")
    got = launch(run, spec, x, weights)
    assert torch.equal(got[[0, 3]], clean[[0, 3]])
    assert got[[1, 2]].isnan().all()
    assert not launch(run, spec, torch.full((4, 100), 1e-38), weights).any()


def test_groups_that_do_not_nest_are_refused_with_the_reason() -> None:
    target = Target("cpu", HOST)
    why = BACKEND.supports(spec_for("int4.g48.sym", "int8.g64", "int8", 17, 192), target)
    assert "groups of 48 weights" in str(why)
    why = BACKEND.supports(spec_for("int4.ch.sym", "int8.g48", "int8", 17, 192), target)
    assert "multiple of 32" in str(why)
    assert "power of two" in str(BACKEND.supports(spec_for("int4.ch.sym", "", "int8", 17, 192, rotate=96), target))
    for activation, compute in (("e4m3.token", "int8"), ("int8.token", "int16")):
        with pytest.raises(KernelError, match="LB0416"):
            spec_for("int4.ch.sym", activation, compute, 17, 192)


def test_specs_without_rounding_keep_their_names() -> None:
    spec = spec_of("int4.ch.sym", "int8", (17,), 64)
    assert "activation" not in spec.key()
    assert "int8.token" in replace(spec, activation="int8.token").key()
