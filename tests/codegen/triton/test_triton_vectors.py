"""Generated Triton kernels for vector formats, run by Triton's interpreter, against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch

from lowbit.codegen.decode import vector_program
from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton import model, space
from lowbit.codegen.triton.backend import TritonBackend
from lowbit.codegen.triton.emitter import emit_source, kernel_args
from lowbit.codegen.triton.interpret import Call, run_interpreted
from lowbit.codegen.triton.vector_model import gather_loads
from lowbit.codegen.triton.vector_tiles import VectorTiles
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime.build import sample_weight
from lowbit.quantizers.formats import VectorFormat, parse_format

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Rounding of operands and output; sums are float32 everywhere. Column norms are rounded with the activations.
TOLERANCE = {"f32": 2e-6, "bf16": 6e-3, "f16": 8e-4}
VECTORS = str(LAYOUTS["vectors"])
HOPPER = Target.parse("sm_90")

DOT = Schedule(16, 32, 32, 4, 3)
SWAP = DOT.with_extra(swap=1)
WIDE = Schedule(32, 64, 32, 4, 3)
GEMV = Schedule(1, 32, 32, 4, 2).with_extra(gemv=1)
PAIR = Schedule(2, 32, 32, 4, 2).with_extra(gemv=1)
GATED, CHAIN = ("bias", "silu_mul", "residual"), ("bias", "residual")
ALL = "vq.d6.k4096.r16.c4.o2pv4k4096"


@dataclass(frozen=True)
class Case:
    """One comparison."""

    fmt: str
    m: int
    schedule: Schedule
    segments: tuple[int, ...] = (37,)
    k: int = 70
    x: str = "f32"
    out: str = "f32"
    epilogue: tuple[str, ...] = ()

    def __str__(self) -> str:
        s = self.schedule
        kind = "gemv" if s.get("gemv", 0) else "swap" if s.get("swap", 0) else "dot"
        return f"{self.fmt}-m{self.m}-{kind}{s.tile_m}-split{s.split_k}-{self.x}-{self.out}-{'+'.join(self.epilogue)}"

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec(self.segments, self.k, self.fmt, VECTORS, "float", self.x, self.out, self.epilogue)


def split(schedule: Schedule, parts: int = 2) -> Schedule:
    return replace(schedule, split_k=parts)


CASES = [
    Case("vq.d4.k256", 1, GEMV),
    Case("vq.d4.k256", 3, SWAP, x="bf16", out="bf16", epilogue=("bias",)),
    Case("vq.d8.k256.r256", 17, DOT),
    Case("vq.d8.k256.r256", 2, split(PAIR), x="f16", epilogue=("residual",)),
    Case("vq.d8.k4096", 3, PAIR, (37, 21, 9), x="bf16", epilogue=CHAIN),
    Case("vq.d8.k4096.rn", 3, split(DOT), (37, 21), x="f16", out="f16", epilogue=CHAIN),
    Case("vq.d2.k16.cn.f32", 3, replace(DOT, tile_n=16), epilogue=("residual",)),
    Case("vq.d16.k65536", 2, WIDE, (50,)),
    Case("vq.d16.k512.r2.o20v2k8.rn", 2, Schedule(2, 32, 64, 4, 2).with_extra(gemv=1), (50,), 101, x="bf16"),
    Case("vq.d16.k256.c3.o5v6k16.rn", 17, split(WIDE, 3), (50,), 101),
    Case(ALL, 3, DOT, k=131),
    Case(f"{ALL}.cn", 17, SWAP, k=131, x="bf16"),
    Case(f"{ALL}.cn", 2, split(PAIR, 3), k=131),
    Case("vq.d4.k64.r16.f32", 3, SWAP, (39, 39), epilogue=GATED),
    Case("vq.d4.k64.r16.s8", 3, DOT, (37, 21)),
    Case("vq.d4.k64.rn.bf16", 2, split(PAIR), (39, 39), x="bf16", epilogue=GATED),
    Case("vq.d8.k256.r256.in.rn", 3, split(DOT), (37, 21), 72, x="bf16", epilogue=CHAIN),
    Case("vq.d8.k65536.in.rn", 2, split(PAIR), (37, 21), 72, x="f16"),
    Case("vq.d6.k16.in.cn", 3, SWAP, k=78, epilogue=("residual",)),
    Case("vq.d4.k64.r16.in.s8", 2, PAIR, (39, 39), 64, epilogue=GATED),
    Case("vq.d5.k16.in", 17, WIDE, (39, 39), 65, epilogue=GATED),
]


def inputs(case: Case) -> Call:
    rng = torch.Generator().manual_seed(sum(map(ord, str(case))))
    spec = case.spec
    x = torch.randn(case.m, case.k, generator=rng).to(DTYPES[case.x])
    bias = torch.randn(sum(case.segments), generator=rng) if "bias" in case.epilogue else None
    residual = torch.randn(case.m, spec.n_out, generator=rng).to(DTYPES[case.out])
    weight = sample_weight(spec, seed=3)
    return Call(spec, case.schedule, x, weight, bias, residual if "residual" in case.epilogue else None)


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    return dict(zip(map(str, CASES), run_interpreted([inputs(case) for case in CASES]), strict=True))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: Case, outputs: dict[str, torch.Tensor]) -> None:
    call, got = inputs(case), outputs[str(case)]
    want = run_reference(replace(call.spec, out_dtype="f32"), call.x, call.weight, call.bias, call.residual).double()
    assert got.dtype == DTYPES[case.out]
    assert got.shape == want.shape
    error = float((got.double() - want).norm() / want.norm())
    limit = max(TOLERANCE[case.x], TOLERANCE[case.out])
    assert error <= limit, f"relative error {error:.2e}"


def test_cases_cover_what_formats_can_ask_for() -> None:
    formats = [parse_format(case.fmt) for case in CASES]
    assert all(isinstance(f, VectorFormat) for f in formats)
    vectors = [f for f in formats if isinstance(f, VectorFormat)]
    assert {f.dim for f in vectors} == {2, 4, 5, 6, 8, 16}
    assert {f.norm for f in vectors} == {"none", "col", "row"}
    assert {case.m for case in CASES} == {1, 2, 3, 17}
    for gemv in (0, 1):
        kind = [f for f, c in zip(vectors, CASES, strict=True) if c.schedule.get("gemv", 0) == gemv]
        assert any(f.groups > 1 and f.outliers and f.residual for f in kind)
        assert {"col", "row"} <= {f.norm for f in kind}


@pytest.mark.parametrize("fmt", ["vq.d4.k256", "vq.d8.k256.r256", "vq.d3.k4096.rn", f"{ALL}.cn", "vq.d8.k65536.in.rn"])
@pytest.mark.parametrize("m", [1, 4, 16, 512])
def test_schedules_are_legal_and_ordered(fmt: str, m: int) -> None:
    backend, spec = TritonBackend(), KernelSpec((4096,), 4096, fmt, VECTORS, "float", "bf16", "bf16")
    assert backend.supports(spec, HOPPER) is None
    found = list(backend.schedules(spec, HOPPER, m))
    seconds = [backend.predict(spec, s, HOPPER, m) for s in found]
    assert found
    assert seconds == sorted(seconds)
    assert spec.rows * spec.k / 4.8e12 < seconds[0] < 1e-2
    assert all(space.illegal(spec, s, HOPPER) is None for s in found)
    source = backend.emit(spec, found[0], HOPPER)
    compile(source.text, "module", "exec")
    assert f"def kernel({', '.join(kernel_args(spec, found[0]))})" in source.text


def test_operands_are_parameters_in_their_order() -> None:
    spec = KernelSpec((37,), 131, f"{ALL}.cn", VECTORS, "float")
    names = [name.removesuffix("_ptr") for name in kernel_args(spec, DOT)]
    assert names[:2] == ["x", "x_sum"]
    assert tuple(names[2 : 2 + len(spec.operands)]) == spec.operands
    assert "x_sum_ptr" not in kernel_args(spec, GEMV)
    assert kernel_args(spec, DOT)["residual_index_ptr"] == "*u8"
    assert kernel_args(spec, DOT)["index_ptr"] == "*i16"


def test_source_follows_the_decode_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meaning of a vector comes from `vector_program` alone: another program, another source."""
    spec = KernelSpec((32,), 64, "vq.d4.k256.r256", VECTORS, "float")
    both = emit_source(spec, DOT)
    plain = vector_program(VectorFormat(4, 256))
    monkeypatch.setattr("lowbit.codegen.triton.vector_emitter.vector_program", lambda fmt: plain)
    assert both.count("tl.load(residual_book_0") == 1
    assert emit_source(spec, DOT).count("tl.load(residual_book_0") == 0


def test_refusals() -> None:
    backend, spec = TritonBackend(), KernelSpec((64,), 64, "vq.d16.k256", VECTORS, "float")
    assert "layout" in str(backend.supports(replace(spec, layout=str(LAYOUTS["vectors8"])), HOPPER))
    assert "shorter than a vector" in str(space.illegal(spec, replace(GEMV, tile_n=8), HOPPER))
    big = KernelSpec((1 << 21,), 1 << 12, "vq.d2.k256", VECTORS, "float")
    assert "2**31 indices" in str(backend.supports(big, HOPPER))
    rounded = replace(spec, format="vq.d16.k256.s8", compute="int8")
    assert "not rounded" in str(backend.supports(rounded, HOPPER))
    assert backend.supports(replace(rounded, compute="float"), HOPPER) is None
    with pytest.raises(KernelError, match=r"LB0440.*cannot be split"):
        backend.emit(spec, split(DOT, 3), HOPPER)


def test_costs_follow_the_format() -> None:
    def loads(fmt: str) -> int:
        return gather_loads(VectorTiles(KernelSpec((64,), 64, fmt, VECTORS, "float"), DOT))

    assert [loads(f) for f in ("vq.d4.k16", "vq.d8.k16", "vq.d16.k16", "vq.d16.k16.f32", "vq.d6.k16")] == [
        1,
        1,
        2,
        4,
        3,
    ]

    def best(fmt: str, m: int) -> float:
        s = KernelSpec((8192,), 8192, fmt, VECTORS, "float", "bf16", "bf16")
        return model.predict(s, space.candidates(s, HOPPER, m)[0], HOPPER, m)

    assert best("vq.d8.k65536", 1) > best("vq.d8.k4096", 1)
    assert best("vq.d8.k256.r256", 1) > best("vq.d8.k256", 1)
    assert best("vq.d8.k256", 512) > best("vq.d8.k256", 16) >= best("vq.d8.k256", 1)
