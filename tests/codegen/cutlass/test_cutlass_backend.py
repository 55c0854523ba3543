"""The CUTLASS backend's choices, texts and refusals, and what it takes to compile them."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from _cutlass import AMPERE, BACKEND, HOPPER, mma, needs_dsl, spec_of, wgmma

from lowbit.codegen import load_backend
from lowbit.codegen.backend import Source
from lowbit.codegen.cutlass import toolchain
from lowbit.codegen.cutlass.launch import OFFSETS, PARAMETERS, fill, packed_columns
from lowbit.codegen.cutlass.operands import unscaled
from lowbit.codegen.cutlass.places import side_places, word_places
from lowbit.codegen.cutlass.plan import Plan
from lowbit.codegen.cutlass.toolchain import read_artifact
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.select import able, candidates, layout_name, say_once
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target, host_target
from lowbit.quantizers.formats import catalog, parse_format
from lowbit.quantizers.qtensor import PackedWeight

FRAGMENTS = LAYOUTS["fragments"]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "version", missing)
    assert BACKEND.available(HOPPER) == BACKEND.builds(HOPPER) == "nvidia-cutlass-dsl is not installed"
    for call in (BACKEND.toolchain, lambda: BACKEND.compile(Source("", ".cute", ("sm_90a",)), Path("none"))):
        with pytest.raises(KernelError, match=r"LB0493.*pip install nvidia-cutlass-dsl"):
            call()
    monkeypatch.setattr(toolchain, "find_spec", lambda name: object())
    assert BACKEND.builds(HOPPER) is None
    assert "sm_75 is not among" in str(BACKEND.builds(Target("cuda", "sm_75")))
    assert "sm_100 is not among" in str(BACKEND.available(Target("cuda", "sm_100")))
    if not torch.cuda.is_available():
        assert BACKEND.available(HOPPER) == "torch finds no CUDA device"


def test_nobody_misses_it_beside_the_cuda_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOWBIT_BACKENDS", "cuda,cutlass")
    monkeypatch.setattr(BACKEND.__class__, "available", lambda self, target: "gone")
    cuda, spec = load_backend("cuda"), spec_of("int4.g64.sym", (512,), 512, "bf16", "bf16")
    for there, said in ((None, False), ("no nvcc", True)):
        say_once.cache_clear()
        monkeypatch.setattr(cuda, "available", lambda target, why=there: why)
        assert [b.name for b in able(spec, HOPPER)] == (["cuda"] if there is None else [])
        assert any("backend cutlass cannot run" in r.getMessage() for r in caplog.records) == said
    say_once.cache_clear()


def test_it_decides_for_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the CUDA backend few tokens would have no good kernel, so weights are packed for Triton."""
    for name, why in (("cuda", "no nvcc"), ("cutlass", None), ("triton", None)):
        monkeypatch.setattr(load_backend(name), "available", lambda target, why=why: why)
    assert layout_name(parse_format("int4.g64.sym"), HOPPER) == "words"
    monkeypatch.setenv("LOWBIT_BACKENDS", "cutlass")
    assert layout_name(parse_format("int4.g64.sym"), HOPPER) == "fragments"


def test_refuses_what_it_does_not_run() -> None:
    def why(fmt: str, x: str = "bf16", layout: str = "", **rest: object) -> str:
        spec = spec_of(fmt, (64, 64), 64, x, "f32")
        return str(BACKEND.supports(replace(spec, **({"layout": layout} if layout else {}), **rest), HOPPER))  # type: ignore[arg-type]

    assert why("int4.g32.sym") == why("bcq2.g32") == "None"
    assert "one code per weight" in why("vq.d4.k16")
    assert "columns before" in why("tcq2.g32")
    assert "smaller than a step" in why("int4.g8.sym")
    assert "reads the layout" in why("int4.g32.sym", layout=str(LAYOUTS["words"]))
    assert "not rounded" in why("int4.g32.sym", activation="int8.token")
    assert "not f32" in why("int4.g32.sym", "f32")
    assert "rotate" in why("int4.g32.sym", rotate=64)
    assert "norm_weight" in why("int4.g32.sym", norm_eps=1e-5)
    assert "this order" in why("int4.g32.sym", epilogue=("residual", "bias"))
    assert "compute='float'" in why("int4.g32.sym", compute="int16")
    assert "every scale in e8m0" in why("mxfp4", "f16")
    assert "every scale in f32" in why("int4.g32.sym.f32", "f16")
    assert why("int4.ch.sym.f32", "f16") == "None"  # scales meet sums
    large = spec_of("int8.ch.sym", (1 << 20,), 1 << 14, "bf16", "bf16")
    assert "32 bits" in str(BACKEND.supports(large, HOPPER))
    with pytest.raises(KernelError, match=r"LB0490.*have 192"):
        BACKEND.emit(spec_of("int4.g32.sym", (64,), 64, "bf16"), Schedule(64, 192, 64, 8, 3), HOPPER)


def test_what_no_schedule_can_do() -> None:
    spec = spec_of("int4.g64.sym", (512,), 512, "bf16", "bf16")

    def why(schedule: Schedule, target: Target = HOPPER, gated: bool = False) -> str:
        chosen = replace(spec, segments=(256, 256), epilogue=("silu_mul",)) if gated else spec
        return str(BACKEND.illegal(chosen, schedule, target))

    assert why(wgmma(128, 256, 8, 4)) == "None"
    assert "no tiles of 48" in why(mma(48))
    assert "no tiles" in why(replace(mma(), split_k=2))
    assert "do not have 256" in why(mma(32, 256, 16))
    assert "two parts" in why(mma(rows=64), gated=True)
    assert "no wgmma" in why(wgmma(), AMPERE)
    assert "at least two stages" in why(wgmma(stages=2))
    assert "shared memory" in why(mma(256, 64, 4, 8), Target("cuda", "sm_86"))
    assert "registers" in why(wgmma(256, 256, 8, 3))


@pytest.mark.parametrize("fmt", [f for f in catalog() if BACKEND.serves(f) is None], ids=str)
def test_every_format_has_schedules_and_source(fmt: object) -> None:
    spec = spec_of(str(fmt), (512,), 1000, "bf16", "bf16")
    assert BACKEND.supports(spec, HOPPER) is None
    for target, m in ((AMPERE, 1), (HOPPER, 200)):
        found = list(BACKEND.schedules(spec, target, m))
        times = [BACKEND.predict(spec, s, target, m) for s in found]
        assert times == sorted(times)
        source = BACKEND.emit(spec, found[0], target)
        assert source == BACKEND.emit(spec, found[0], target)
        assert source.flags == ("sm_90a" if target is HOPPER else "sm_80",)
        ast.parse(source.text)
        assert str(fmt) not in source.text  # nothing that a checkpoint names


def test_many_tokens_are_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions only: few tokens go to the CUDA backend, which reads the same bytes."""
    monkeypatch.setenv("LOWBIT_BACKENDS", "cuda,cutlass")
    for name in ("cuda", "cutlass"):
        monkeypatch.setattr(load_backend(name), "available", lambda target: None)
    spec = spec_of("int4.g64.asym", (8192,), 8192, "bf16", "bf16")
    best = {m: candidates(spec, HOPPER, m)[0] for m in (1, 16, 64, 4096)}
    assert [best[m][1].name for m in (1, 16, 64)] == ["cuda"] * 3
    assert best[4096][1].name == "cutlass"
    assert best[4096][2].get("wgmma", 0) == 1
    assert load_backend("cuda").reads(spec)
    assert BACKEND.reads(spec)
    assert "cutlass" not in {b.name for b in able(replace(spec, layout=str(LAYOUTS["panel16"])), host_target())}


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_where_the_plan_says(bits: int) -> None:
    """A lane's words hold the codes of its rows and columns, whole and nothing else."""
    row, column, block = 16 * 3 + 8 + 5, 64 + 32 + 8 + 2 * 2, 1
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[row, column : column + 2] = 2**bits - 1
    for plane, words in enumerate(FRAGMENTS.pack(codes, bits)):
        place = word_places(FRAGMENTS, Plan(spec_of(f"int{bits}.ch.sym", (64,), 128), mma()).planes[plane])
        first = block * place.block + 3 * place.part + (4 * 5 + 2) * place.lane
        touched = words.nonzero().flatten()
        assert len(touched)
        assert bool(((touched >= first) & (touched < first + place.count)).all())


def test_other_layouts_are_refused() -> None:
    with pytest.raises(KernelError, match="LB0490"):
        word_places(replace(FRAGMENTS, memory=tuple("pbgwtsqh")), 4)
    with pytest.raises(KernelError, match="LB0490"):
        side_places(replace(FRAGMENTS, side=("h", "g", "w")))
    sides = FRAGMENTS.pack_side(torch.arange(64)[:, None]).flatten()
    place = side_places(FRAGMENTS)
    assert sides[2 * place.part + place.half + 3 * place.g] == 16 * 2 + 8 + 3


def test_elements_that_cannot_be_scaled_in_place() -> None:
    served = {str(f): f.element for f in catalog() if BACKEND.serves(f) is None}  # type: ignore[union-attr]
    assert all(unscaled(e, "bf16") for e in served.values())
    assert not unscaled(parse_format("nf4.ch").element, "f16")  # type: ignore[union-attr]


def test_activations_in_packed_columns() -> None:
    spec = spec_of("int4.g48.sym", (64,), 100, "f16", "f32")
    plan, x = Plan(spec, mma()), torch.arange(1.0, 201.0).reshape(2, 100).half()
    weight = PackedWeight(spec.fmt, spec.layout_, (64,), 100, {})
    wide = packed_columns(plan)(x, weight)
    assert wide.shape == (2, plan.x_columns) == (2, 192)
    kept = torch.cat([wide[:, :48], wide[:, 64:112], wide[:, 128:132]], dim=1)
    assert torch.equal(kept, x)
    assert float(wide.float().sum()) == float(x.float().sum())
    dense = Plan(spec_of("int4.g32.sym", (64,), 96, "f16", "f32"), mma())
    assert packed_columns(dense)(x[:, :96].contiguous(), weight).shape == (2, 96)


def test_parameters_are_in_the_kernels_order() -> None:
    text = BACKEND.emit(spec_of("int4.g32.sym", (64,), 64, "bf16"), mma(), AMPERE).text
    kernel = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "kernel")
    assert [a.arg for a in kernel.args.args] == [*PARAMETERS, "tokens"]
    assert OFFSETS == tuple(range(0, 8 * len(PARAMETERS) + 8, 8))
    x, out = torch.zeros(3, 64), torch.zeros(3, 64)
    args = fill(x, PackedWeight(parse_format("int4.g32.sym"), FRAGMENTS, (64,), 64, {"scale": out}), None, None, out)
    assert (args.x, args.scale, args.bias, args.tokens) == (x.data_ptr(), out.data_ptr(), None, 3)


def test_files_that_are_no_kernels(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cute"
    rest = b', "threads": 1, "shared": 1}\n'
    for data in (b"", b"\x7fELF", b'{"kernel": "lb_0"}\n\x7fELF', b'{"kernel": "a b"' + rest + b"\x7fELF",
                 b'{"kernel": "lb_0"' + rest + b"MZ"):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(KernelError, match="LB0492"):
            read_artifact(path)
    path.write_bytes(b'{"kernel": "lb_0", "threads": 128, "shared": 1}\n\x7fELF\n')
    assert read_artifact(path).cubin == b"\x7fELF\n"


@needs_dsl
def test_what_does_not_compile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("def nothing(:\n", "raise RuntimeError('error: of the kernel')\n", "pass\n"):
        with pytest.raises(KernelError, match="LB0491"):
            BACKEND.compile(Source(text, ".cute", ("sm_90a",)), tmp_path / "kernel.cute")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(toolchain, "_TIMEOUT_S", 0.01)
    with pytest.raises(KernelError, match=r"LB0491.*timed out"):
        BACKEND.compile(Source("import time\ntime.sleep(9)\n", ".cute", ("sm_90a",)), tmp_path / "kernel.cute")


@needs_dsl
def test_settings_of_the_user_do_not_reach_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_DSL_DRYRUN", "1")
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_100a")
    spec = spec_of("int8.ch.sym", (64,), 64, "f16", "f16")
    BACKEND.compile(BACKEND.emit(spec, wgmma(), HOPPER), tmp_path / "kernel.cute")
    made = read_artifact(tmp_path / "kernel.cute")
    assert (made.kernel, made.threads, made.shared) == ("lb_0", 128, Plan(spec, wgmma()).shared_bytes)
    assert made.kernel.encode() in made.cubin


def test_importing_the_backend_does_not_import_the_dsl() -> None:
    code = """
import sys
import lowbit
from lowbit.codegen import load_backend
from lowbit.compiler.ir.target import Target
backend = load_backend("cutlass")
backend.available(Target("cuda", "sm_90"))
assert "cutlass" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
