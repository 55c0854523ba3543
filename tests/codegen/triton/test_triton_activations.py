"""Triton kernels with rounded activations: interpreted against the definition, and compiled for GPUs not here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch

from lowbit.codegen.reference.backend import prepare_activations
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.backend import TritonBackend
from lowbit.codegen.triton.emitter import emit_source
from lowbit.codegen.triton.interpret import Call, run_interpreted
from lowbit.codegen.triton.offline import OfflineReport, attempt_offline
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.qtensor import PackedWeight, QTensor
from lowbit.quantizers.weights import pack_weights, random_weight

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

WORDS = LAYOUTS["words"]
DOT = Schedule(16, 32, 32, 4, 2)
SWAP = DOT.with_extra(swap=1)
SPLIT = replace(DOT, split_k=2)
GEMV = Schedule(1, 32, 64, 4, 2).with_extra(gemv=1)


@dataclass(frozen=True)
class Case:
    """One comparison."""

    fmt: str
    activation: str
    compute: str
    m: int
    k: int
    schedule: Schedule
    segments: tuple[int, ...] = (40,)
    epilogue: tuple[str, ...] = ()

    def __str__(self) -> str:
        s = self.schedule
        return f"{self.fmt}-{self.activation}-{self.compute}-m{self.m}-k{self.k}-{s.get('swap', 0)}{s.split_k}"

    @property
    def spec(self) -> KernelSpec:
        spec = KernelSpec(self.segments, self.k, self.fmt, str(WORDS), self.compute, epilogue=self.epilogue)  # type: ignore[arg-type]
        return replace(spec, activation=self.activation)

    @property
    def weights(self) -> list[QTensor]:
        rng = torch.Generator().manual_seed(7)
        found = [random_weight(parse_format(self.fmt), n, self.k, rng) for n in self.segments]
        return [w for w in found if isinstance(w, QTensor)]

    def packed(self) -> PackedWeight:
        weight, rounding = pack_weights(self.weights, WORDS), self.spec.rounding
        if rounding is None or not rounding.static:
            return weight
        scales = 2.0 / rounding.tops(self.k) * (0.5 + torch.arange(rounding.groups(self.k)) % 3)
        return replace(weight, tensors={**weight.tensors, "input_scale": scales})

    def x(self) -> torch.Tensor:
        return torch.randn(self.m, self.k, generator=torch.Generator().manual_seed(9))


CASES = [
    Case("int8.ch.sym", "int8.token", "int8", 3, 200, DOT),  # sums of integers run over all columns
    Case("int4.ch.asym", "int8.token", "int8", 17, 160, SPLIT, epilogue=("bias",)),
    Case("int4.ch.fz", "int8.token.c90", "int8", 3, 160, SWAP),
    Case("int4.g64.sym", "int8.token", "int8", 3, 200, SWAP),
    Case("int4.g64.sym.perm", "int4.g64.w2", "int8", 3, 200, DOT),
    Case("int4.g64.asym", "int4.g64.w1.static", "int8", 2, 160, DOT, (40, 40), ("silu_mul",)),
    Case("int3.g48.sym", "int8.g96", "int8", 2, 200, DOT),
    Case("int4.g48.sym", "int8.g64", "float", 2, 130, GEMV),
    Case("int4.g64.sym.perm", "int4.g64.w1.asym", "int8", 3, 200, DOT),
    Case("int4.g32.sym", "int4.g32.c90.asym", "float", 2, 100, GEMV),
    Case("e4m3.ch", "e4m3.token", "float", 3, 100, DOT),
    Case("int4.g32.sym.perm", "e2m1.g16.c90", "float", 2, 100, GEMV),
    Case("int4.g32.sym.perm", "", "float", 2, 100, DOT),
]


@pytest.fixture(scope="module")
def outputs() -> list[torch.Tensor]:
    bias = [torch.arange(sum(c.segments)) * 0.1 if "bias" in c.epilogue else None for c in CASES]
    return run_interpreted([Call(c.spec, c.schedule, c.x(), c.packed(), b) for c, b in zip(CASES, bias, strict=True)])


@pytest.mark.parametrize("index", range(len(CASES)), ids=list(map(str, CASES)))
def test_kernels_compute_with_rounded_activations(index: int, outputs: list[torch.Tensor]) -> None:
    case = CASES[index]
    dense = torch.cat([w.dequantize() for w in case.weights]).double()
    if (perm := case.weights[0].perm) is not None:
        dense = dense[:, perm.long()]
    want = prepare_activations(case.spec, case.x(), case.packed()).double() @ dense.T
    if "bias" in case.epilogue:
        want = want + torch.arange(sum(case.segments)) * 0.1
    if "silu_mul" in case.epilogue:
        gate, up = want.chunk(2, dim=1)
        want = torch.nn.functional.silu(gate) * up
    assert float((outputs[index].double() - want).norm() / want.norm()) < 2e-6


def test_an_infinity_reaches_only_its_token() -> None:
    case = Case("int8.ch.sym", "int8.token", "int8", 3, 64, DOT)
    x = case.x()
    x[1, 5] = float("inf")
    (got,) = run_interpreted([Call(case.spec, case.schedule, x, case.packed())])
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


OFFLINE = [
    ("sm_80", "int8.ch.sym", "int8.token", Schedule(64, 64, 32, 4, 3)),
    ("sm_90", "int8.ch.sym", "int8.token", Schedule(64, 128, 32, 4, 3)),
    ("sm_90", "int4.g128.sym", "int8.token", Schedule(128, 128, 32, 8, 3)),
    ("sm_90", "int4.g128.sym.perm", "int4.g128.w4", Schedule(16, 64, 32, 4, 3).with_extra(swap=1)),
]


@pytest.fixture(scope="module")
def reports() -> list[list[OfflineReport]]:
    backend, sources = TritonBackend(), []
    for arch, fmt, activation, schedule in OFFLINE:
        spec = KernelSpec((4096,), 4096, fmt, str(WORDS), "int8", "bf16", "bf16", activation=activation)
        sources.append((backend.emit(spec, schedule, Target.parse(arch)), arch))
    found = attempt_offline(sources)
    assert all(isinstance(r, list) for r in found), found
    return [r for r in found if isinstance(r, list)]


@pytest.mark.parametrize("index", range(len(OFFLINE)))
def test_integer_tensor_cores_are_used(index: int, reports: list[list[OfflineReport]]) -> None:
    """IMMA on sm_80, IGMMA on sm_90 where 64 rows meet; never 4-bit products, which sm_90 would emulate."""
    arch, _, _, schedule = OFFLINE[index]
    main, prepare = reports[index]
    rows = schedule.tile_n if schedule.get("swap", 0) else schedule.tile_m
    assert main.count("IGMMA" if arch == "sm_90" and rows >= 64 else "IMMA") > 0
    assert main.spills == prepare.spills == 0
    assert ".s4" not in main.ptx
    assert ".u4" not in main.ptx


def test_a_scale_for_all_columns_is_applied_once() -> None:
    """Per channel and token sums stay integers in the loop; groups convert them every step."""
    for fmt, inside in (("int8.ch.sym", False), ("int8.g128.sym", True)):
        spec = KernelSpec((64,), 256, fmt, str(WORDS), "int8", activation="int8.token")
        main = emit_source(spec, DOT).partition("def prepare")[0]
        assert any(line.startswith("        ") and "sums.to(tl.float32)" in line for line in main.split("\n")) == inside


def test_what_it_cannot_do_is_said() -> None:
    backend, target = TritonBackend(), Target.parse("sm_90")
    spec = KernelSpec((64,), 192, "int4.g48.sym", str(WORDS), "int8", activation="int8.g64")
    assert "groups of 48 weights" in str(backend.supports(spec, target))
    assert "rotate" in str(backend.supports(replace(spec, activation="", rotate=64), target))
