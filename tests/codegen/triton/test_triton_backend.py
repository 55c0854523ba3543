"""The Triton backend without Triton: printing, schedules, predictions, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.codegen.backend import Source
from lowbit.codegen.decode import decode_program
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton import gpus, model, space
from lowbit.codegen.triton.backend import TritonBackend
from lowbit.codegen.triton.emitter import emit_source, kernel_args
from lowbit.codegen.triton.table import Printer
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.program import program
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import catalog, parse_format

WORDS = str(LAYOUTS["words"])
HOPPER, AMPERE = Target.parse("sm_90"), Target.parse("sm_80")


def spec(
    fmt: str = "int4.g128.sym", n: int = 4096, k: int = 4096, compute: str = "float", **rest: object
) -> KernelSpec:
    return KernelSpec((n,), k, fmt, WORDS, compute, "bf16", "bf16", **rest)  # type: ignore[arg-type]


def test_importing_the_backend_does_not_import_triton() -> None:
    code = (
        "import sys, lowbit.codegen.triton.backend as b, lowbit.codegen.triton.interpret\n"
        "from lowbit.compiler.ir.target import Target\n"
        "backend = b.TritonBackend(); backend.available(Target.parse('sm_90'))\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unavailable_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("lowbit.codegen.triton.backend.find_spec", lambda name: object())
    assert TritonBackend().available(HOPPER) == "torch finds no CUDA device"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TritonBackend().available(HOPPER) is None
    assert "older than sm_80" in str(TritonBackend().available(Target.parse("sm_75")))
    monkeypatch.setattr("lowbit.codegen.triton.backend.find_spec", lambda name: None)
    assert TritonBackend().available(HOPPER) == "triton is not installed"


def test_refuses_what_it_does_not_run() -> None:
    backend = TritonBackend()
    assert backend.supports(spec(), HOPPER) is None
    assert "for CPUs" in str(backend.supports(spec(compute="int16"), HOPPER))
    other = KernelSpec((64,), 64, "int4.g32.sym", str(LAYOUTS["panel16"]), "float")
    assert "layout" in str(backend.supports(other, HOPPER))
    assert "words" in str(backend.supports(spec(n=1 << 20, k=1 << 15), HOPPER))
    with pytest.raises(KernelError, match=r"LB0440.*powers of two"):
        backend.emit(spec(), Schedule(16, 48, 64, 4, 2), HOPPER)


@pytest.mark.parametrize("fmt", [f for f in catalog() if not f.offset or f.bits in (2, 3, 4, 8)], ids=str)
def test_every_format_has_schedules_and_source(fmt: object) -> None:
    backend = TritonBackend()
    for m in (1, 64):
        s = spec(str(fmt), 512, 1000)
        best = next(iter(backend.schedules(s, AMPERE, m)))
        source = backend.emit(s, best, AMPERE)
        compile(source.text, "module", "exec")
        assert source == backend.emit(s, best, AMPERE)
        assert f"def kernel({', '.join(kernel_args(s, best))})" in source.text


def test_source_contains_nothing_of_the_format_but_constants() -> None:
    """Two formats of the same bits whose decode differs give different text by their programs alone."""
    sym, asym = (emit_source(spec(f"int4.g128.{s}"), Schedule(16, 64, 64, 4, 2)) for s in ("sym", "asym"))
    assert "zero_ptr" in asym
    assert "zero_ptr" not in sym
    assert "8388616.0" in sym
    assert "8388608.0" in asym


def test_compile_stores_python_and_refuses_what_is_not(tmp_path: Path) -> None:
    backend = TritonBackend()
    backend.compile(Source("x = 1\n", ".py"), tmp_path / "k.py")
    assert (tmp_path / "k.py").read_text() == "x = 1\n"
    with pytest.raises(KernelError, match="LB0410"):
        backend.compile(Source("def (\n", ".py"), tmp_path / "bad.py")


def printed(fmt: str, args: dict[str, str]) -> str:
    lines: list[str] = []
    text = Printer(lines, "").run(decode_program(parse_format(fmt)), args)
    return "; ".join([*lines, text])


def test_fields_stay_where_they_are() -> None:
    args = {"w0": "w", "scale": "1.0"}
    assert (
        printed("int4.ch.sym", args | {"s0": "8"}) == "(((w & 3840) | magic_8).to(tl.float32, bitcast=True) - 32776.0)"
    )
    high = printed("int4.ch.sym", args | {"s0": "20"})
    assert high == "((((w >> 16) & 240) | magic_4).to(tl.float32, bitcast=True) - 524296.0)"


def test_an_offset_is_one_more_addition() -> None:
    args = {"w0": "w", "s0": "0"}
    text = printed("int2.ch.fz", args | {"scale": "s", "offset": "o"})
    assert text == "((((w & 3) | magic_0).to(tl.float32, bitcast=True) - 8388610.0) * s + o)"
    bare = printed("int2.ch.fz", args | {"scale": "1.0", "offset": "0.0"})
    assert bare == printed("int2.ch.sym", args | {"scale": "1.0"})
    gemv = Schedule(1, 64, 64, 4, 2).with_extra(gemv=1, scale_after=1)
    assert list(kernel_args(spec("int2.g64.fz"), gemv))[:4] == ["x_ptr", "w0_ptr", "scale_ptr", "offset_ptr"]
    assert "total_0[None, :] * offset" in emit_source(spec("int2.g64.fz"), gemv)
    assert "total_0" not in emit_source(spec("int2.g64.sym"), gemv)


def test_planes_are_aligned_by_one_shift() -> None:
    args = {"w0": "a", "s0": "4", "w1": "b", "s1": "9", "zero": "z", "scale": "s"}
    text = printed("int3.ch.asym", args)
    assert text == "(((((a & 48) | ((b >> 3) & 64)) | magic_4).to(tl.float32, bitcast=True) - (z + 524288.0)) * s)"


def test_a_made_up_table_element_prints_and_evaluates() -> None:
    """A format nobody wrote yet: 2-bit codes that stand for table entries."""
    p = program("w0", "s0", "scale")
    code = p.and_(p.shr(p.arg("w0"), p.arg("s0")), p.int(3))
    p.result(p.mul(p.lut(code, (-1.5, -0.25, 0.5, 3.0)), p.arg("scale")))
    lines: list[str] = []
    text = Printer(lines, "").run(p.done(), {"w0": "word", "s0": "6", "scale": "2.0"})
    for code_value, want in enumerate((-3.0, -0.5, 1.0, 6.0)):
        names = {"word": (code_value << 6) | 0x3F, "tl": Fake}
        for line in lines:
            exec(line, names)
        assert eval(text, names) == want


class Fake:
    """Just enough of triton.language to evaluate a printed expression on numbers."""

    @staticmethod
    def where(condition: bool, a: float, b: float) -> float:
        return a if condition else b


@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=str)
@pytest.mark.parametrize("m", [1, 4, 16, 64, 512, 4096])
def test_schedules_are_legal_and_ordered(target: Target, m: int) -> None:
    s = spec("int4.g64.asym")
    found = space.candidates(s, target, m)
    seconds = [model.predict(s, c, target, m) for c in found]
    assert seconds == sorted(seconds)
    assert all(space.illegal(s, c, target) is None for c in found)
    floor = s.rows * s.k * 4 / 8 / 4.8e12
    assert floor < seconds[0] < 1.0


def test_prediction_grows_with_tokens_and_bits() -> None:
    def best(fmt: str, m: int) -> float:
        s = spec(fmt, 8192, 8192)
        return model.predict(s, space.candidates(s, HOPPER, m)[0], HOPPER, m)

    assert best("int4.g128.sym", 4096) > 4 * best("int4.g128.sym", 256) > best("int4.g128.sym", 1)
    assert best("int8.g128.sym", 1) > best("int4.g128.sym", 1) > best("int2.g128.sym", 1)


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (Schedule(16, 64, 16, 4, 2), "whole blocks"),
        (Schedule(8, 64, 64, 4, 2), "at least 16x16"),
        (Schedule(16, 64, 64, 4, 2, split_k=1000), "cannot be split"),
        (Schedule(256, 256, 256, 8, 4), "shared memory"),
        (Schedule(256, 256, 32, 4, 2), "registers"),
        (Schedule(16, 64, 64, 4, 2).with_extra(gemv=1), "at most 8 tokens"),
    ],
)
def test_reasons_against_schedules(schedule: Schedule, reason: str) -> None:
    assert reason in str(space.illegal(spec(), schedule, HOPPER))


def test_decode_cost_counts_the_program() -> None:
    cost = {f: gpus.decode_instructions(parse_format(f)) for f in ("int4.ch.sym", "int3.ch.sym", "int7.ch.asym")}
    assert cost["int4.ch.sym"] < cost["int3.ch.sym"] < cost["int7.ch.asym"] < 12


def test_decode_cost_counts_an_operation_once() -> None:
    """Values that several operations read, such as a state's hash, are computed once."""
    assert 10 < gpus.decode_instructions(parse_format("tcq2.g64")) < 20
    assert gpus.decode_instructions(parse_format("e3m2.ch")) < 12


@pytest.mark.parametrize("fmt", ["tcq2.g64", "tcq3.ch"])
@pytest.mark.parametrize("m", [1, 16, 512])
def test_schedules_of_trellises(fmt: str, m: int) -> None:
    layout = str(LAYOUTS["words"])
    trellis = KernelSpec((4096,), 4096, fmt, layout, "float", "bf16", "bf16")
    found = list(TritonBackend().schedules(trellis, HOPPER, m))
    assert found
    assert all(TritonBackend().predict(trellis, s, HOPPER, m) > 0 for s in found)
