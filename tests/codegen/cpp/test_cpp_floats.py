"""C++ kernels of formats that are not integers: multiplied as integers where that is exact, else as float16."""

from __future__ import annotations

import pytest
import torch
from _cpp import BACKEND, DTYPES, Job, build, error, expected, launch, spec_of, tensors_of

from lowbit.codegen.cpp.expr import Printer, by_table, name
from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.schedules import schedules
from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import CPU_ISAS, host_target, isa_runs_here
from lowbit.compiler.runtime.build import TOLERANCE
from lowbit.compiler.runtime.modules import default_compute
from lowbit.quantizers.formats import LevelElement, catalog, exact_integers, parse_format
from lowbit.quantizers.formats.scaled import DIGIT_BITS
from lowbit.quantizers.weights import pack_weights

needs_compiler = pytest.mark.skipif(BACKEND.available(host_target()) is not None, reason="no C++ compiler")
HOST = host_target().arch
LIMIT = 3e-6
TOKENS = (1, 3, 16)

# (format, products, N, K, M class): both kernel shapes, whole and ragged groups, one digit and two, parts of blocks.
CASES = [
    ("e2m1.g32", "int16", 17, 100, 1),
    ("mxfp4", "int8", 40, 160, 16),
    ("nvfp4", "int16", 33, 100, 2),
    ("nvfp4", "int8", 17, 112, 16),
    ("nvfp4", "float", 17, 100, 16),
    ("e2m3.ch", "int16", 33, 100, 16),
    ("e3m2.ch", "int16", 40, 160, 1),
    ("e3m2.g64", "int8", 17, 160, 16),
    ("e3m4.g96", "int16", 17, 300, 3),
    ("int4.g8.asym", "int16", 17, 100, 3),
    ("int4.g16.asym", "int16", 17, 100, 16),
    ("int3.g4.fz", "int8", 17, 60, 16),
    ("int3.g4.fz", "int16", 17, 60, 16),
    ("mxfp4", "int16", 40, 160, 64),
    ("int1.g32.fz", "int16", 17, 100, 1),
    ("e4m3.ch", "float", 33, 160, 3),
    ("e5m2.g64", "float", 17, 100, 16),
    ("e4m3.g16.e4m3.t32", "float", 17, 100, 1),
]
ELSEWHERE = [("e3m2.g64", "int16", 1), ("e2m3.ch", "int8", 16), ("nvfp4", "int16", 3), ("e4m3.g48", "float", 2)]


def check(run, spec: KernelSpec) -> None:  # type: ignore[no-untyped-def]
    weights = tensors_of(spec)
    packed = pack_weights(weights, spec.layout_)
    for m in TOKENS:
        x = torch.randn(m, spec.k, generator=torch.Generator().manual_seed(m))
        got = launch(run, spec, x, weights)
        assert error(got, expected(spec, x, weights)) < LIMIT, (spec.format, spec.compute, m)
        want = run_reference(spec, x, packed)
        off = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
        assert off < TOLERANCE[spec.compute], (spec.format, spec.compute, m)


@needs_compiler
def test_sums_are_exact_for_few_and_many_tokens() -> None:
    jobs = [Job(spec_of(fmt, compute, (n,), k), HOST, m) for fmt, compute, n, k, m in CASES]
    for job, run in zip(jobs, build(jobs), strict=True):
        check(run, job.spec)


@needs_compiler
@pytest.mark.parametrize("arch", [a for a in CPU_ISAS if a != HOST and isa_runs_here(a)])
def test_every_instruction_set_this_machine_runs(arch: str) -> None:
    # Vectors that the machine lacks are slow to compile: one small tile.
    small = Schedule(1, 16).with_extra(buffered=1) if arch == "generic" else None
    jobs = [Job(spec_of(fmt, compute, (17,), 100), arch, m, small) for fmt, compute, m in ELSEWHERE]
    words = (small or Schedule(2, 16).with_extra(buffered=int(arch == "avx2"))).with_extra(words=1)
    jobs += [Job(spec_of(fmt, "int16", (17,), 100), arch, 3, words) for fmt in ("e3m2.g64", "nvfp4")]
    for job, run in zip(jobs, build(jobs), strict=True):
        check(run, job.spec)


@needs_compiler
def test_siblings_have_their_own_tensor_scales_and_epilogues() -> None:
    every = ("bias", "silu_mul", "residual")
    jobs = [Job(spec_of("nvfp4", "int16", (24, 24), 96, epilogue=every), HOST, m) for m in (1, 16)]
    jobs += [Job(spec_of("e4m3.g16.e4m3.t32", "float", (24, 24), 96, epilogue=every), HOST, 3)]
    jobs += [Job(spec_of("e3m2.ch", "int16", (17, 24), 100, x_dtype="bf16", epilogue=("bias",)), HOST, 1)]
    for job, run in zip(jobs, build(jobs), strict=True):
        spec, weights = job.spec, tensors_of(job.spec)
        x = torch.randn(5, spec.k, generator=torch.Generator().manual_seed(2)).to(DTYPES[spec.x_dtype])
        bias, residual = torch.randn(sum(spec.segments)), torch.randn(5, spec.n_out)
        want = expected(spec, x, weights, job.chosen()) + bias
        if "silu_mul" in spec.epilogue:
            gate, up = want.chunk(2, dim=1)
            want = torch.nn.functional.silu(gate) * up + residual
        assert error(launch(run, spec, x, weights, bias, residual), want) < 1e-5


@needs_compiler
def test_largest_codes_and_activations_sum_exactly() -> None:
    """Digits of the largest magnitudes of either sign reach the bounds that must not saturate or overflow."""
    arches = [a for a in CPU_ISAS if isa_runs_here(a) and a != "generic"]
    specs = [spec_of(fmt, "int16", (16,), 256) for fmt in ("e3m2.ch.f32", "e2m3.ch.f32", "e3m4.ch.f32")]
    jobs = [Job(spec, arch, 1) for spec in specs for arch in arches]
    jobs += [Job(spec, HOST, 16, Schedule(1, 16).with_extra(buffered=1, words=1)) for spec in specs]
    for job, run in zip(jobs, build(jobs), strict=True):
        spec, weight = job.spec, tensors_of(job.spec)[0]
        levels = spec.fmt.element.levels()
        weight.scale.fill_(1.0)
        for code in (int(levels.argmax()), int(levels.argmin())):
            weight.codes.fill_(code)
            for sign in (1.0, -1.0):
                got = launch(run, spec, torch.full((2, spec.k), sign), [weight])
                want = torch.full_like(got, sign * spec.k * float(levels[code]))
                assert torch.allclose(got, want, rtol=1e-6, atol=0), (spec.format, job.arch)


def test_integers_behind_levels() -> None:
    """Table and bias give back every level; sums of a chunk stay below 2**31 whatever the largest one."""
    for fmt in catalog():
        element, found = fmt.element, fmt.element.integer_levels
        assert found is not None or not element.integer
        if found is None:
            continue
        base = 2**DIGIT_BITS if len(found.digits) == 2 else 0
        total = [sum(d * base ** (len(c) - 1 - i) for i, d in enumerate(c)) for c in zip(*found.digits, strict=True)]
        values = (torch.tensor(total, dtype=torch.float64) - found.bias) * 2.0**found.exponent
        assert torch.equal(values.float(), element.levels())
        assert element.integer == (found.plain and found.exponent == 0 and found.bias == element.bias)
        if exact_integers(fmt) is None:
            continue
        spec = KernelSpec((16,), 512, str(fmt), str(LAYOUTS["panel16"]), "int16")
        assert spec.chunk_blocks * 32 * 127 * 257 * found.largest < 2**31


def test_which_formats_are_multiplied_as_integers() -> None:
    exact = [text for text in ("e2m1.ch", "mxfp4", "nvfp4", "e2m3.ch", "e3m2.ch") if exact_integers(parse_format(text))]
    assert len(exact) == 5
    cpu = torch.device("cpu")
    for text in exact if HOST != "generic" else []:
        assert default_compute(parse_format(text), cpu) == "int16"
    for text in ("e4m3.ch", "e5m2.ch", "vq.d4.k256"):
        assert default_compute(parse_format(text), cpu) == "float"
        with pytest.raises(KernelError, match="LB0402"):
            spec_of(text, "int16", (16,), 64)
    assert LevelElement("odd", (0.1, 1.0)).integer_levels is None
    found = LevelElement("pot", (0.0, 0.25, 0.5, -4.0)).integer_levels
    assert found is not None
    assert (found.integers, found.exponent, found.bias) == ((0, 1, 2, -16), -2, 16)


@pytest.mark.parametrize("text", ["e2m1.ch", "e2m3.ch", "e3m2.ch", "e3m4.ch"])
def test_tables_are_looked_up_by_halves(text: str) -> None:
    """The expression picks the entry of every code, and a mirrored table costs half of its lookups."""
    fmt = parse_format(text)
    levels = exact_integers(fmt)
    assert levels is not None
    size = len(levels.integers)
    bits = [("code", b) for b in range(size.bit_length() - 1)]
    for table in levels.digits:
        node = by_table(table, name("low"), bits[4:])

        def run(n, code: int):  # type: ignore[no-untyped-def]
            if n.op == "lookup":
                return n.value[code & 15]
            here = code >> n.value & 1
            if n.op == "reflect":
                return n.args[2].value - run(n.args[1], code) if here else run(n.args[1], code)
            return run(n.args[1 + here], code)

        assert [run(node, code) for code in range(size)] == list(table)
        assert Printer("bytes").text(node).count("lookup(") <= max(1, size // 32)


def test_schedules_count_every_digit() -> None:
    """A direct kernel of two weight digits keeps four sums for two activation digits, and fewer rows or tokens, or one
    of words where there are several tokens."""
    for text, arch, tokens, sums in (
        ("int6.ch", "avx512vnni", 8, 2),
        ("e3m2.ch", "avx512vnni", 1, 4),
        ("e3m2.ch", "avx512vnni", 8, 1),
        ("e3m2.ch", "avx2", 8, 1),
        ("e3m2.ch", "neondot", 8, 4),
        ("nvfp4", "avx512", 8, 1),
    ):
        spec = spec_of(text, "int16", (4096,), 256)
        for schedule in schedules(spec, arch, tokens):
            plan = Plan(spec, schedule)
            assert len(plan.terms) == sums
            assert plan.words == (sums == 1)
            assert bool(plan.word_table) == (plan.words and arch.startswith("avx512") and text == "e3m2.ch")
            assert plan.buffered or plan.np * plan.tile_m * sums <= 16
    assert Plan(spec_of("e3m2.ch", "int16", (16,), 64), Schedule()).terms == (
        (14, 0, 0),
        (8, 0, 1),
        (6, 1, 0),
        (0, 1, 1),
    )


@needs_compiler
def test_the_smallest_power_of_two_is_a_scale() -> None:
    """Other programs write e8m0 scales of 2**-127, a subnormal float32; large activations show whether it is read."""
    specs = [spec_of(fmt, compute, (17,), 64) for fmt, compute in (("mxfp4", "int16"), ("mxfp8_e4m3", "float"))]
    jobs = [Job(spec, HOST, m) for spec in specs for m in (1, 16)]
    for job, run in zip(jobs, build(jobs), strict=True):
        weight = tensors_of(job.spec)[0]
        weight.scale.fill_(2.0**-127)
        weight.scale[3:] = 2.0**-126
        x = torch.randn(job.m, 64, generator=torch.Generator().manual_seed(0)) * 2.0**120
        want = expected(job.spec, x, [weight])
        assert float(want[:, :3].abs().min()) > 0
        assert error(launch(run, job.spec, x, [weight]), want) < LIMIT
