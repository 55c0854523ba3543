"""The C++ backend's choices, texts and refusals, and a format it has never heard of."""

from __future__ import annotations

import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from _cpp import BACKEND, Job, build, error, expected, launch, spec_of, tensors_of

import lowbit.quantizers.formats as formats
from lowbit.codegen.backend import Source
from lowbit.codegen.cpp.expr import Node, Printer, name, number
from lowbit.codegen.cpp.expr import build as build_expression
from lowbit.codegen.cpp.plan import Plan
from lowbit.codegen.cpp.products import InPlaceProducts
from lowbit.codegen.decode import extract_program
from lowbit.codegen.schedule import M_CLASSES, Schedule
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.program import Program, program
from lowbit.compiler.ir.target import CPU_ISAS, Target, host_target
from lowbit.quantizers.formats import Element

needs_compiler = pytest.mark.skipif(BACKEND.available(host_target()) is not None, reason="no C++ compiler")
HOST = host_target()


@dataclass(frozen=True)
class Levels(Element):
    """A made-up element: `bits` wide, with uneven levels."""

    bits: int
    symmetric: bool = True

    @property
    def name(self) -> str:
        return f"levels{self.bits}"

    @property
    def integer(self) -> bool:
        return False

    def levels(self) -> torch.Tensor:
        return torch.tensor([(-1.0) ** c * (0.3 + c * c / 7) for c in range(2**self.bits)])

    def decode(self) -> Program:
        p = program("code")
        p.result(p.lut(p.arg("code"), tuple(self.levels().tolist())))
        return p.done()


@needs_compiler
def test_a_new_element_runs_without_any_change_to_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(text: str, symmetric: bool) -> Levels | None:
        return Levels(int(text[6:])) if text.startswith("levels") else None

    monkeypatch.setattr(formats, "ELEMENTS", [*formats.ELEMENTS, formats.ElementFamily(parse, ("levels5",))])
    jobs = [
        Job(spec_of(f"levels{bits}.g32.sym", "float", (17,), 100), arch, m)
        for bits, arch, m in [(2, HOST.arch, 17), (5, HOST.arch, 1), (6, "generic", 1)]
    ]
    for job, run in zip(jobs, build(jobs), strict=True):
        weights, x = tensors_of(job.spec), torch.randn(5, 100)
        assert error(launch(run, job.spec, x, weights), expected(job.spec, x, weights)) < 2e-6


@pytest.mark.parametrize("bits", range(1, 8))
def test_codes_multiplied_where_they_stand_are_multiples_of_the_code(bits: int) -> None:
    """Every step's expression, run on bytes, is the code times the power of two that its accumulator stands for."""
    plan = Plan(spec_of(f"int{bits}.g128.asym", "int16", (16,), 128), Schedule(1, 16).with_extra(residues=4))
    form = InPlaceProducts(plan)
    assert form.shifts[0] == 0
    assert len(form.shifts) == len(set(form.shifts)) <= 4

    def run(node: Node, bytes_: dict[str, int]) -> int:
        args, value = [run(a, bytes_) for a in node.args], node.value
        if node.op == "name":
            return bytes_[str(value)]
        if node.op == "shift":
            return args[0] >> value if value > 0 else args[0] << -value
        return args[0] & value if node.op == "mask" else args[0] & value | args[1]

    for step in range(form.steps):
        node = form.code(step)
        for code in range(2**bits):
            low, bytes_ = 0, {}
            for j, width in enumerate(plan.planes):  # the code's bits in their place, all others set
                vector, slot = divmod(step, 8 // width)
                mask = (1 << width) - 1
                part = code >> low & mask
                bytes_[f"w{j}_{vector}"] = 255 & ~(mask << slot * width) | part << slot * width
                low += width
            assert run(node, bytes_) == code << form.shifts[form.accumulator(step)] <= 255


@needs_compiler
def test_threads_of_one_process_do_not_share_scratch() -> None:
    spec = spec_of("int4.g32.sym", "int16", (64,), 320)
    (run,) = build([Job(spec, HOST.arch, 16)])
    weights = tensors_of(spec)
    inputs = [torch.randn(20 + i, 320) for i in range(4)]
    want = [launch(run, spec, x, weights) for x in inputs]
    bad: list[int] = []

    def body(i: int) -> None:
        for _ in range(20):
            if not torch.equal(launch(run, spec, inputs[i], weights), want[i]):
                bad.append(i)

    pool = [threading.Thread(target=body, args=(i,)) for i in range(4)]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    assert not bad


@needs_compiler
def test_only_the_entry_point_is_visible(tmp_path: Path) -> None:
    spec = spec_of("int4.g32.sym", "int8", (16,), 32)
    artifact = tmp_path / "k.so"
    BACKEND.compile(BACKEND.emit(spec, Schedule(1, 16), HOST), artifact)
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    import subprocess

    listed = subprocess.run([nm, "-D", "--defined-only", artifact], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in listed.splitlines()] == ["lb_run"]


@needs_compiler
def test_the_compilers_words_are_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"LB0410.*no_such_thing"):
        BACKEND.compile(Source("int x = no_such_thing;", ".so", ("-shared",)), tmp_path / "k.so")
    assert not (tmp_path / "k.so").exists()


@needs_compiler
def test_mismatched_weights_and_outputs_are_refused() -> None:
    spec = spec_of("int4.g32.sym", "int8", (16,), 32)
    (run,) = build([Job(spec, HOST.arch, 1)])
    x = torch.randn(2, 32)
    with pytest.raises(KernelError, match="LB0415"):
        launch(run, spec, x, tensors_of(spec_of("int4.g32.sym", "int8", (17,), 32)))


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in (BACKEND.available(HOST) or "")
    with pytest.raises(KernelError, match="LB0413"):
        BACKEND.toolchain()
    assert BACKEND.available(Target("cuda", "sm_90")) is not None


def test_text_is_a_pure_function_without_strings_from_outside() -> None:
    spec = spec_of("int3.g48.asym", "int16", (40, 8), 100, epilogue=("bias",))
    for arch in CPU_ISAS:
        target = Target("cpu", arch)
        for m in (1, 64):
            schedule = next(iter(BACKEND.schedules(spec, target, m)))
            source = BACKEND.emit(spec, schedule, target)
            assert source == BACKEND.emit(spec, schedule, target)
            assert spec.digest() in source.text
            assert "-march=native" not in source.flags
            assert "-ffast-math" not in source.flags


def test_epilogue_orders_that_have_no_meaning_are_refused() -> None:
    for order in (("silu_mul", "bias"), ("residual", "silu_mul"), ("bias", "bias")):
        segments = (16, 16) if "silu_mul" in order else (16,)
        assert BACKEND.supports(spec_of("int4.ch.sym", "int8", segments, 32, epilogue=order), HOST) is not None
    assert BACKEND.supports(spec_of("int4.ch.sym", "int8", (16, 16), 32, epilogue=("bias", "silu_mul")), HOST) is None
    with pytest.raises(KernelError, match="LB0412"):
        Plan(spec_of("int4.ch.sym", "int8", (16, 16), 32, epilogue=("silu_mul",)), Schedule(1, 16))


def test_schedules_are_legal_ranked_and_cover_every_class() -> None:
    for arch in CPU_ISAS:
        target = Target("cpu", arch)
        for compute in ("int8", "int16", "float"):
            for epilogue in ((), ("silu_mul",)):
                spec = spec_of("int4.g128.asym", compute, (576, 576), 576, epilogue=epilogue)
                for m in M_CLASSES:
                    found = list(BACKEND.schedules(spec, target, m))
                    times = [BACKEND.predict(spec, s, target, m) for s in found]
                    assert 1 <= len(found) <= 8
                    assert times == sorted(times)
                    assert times[0] > 0
                    assert all(Plan(spec, s).units > 0 for s in found)


def test_predictions_grow_with_bytes_and_tokens() -> None:
    def best(bits: int, m: int) -> float:
        spec = spec_of(f"int{bits}.g128.sym", "int8", (4096,), 4096)
        return min(BACKEND.predict(spec, s, HOST, m) for s in BACKEND.schedules(spec, HOST, m))

    assert best(2, 1) < best(4, 1) < best(8, 1)
    assert best(4, 1) < best(4, 8) < best(4, 64) < best(4, 512)


@pytest.mark.parametrize("bits", range(1, 9))
def test_extraction_is_printed_in_few_operations(bits: int) -> None:
    """At most a shift and a mask for each plane, the combining `or` included."""
    args = {}
    for i, width in enumerate(w for w in (8, 4, 2, 1) if bits & w):
        args[f"w{i}"], args[f"s{i}"] = name(f"w{i}"), number(8 - width)
    text = Printer("bytes").text(build_expression(extract_program(*(w for w in (8, 4, 2, 1) if bits & w)), args))
    planes = bin(bits).count("1")
    assert len(re.findall(r"\b(shr|shl)<", text)) <= planes
    assert len(re.findall(r"\b(vand|and_or|vor)\(", text)) == (0 if bits == 8 else planes)
