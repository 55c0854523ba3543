"""What Triton's compiler makes of the kernels: their PTX, run on the CPU, against the reference."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from _ptx import Loaded

from lowbit.codegen.attend import AttendSpec
from lowbit.codegen.backend import Source
from lowbit.codegen.check import sample_weight
from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.reference.kvstate import KVState, allocate, attend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton import attend_launch
from lowbit.codegen.triton.attend import attend_source
from lowbit.codegen.triton.emitter import emit_source
from lowbit.codegen.triton.launch import make_launcher
from lowbit.codegen.triton.offline import OfflineReport, attempt_offline
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.quantizers.formats import VectorFormat, parse_format

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Rounding of operands and output; sums are float32 everywhere.
TOLERANCE = {"f32": 2e-6, "bf16": 6e-3, "f16": 8e-4}
DOT = Schedule(32, 64, 64, 4, 3)
SMALL = Schedule(16, 32, 32, 4, 2)
WIDE = Schedule(64, 64, 64, 4, 3)
GEMV = Schedule(2, 64, 128, 4, 2).with_extra(gemv=1)
GATED = ("bias", "silu_mul", "residual")


@dataclass(frozen=True)
class Case:
    """One kernel, where it should run, and with how many tokens."""

    arch: str
    fmt: str
    m: int
    k: int
    schedule: Schedule
    segments: tuple[int, ...] = (40,)
    x: str = "f32"
    out: str = "f32"
    epilogue: tuple[str, ...] = ()
    activation: str = ""

    def __str__(self) -> str:
        names = "-".join(name for name, value in self.schedule.extra if value) or "dot"
        steps = "+".join(self.epilogue)
        return f"{self.arch}-{self.fmt}-{self.activation or self.x}-m{self.m}-{names}-{self.schedule.split_k}-{steps}"

    @property
    def spec(self) -> KernelSpec:
        layout = LAYOUTS["vectors" if isinstance(parse_format(self.fmt), VectorFormat) else "words"]
        integer = self.activation.startswith("int8") and self.fmt.startswith("int")
        compute: Any = "int8" if integer else "float"
        spec = KernelSpec(self.segments, self.k, self.fmt, str(layout), compute, self.x, self.out, self.epilogue)
        return replace(spec, activation=self.activation)


CASES = [
    Case("sm_80", "int4.g48.asym", 17, 70, DOT),
    Case("sm_80", "int3.g64.sym", 3, 130, GEMV, x="bf16", epilogue=("bias",)),
    Case("sm_80", "int4.g32.asym", 3, 96, SMALL, activation="int8.token"),
    Case("sm_90", "e3m2.ch", 5, 100, replace(SMALL, split_k=2).with_extra(swap=1), x="f16", out="f16"),
    Case("sm_90", "int4.g64.sym", 70, 128, WIDE, (100,), "bf16", epilogue=("bias", "residual")),
    Case("sm_80", "vq.d4.k256", 3, 70, Schedule(16, 32, 32, 4, 3), (37,), "bf16"),
]
HEAVY = [
    Case("sm_80", "int4.g64.asym", 40, 128, WIDE, (70, 30), "f16", "f16", ("bias",)),
    Case("sm_90", "int4.g64.asym", 70, 192, replace(WIDE, tile_n=128, warps=8), (80, 80), "bf16", "bf16", GATED),
    Case("sm_90", "int8.ch.sym", 70, 200, WIDE, (100,), activation="int8.token"),
    Case("sm_80", "int4.g64.asym", 2, 160, replace(SMALL, split_k=2), (40, 40), epilogue=("silu_mul",),
         activation="int8.g64"),
    Case("sm_90", "e4m3.ch", 3, 100, SMALL, activation="e4m3.token"),
    Case("sm_80", "int2.g64.fz", 3, 70, GEMV.with_extra(scale_after=1), epilogue=("bias",)),
    Case("sm_90", "nvfp4", 17, 130, DOT.with_extra(swap=1), x="bf16"),
    Case("sm_90", "int5.ch.asym", 2, 33, replace(GEMV, split_k=2)),
    Case("sm_80", "int4.g64.sym.perm", 3, 200, DOT, x="f16"),
    Case("sm_80", "tcq2.g64", 3, 192, GEMV.with_extra(scale_after=1), x="bf16"),
    Case("sm_90", "tcq3.g32", 5, 96, DOT.with_extra(swap=1, scale_after=1), epilogue=("bias",)),
    Case("sm_90", "vq.d8.k256.r256", 70, 70, replace(WIDE, tile_k=32), (37,), "bf16"),
    Case("sm_80", "vq.d8.k4096.rn", 3, 70, replace(SMALL, split_k=2), (37, 21), "f16", "f16", ("bias", "residual")),
    Case("sm_90", "vq.d8.k256.r256", 2, 70, Schedule(2, 32, 32, 4, 2).with_extra(gemv=1), (37,), "f16"),
]  # fmt: skip
ATTEND = [("sm_80", "kv4.kc64.vt.w64", 64, 100, 1, 2, 1), ("sm_90", "k2v4.kc32.vt32.w32", 80, 70, 9, 2, 1)]
"""Architecture, format, head size, tokens, query tokens, query heads, heads."""


class Compiled:
    """Stands for a generated module: launches run what its kernels were compiled to."""

    def __init__(self, text: str, reports: Sequence[OfflineReport], apart: bool = False) -> None:
        self.apart = apart
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                setattr(self, node.targets[0].id, ast.literal_eval(node.value))
        for report in reports:
            setattr(self, report.kernel, _Kernel(report, apart))


class _Kernel:
    def __init__(self, report: OfflineReport, apart: bool) -> None:
        self.loaded, self.shared, self.apart = Loaded(report.ptx, report.kernel), report.shared_bytes, apart

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int, **options: Any) -> None:
            spare = [None] * (len(self.loaded.kernel.params) - len(args))  # workspaces that nobody asks for
            warps = list(range(num_warps))[::-1] if self.apart else None
            # Triton's compiler writes operands of the next products while these are on their way.
            given = [*args, *spare]
            self.loaded.launch(grid, (32 * num_warps,), self.shared, given, apart=warps, registers_at_issue=True)

        return launch


@cache
def reports(heavy: bool) -> dict[str, list[OfflineReport] | KernelError]:
    """Of all kernels of a tier: starting the compiling process takes longer than a kernel."""
    cases, attention = (HEAVY, ATTEND[1:]) if heavy else (CASES, ATTEND[:1])
    jobs = [(str(c), Source(emit_source(c.spec, c.schedule), ".py"), c.arch) for c in cases]
    jobs += [(text, attend_source(AttendSpec(text, dims)), arch) for arch, text, dims, *_ in attention]
    found = attempt_offline([(source, arch) for _, source, arch in jobs])
    return dict(zip([name for name, *_ in jobs], found, strict=True))


def compiled(name: str, heavy: bool) -> list[OfflineReport]:
    """A kernel's reports."""
    found = reports(heavy)[name]
    assert isinstance(found, list), found
    return found


def error(case: Case, heavy: bool, apart: bool = False) -> float:
    """||computed - reference|| / ||reference||; NaN when an element was not written."""
    spec, rng = case.spec, torch.Generator().manual_seed(3)
    weight = sample_weight(spec, 3)
    x = torch.randn(case.m, case.k, generator=rng).to(DTYPES[case.x])
    bias = torch.randn(sum(case.segments), generator=rng) if "bias" in case.epilogue else None
    residual = torch.randn(case.m, spec.n_out, generator=rng).to(DTYPES[case.out])
    given = residual if "residual" in case.epilogue else None
    module: Any = Compiled(emit_source(spec, case.schedule), compiled(str(case), heavy), apart)
    out = torch.full((case.m, spec.n_out), float("nan"), dtype=DTYPES[case.out])
    make_launcher(module, spec, case.schedule)(x, weight, bias, given, out)
    want = run_reference(spec, x, weight, bias, given).float()
    return float((out.float() - want).norm() / want.norm())


TIERS = [
    *[pytest.param(c, False, id=str(c)) for c in CASES],
    *[pytest.param(c, True, id=str(c), marks=pytest.mark.slow) for c in HEAVY],
]


@pytest.mark.parametrize(("case", "heavy"), TIERS)
def test_ptx_agrees_with_the_reference(case: Case, heavy: bool) -> None:
    assert error(case, heavy) <= max(TOLERANCE[case.x], TOLERANCE[case.out])


@pytest.mark.slow
@pytest.mark.parametrize(("case", "heavy"), TIERS)
def test_warps_need_not_go_in_step(case: Case, heavy: bool) -> None:
    """The last warp runs as far as it gets, then the one before it: what lacks a barrier fails."""
    assert error(case, heavy, apart=True) <= max(TOLERANCE[case.x], TOLERANCE[case.out])


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_attention_agrees_with_the_reference(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, text, dims, tokens, queries, query_heads, heads = ATTEND[index]
    spec, rng = AttendSpec(text, dims), torch.Generator().manual_seed(0)
    state = KVState(spec, allocate(spec, 2, heads, -(-tokens // spec.span) * spec.span, torch.device("cpu")))
    keys, values = (torch.randn(2, heads, tokens, dims, generator=rng) for _ in "kv")
    state.append(keys, values, 0)
    q = torch.randn(2, query_heads, queries, dims, generator=rng)
    module = Compiled(attend_source(spec).text, compiled(text, index > 0))
    monkeypatch.setattr(attend_launch, "load_module", lambda path: module)
    parts = list(state.parts.values())
    got = attend_launch.load_attend(Path("unused"), spec)(q, parts, tokens, None, dims**-0.5)
    want = attend(q, KVState.of(spec, parts), tokens, None, dims**-0.5)
    assert float((got - want).square().mean().sqrt() / want.square().mean().sqrt()) < 1e-5


def test_warpgroups_multiply_where_meant() -> None:
    """Else the tests above would not test them."""
    (report,) = compiled(str(CASES[4]), False)
    assert "wgmma.mma_async" in report.ptx
