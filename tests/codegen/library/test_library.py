"""Dequantize once, then the GEMM of a library: right for every layout, bounded, chosen where it is predicted to win."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowbit.codegen import load_backend
from lowbit.codegen.check import check_kernel, sample_weight
from lowbit.codegen.library.dequantize import dense_rows, row_decoder, take_rows
from lowbit.codegen.reference.backend import decode_weight, run_reference
from lowbit.codegen.select import candidates
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.runtime.dispatch import classes_up_to

BACKEND = load_backend("library")
H200 = Target("cuda", "sm_90")
CPU = Path(__file__).parents[3] / "bench" / "results" / "cpu.json"
FORMATS = ["int4.g64.asym", "int3.g48.sym", "int2.g64.fz", "int5.g32.sym.perm", "e2m1.g16.e4m3.t32", "e3m2.ch",
           "int4.g128.asym.i8ch", "int8.t.sym"]  # fmt: skip


def spec_of(fmt: str, layout: str, segments: tuple[int, ...], k: int, **rest: object) -> KernelSpec:
    return KernelSpec(segments, k, fmt, str(LAYOUTS[layout]), "float", **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["panel16", "fragments", "words"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_are_the_decode_programs_to_the_bit(fmt: str, layout: str) -> None:
    spec = spec_of(fmt, layout, (40, 150), 200)
    weight, step = sample_weight(spec), max(16, spec.layout_.row_tile)
    rows = [
        dense_rows(weight, i, at, min(step, n - at)) for i, n in enumerate(spec.segments) for at in range(0, n, step)
    ]
    assert torch.equal(torch.cat(rows), decode_weight(weight))


@pytest.mark.parametrize(
    ("segments", "epilogue", "rest"),
    [((70,), ("bias", "residual"), {}), ((48, 48), ("silu_mul",), {"x_dtype": "bf16", "out_dtype": "bf16"}),
     ((70, 20), (), {"rotate": 64})],
)  # fmt: skip
def test_it_agrees_with_the_reference(segments: tuple[int, ...], epilogue: tuple[str, ...], rest: dict) -> None:
    spec = spec_of("int4.g64.asym", "panel16", segments, 192, epilogue=epilogue, **rest)
    assert BACKEND.supports(spec, host_target()) is None
    schedule = next(iter(BACKEND.schedules(spec, host_target(), 512)))
    assert check_kernel(spec, BACKEND.load(Path("none"), spec, schedule), host_target(), 65) < 1e-2


def test_a_matrix_is_decoded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("int4.g64.sym", "panel16", (100, 4096), 4096)
    schedule = next(iter(BACKEND.schedules(spec, host_target(), 512)))
    assert schedule.tile_n * spec.k <= 1 << 20
    small = spec_of("int4.g64.sym", "panel16", (100, 50), 64)
    weight, seen = sample_weight(small), []
    block = next(iter(BACKEND.schedules(small, host_target(), 512)))
    from lowbit.codegen.library import backend

    monkeypatch.setattr(backend, "take_rows", lambda *args: seen.append(args[1:]) or take_rows(*args))
    from dataclasses import replace

    x, out = torch.randn(64, 64), torch.empty(64, 150)
    BACKEND.load(Path("none"), small, replace(block, tile_n=48))(x, weight, None, None, out)
    assert seen == [(0, 0, 48), (0, 48, 48), (0, 96, 4), (1, 0, 48), (1, 48, 2)]
    assert torch.allclose(out, run_reference(small, x, weight), atol=1e-4)


@pytest.mark.parametrize("layout", ["fragments", "words", "whole16"])
def test_decoding_is_one_graph(layout: str) -> None:
    """Inductor fuses it on GPUs; nothing may break the graph."""
    spec = spec_of("int3.g48.asym", layout, (40, 70), 200)
    weight = sample_weight(spec)
    decode = torch.compile(
        row_decoder(spec.fmt, spec.layout_, spec.k, torch.bfloat16), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(decode(take_rows(weight, 1, 0, 70))[:70], dense_rows(weight, 1, 0, 70).bfloat16())


def test_kernels_win_where_they_were_measured_to() -> None:
    """On this kind of CPU our kernels beat torch's GEMM at 512 tokens, so the models must say so."""
    found = [k for k in json.loads(CPU.read_text())["kernels"] if k["M"] == 512 and k["format"].startswith("int")]
    assert found
    for kernel in found:
        assert kernel["vs_torch_f32"] > 1
        for m in (64, 512, 4096):
            spec = KernelSpec((kernel["N"],), kernel["K"], kernel["format"], str(LAYOUTS["panel16"]), kernel["compute"])
            predicted = _predicted("cpp", spec, Target("cpu", "avx512vnni"), m)
            assert predicted < _predicted("library", spec, Target("cpu", "avx512vnni"), m)


def test_it_takes_over_where_a_kernel_is_predicted_to_lose() -> None:
    """CUDA C++ kernels reach a part of the library's rate; once that part costs more than decoding, they lose."""
    spec = spec_of("int4.g128.sym", "fragments", (8192,), 8192, x_dtype="bf16", out_dtype="bf16")
    ours, theirs = ([_predicted(name, spec, H200, m) for m in (512, 16384)] for name in ("cuda", "library"))
    assert ours[0] < theirs[0]
    assert ours[1] > theirs[1]
    assert not list(BACKEND.schedules(spec, H200, 1))
    assert classes_up_to(4096)[-3:] == (1024, 2048, 4096)


def test_selection_puts_it_among_the_others() -> None:
    spec = spec_of("int4.g128.sym", "panel16", (256,), 256)
    names = [backend.name for _, backend, _ in candidates(spec, host_target(), 512)]
    assert names[-1] == "reference"
    assert "library" in names
    assert "library" not in [backend.name for _, backend, _ in candidates(spec, host_target(), 8)]


def _predicted(name: str, spec: KernelSpec, target: Target, m: int) -> float:
    backend = load_backend(name)
    return min(backend.predict(spec, schedule, target, m) for schedule in backend.schedules(spec, target, m))
