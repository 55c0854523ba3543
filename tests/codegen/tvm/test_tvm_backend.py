"""The TVM backend's choices, texts and refusals, and what it leaves of the process as it was."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _cpp import error
from _models import random_qtensor
from _tvm import BACKEND, BUFFERED, FEW, HOST, ONE, build, needs_tvm, spec_of
from torch import nn

from lowbit.codegen import load_backend
from lowbit.codegen.backend import Backend, Source
from lowbit.codegen.check import sample_weight
from lowbit.codegen.invariant import one_for_all
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.select import able, candidates, layout_name, say_once
from lowbit.codegen.tune import tuner
from lowbit.codegen.tvm import toolchain
from lowbit.codegen.tvm.plan import READS, CodePart, code_parts, plan_of
from lowbit.codegen.tvm.printing import Expr, Printer
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.program import program
from lowbit.compiler.ir.target import CPU_ISAS, Target
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import catalog, parse_format

GENERIC = Target("cpu", "generic")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "version", missing)
    assert BACKEND.available(HOST) == "apache-tvm is not installed"
    with pytest.raises(KernelError, match=r"LB0453.*pip install apache-tvm"):
        BACKEND.toolchain()
    monkeypatch.setattr(toolchain, "find_spec", lambda name: object())
    assert BACKEND.available(HOST) is None
    assert "for CPUs" in str(BACKEND.available(Target("cuda", "sm_90")))
    other = "avx2" if HOST.arch.startswith("neon") else "neon"
    assert other in str(BACKEND.available(Target("cpu", other)))
    assert "files that run elsewhere" in str(BACKEND.builds(HOST))


def test_refuses_what_it_does_not_run() -> None:
    def why(fmt: str, layout: str = "panel16", segments: tuple[int, ...] = (64,), **rest: object) -> str:
        return str(BACKEND.supports(spec_of(fmt, segments, 64, layout, **rest), HOST))

    assert why("int4.g32.sym") == "None"
    assert "one code per weight" in why("vq.d4.k16", "vectors8")
    assert "trellis" in why("tcq2.g32")
    assert "panels of 16 rows" in why("int4.g32.sym", "words")
    rounded = {"compute": "int8", "activation": "int8.token"}
    assert "rounded between kernels" in why("int4.g32.sym", **rounded, out_activation="int8.g32")
    assert "appears twice" in why("int4.g32.sym", epilogue=("bias", "bias"))
    pair = (32, 32)
    assert "bias comes before it" in why("int4.g32.sym", segments=pair, epilogue=("silu_mul", "bias"))
    assert "residual after it" in why("int4.g32.sym", segments=pair, epilogue=("residual", "silu_mul"))
    assert "32 bits" in str(BACKEND.supports(spec_of("int8.ch.sym", (1 << 20,), 1 << 14), HOST))
    with pytest.raises(KernelError, match=r"LB0450.*whole panels"):
        BACKEND.emit(spec_of("int4.g32.sym", (64,), 64), Schedule(1, 24), HOST)
    with pytest.raises(KernelError, match=r"LB0450.*sums"):
        BACKEND.emit(spec_of("int4.g32.sym", (64,), 64), Schedule(8, 32), HOST)


@pytest.mark.parametrize("fmt", [f for f in catalog() if BACKEND.serves(f) is None], ids=str)
def test_every_format_has_schedules_and_source(fmt: object) -> None:
    spec = spec_of(str(fmt), (512,), 1000)
    for m in (1, 4, 64):
        found = list(BACKEND.schedules(spec, HOST, m))
        times = [BACKEND.predict(spec, s, HOST, m) for s in found]
        assert times == sorted(times)
        assert all(BACKEND.illegal(spec, s, HOST) is None for s in found)
        assert BACKEND.emit(spec, found[0], HOST) == BACKEND.emit(spec, found[0], HOST)


def test_many_tokens_share_decoded_weights_and_few_do_not() -> None:
    for arch in CPU_ISAS:
        best = {
            m: next(iter(BACKEND.schedules(spec_of("int4.g128.sym", (4096,), 4096), Target("cpu", arch), m)))
            for m in (1, 64)
        }
        assert not best[1].get("buffered", 0)
        assert best[1].tile_m == 1
        assert best[64].get("buffered", 0) == 1


@pytest.mark.parametrize("layout", READS, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_where_the_plan_says(layout: object, bits: int) -> None:
    """Every bit of every code of a block of 16 rows, read off packed words."""
    at = next(name for name, known in LAYOUTS.items() if known == layout)
    codes = torch.randint(0, 2**bits, (16, 32), dtype=torch.uint8)
    planes = [plane.view(torch.int32).long() & 0xFFFFFFFF for plane in LAYOUTS[at].pack(codes, bits)]
    for column, parts in enumerate(code_parts(LAYOUTS[at], bits)):
        found, low = torch.zeros(16, dtype=torch.int64), 0
        for part in parts:
            words = planes[part.plane][16 * part.vector : 16 * part.vector + 16]
            found |= (words >> part.shift & 2**part.width - 1) << low
            low += part.width
        assert torch.equal(found, codes[:, column].long())


def test_rows_that_are_no_words_are_refused() -> None:
    with pytest.raises(KernelError, match="LB0450"):
        code_parts(LAYOUTS["words"], 4)


def test_source_contains_nothing_of_the_format_but_its_program() -> None:
    sym, asym = (BACKEND.emit(spec_of(f"int4.g32.{s}", (64,), 64), ONE, HOST).text for s in ("sym", "asym"))
    assert "zero" in asym
    assert "zero" not in sym
    assert "T.float32(-8.0)" in sym
    assert "int4" not in sym + asym
    assert plan_of(spec_of("int3.ch.sym", (16,), 32), ONE).parts[9] == (CodePart(0, 0, 12, 2), CodePart(1, 0, 10, 1))


def test_programs_are_printed() -> None:
    p = program("w0", "scale")
    code = p.and_(p.shr(p.plus(p.arg("w0"), p.multiply(p.arg("w0"), p.int(5))), p.int(0)), p.int(3))
    p.result(p.fma(p.lut(code, (1.0, 2.0, 3.0, 4.0)), p.arg("scale"), p.const(-1.0)))
    printer = Printer(((1.0, 2.0, 3.0, 4.0),))
    five, three, one = (f"T.Broadcast({text}, 16)" for text in ("T.uint32(5)", "T.uint32(3)", "T.float32(-1.0)"))
    index = f'T.Cast("int32x16", T.bitwise_and((w + (w * {five})), {three}))'
    args = {"w0": Expr("w"), "scale": Expr(value=1.0)}
    assert str(printer.run(p.done(), args)) == f"(table0[{index}] + {one})"
    gather = program("index", "lane")
    gather.result(gather.gather(gather.arg("index"), gather.arg("lane"), "book"))
    with pytest.raises(KernelError, match=r"LB0450.*gather"):
        printer.run(gather.done(), {"index": Expr("i"), "lane": Expr("l")})


def able_names(monkeypatch: pytest.MonkeyPatch, absent: set[str]) -> list[str]:
    """Backends of a plain kernel, best candidate first, where some are not there."""
    for name in ("cpp", "tvm"):
        backend = load_backend(name)
        monkeypatch.setattr(backend, "available", lambda target, gone=name in absent: "gone" if gone else None)
    spec = spec_of("int4.g128.sym", (4096,), 4096)
    return list(dict.fromkeys(b.name for _, b, _ in candidates(spec, HOST, 64)))


def test_it_stands_in_for_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Behind `cpp` and all others where that can run, else where predictions put it; always before the reference."""
    monkeypatch.delenv("LOWBIT_BACKENDS", raising=False)
    say_once.cache_clear()
    assert able_names(monkeypatch, set())[0] == "cpp"
    assert able_names(monkeypatch, set())[-2:] == ["tvm", "reference"]
    assert "tvm" not in able_names(monkeypatch, {"tvm"})
    assert not caplog.records  # nobody misses it beside a compiler
    assert able_names(monkeypatch, {"cpp"})[0] == "tvm"
    assert able_names(monkeypatch, {"cpp", "tvm"})[-1] == "reference"
    assert any("backend tvm cannot run" in r.getMessage() for r in caplog.records)
    say_once.cache_clear()


@pytest.mark.parametrize("beside", [("cpp",), ()])
def test_it_is_not_tuned_beside_what_it_stands_in_for(beside: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring its schedules too would make tuning longer for kernels that come last."""
    backends = [load_backend(name) for name in (*beside, "tvm", "reference")]
    monkeypatch.setattr(tuner, "able", lambda spec, target: iter(backends))
    monkeypatch.setattr(tuner, "Tuning", lambda run, spec, tokens, backend: backend.name)
    run: Any = SimpleNamespace(target=HOST, settled=lambda tuning: True)
    found: list[Any] = tuner.Run.start(run, tuner.Job(spec_of("int4.g32.sym", (64,), 64, "panel16"), 1))
    assert found == ["cpp" if beside else "tvm"]


def test_one_schedule_for_all_tokens_is_judged_without_it() -> None:
    spec = spec_of("int4.g128.sym", (4096,), 4096, invariant=True)
    cpp, tvm, last = (load_backend(name) for name in ("cpp", "tvm", "reference"))

    def chosen(*backends: Backend) -> list[tuple[str, Schedule]]:
        return [(b.name, s) for _, b, s in one_for_all(spec, HOST, backends)]

    alone, both = chosen(cpp, last), chosen(cpp, tvm, last)
    assert [c for c in both if c[0] != "tvm"] == alone
    assert [name for name, _ in both].index("tvm") > max(i for i, (name, _) in enumerate(both) if name == "cpp")
    assert chosen(tvm, last)[0][0] == "tvm"


def test_its_layout_is_used_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_backend("cpp"), "available", lambda target: "no compiler")
    monkeypatch.setattr(load_backend("tvm"), "available", lambda target: None)
    assert layout_name(parse_format("int3.g64.asym"), HOST) == "panel16"
    spec = replace(spec_of("int3.g64.asym", (64,), 64), compute="int16")
    assert next(b.name for b in able(spec, HOST)) == "tvm"


@needs_tvm
def test_what_does_not_compile_or_load_is_said(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="LB0451"):
        BACKEND.compile(Source("def nothing(:\n", ".ll"), tmp_path / "bad.ll")
    (tmp_path / "bad.ll").write_text("this is no module")
    with pytest.raises(KernelError, match="LB0452"):
        BACKEND.load(tmp_path / "bad.ll", spec_of("int4.g32.sym", (64,), 64), ONE)


@needs_tvm
@pytest.mark.skipif(HOST.arch.startswith("neon"), reason="needs an x86-64 machine's LLVM")
@pytest.mark.parametrize("schedule", [ONE, BUFFERED], ids=["direct", "buffered"])
def test_instructions_of_other_machines(schedule: Schedule, tmp_path: Path) -> None:
    """Compiled, not run; LLVM says nothing of features that it does not know."""
    spec = spec_of("e3m2.g32", (64,), 64)
    BACKEND.compile(BACKEND.emit(spec, schedule, Target("cpu", "avx512vbmi")), tmp_path / "kernel.ll")
    text, tvm = (tmp_path / "kernel.ll").read_text(), toolchain.load_tvm()
    for arch in (a for a in CPU_ISAS if a.startswith("avx")):
        cpu, *features = toolchain.flags_for(arch)
        target = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "mattr": features})
        known = tvm.target.codegen.llvm_get_cpu_features(target)
        assert {"avx2", *(f.removeprefix("+") for f in features)} <= known, arch
    assert "x86-64-v4" in text
    assert "+avx512vbmi" in text


@needs_tvm
def test_the_process_stays_as_it_was() -> None:
    """Signals, the hook for errors, environment, folder, threads and cores; and TVM is not imported too early."""
    code = """
import os, sys, faulthandler, torch
sys.path[:0] = PATHS
def state():
    rows = dict(row.split(":", 1) for row in open("/proc/self/status").read().splitlines())
    kept = [rows[name] for name in ("SigCgt", "SigIgn", "SigBlk", "Cpus_allowed")]
    return kept, sys.excepthook, dict(os.environ), os.getcwd(), torch.get_num_threads(), sys.getrecursionlimit()
from _tvm import BACKEND, BUFFERED, HOST, build, spec_of
from lowbit.codegen.check import check_kernel
assert BACKEND.available(HOST) is None
assert "tvm" not in sys.modules
faulthandler.enable()
before, spec = state(), spec_of("int4.g32.sym", (64,), 64)
check_kernel(spec, build(spec, BUFFERED), HOST)
assert "tvm" in sys.modules
now = state()
assert now == before, (before, now)
"""
    tests = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code.replace("PATHS", repr([tests]))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@needs_tvm
def test_a_small_model_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Quantized layers of a module run by kernels from the cache, and give what their weights say."""
    monkeypatch.setenv("LOWBIT_BACKENDS", "tvm,reference")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    dispatch.reset()
    try:
        first, last = random_qtensor("int3.g32.asym", 80, 96), random_qtensor("e2m1.g16.e4m3", 33, 80)
        model = nn.Sequential(QuantLinear.from_qtensor(first), nn.SiLU(), QuantLinear.from_qtensor(last))
        for m in (1, 5, 40):
            x = torch.randn(m, 96)
            want = nn.functional.silu(x @ first.dequantize().T) @ last.dequantize().T
            assert error(model(x), want) < 1e-4
        assert {kernel.backend for _, kernel in dispatch.loaded_kernels()} == {"tvm"}
        before = model(x)
        dispatch.reset()
        monkeypatch.setattr("lowbit.codegen.tvm.backend.compile_text", None)  # what is cached is not compiled again
        assert torch.equal(model(x), before)
        assert list(tmp_path.rglob("kernel.ll"))
    finally:
        dispatch.reset()


@needs_tvm
def test_it_agrees_with_the_kernels_of_the_compiler(tmp_path: Path) -> None:
    """A second opinion: two printers, two compilers, one number."""
    cpp = load_backend("cpp")
    if why := cpp.available(HOST):
        pytest.skip(why)
    spec = spec_of("e3m2.g48", (40, 24), 160, epilogue=("bias",))
    weight, x, bias = sample_weight(spec), torch.randn(5, 160), torch.randn(64)
    ours, theirs = torch.empty(5, 64), torch.empty(5, 64)
    build(spec, FEW)(x, weight, bias, None, ours)
    schedule = next(iter(cpp.schedules(spec, HOST, 5)))
    cpp.compile(cpp.emit(spec, schedule, HOST), tmp_path / "kernel.so")
    cpp.load(tmp_path / "kernel.so", spec, schedule)(x, weight, bias, None, theirs)
    assert error(ours, theirs) < 3e-6
