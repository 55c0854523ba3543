"""Generated Triton kernels, run by Triton's interpreter, against the dequantized matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.emitter import emit_source
from lowbit.codegen.triton.interpret import Call, run_interpreted
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.program import Program, program
from lowbit.quantizers.formats import Element, Format, Granularity, parse_format
from lowbit.quantizers.qtensor import QTensor, column_map, pack, padded_columns

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Rounding of operands and output; sums are float32 everywhere.
TOLERANCE = {"f32": 2e-6, "bf16": 6e-3, "f16": 8e-4}

DOT = Schedule(32, 64, 64, 4, 3)
SWAP = DOT.with_extra(swap=1)
AFTER = DOT.with_extra(scale_after=1)
SWAP_AFTER = DOT.with_extra(swap=1, scale_after=1)
GEMV = Schedule(1, 64, 128, 4, 2).with_extra(gemv=1)
GEMV_AFTER = Schedule(2, 64, 128, 4, 2).with_extra(gemv=1, scale_after=1, evict_first=1)
SPLIT = Schedule(32, 64, 32, 4, 3, split_k=2)
SPLIT_GEMV = Schedule(2, 64, 64, 4, 2, split_k=2).with_extra(gemv=1)
SHAPES = (DOT, SWAP, AFTER, SWAP_AFTER, GEMV, GEMV_AFTER, SPLIT, SPLIT_GEMV)


@dataclass(frozen=True)
class Case:
    """One comparison."""

    fmt: str
    m: int
    k: int
    schedule: Schedule
    segments: tuple[int, ...] = (40,)
    x: str = "f32"
    out: str = "f32"
    epilogue: tuple[str, ...] = ()
    compute: str = "float"

    def __str__(self) -> str:
        s = self.schedule
        names = "-".join(name for name, value in s.extra if value) or "dot"
        steps = "+".join(self.epilogue)
        return f"{self.fmt}-m{self.m}-k{self.k}-{names}-split{s.split_k}-{self.x}-{self.out}-{self.compute}-{steps}"

    @property
    def spec(self) -> KernelSpec:
        layout = str(LAYOUTS["words"])
        return KernelSpec(self.segments, self.k, self.fmt, layout, self.compute, self.x, self.out, self.epilogue)  # type: ignore[arg-type]


def quantized(fmt: Format, n: int, k: int, rng: torch.Generator) -> QTensor:
    side = fmt.side_shape(n, k)
    codes = torch.randint(0, 2**fmt.bits, (n, k), generator=rng).to(torch.uint8)
    scale = (torch.rand(side, generator=rng) * 0.05 + 0.01).to(fmt.scale_dtype)
    zero = torch.randint(0, 2**fmt.bits, side, generator=rng).to(torch.uint8) if fmt.zero else None
    offset = (torch.randn(side, generator=rng) * 0.1).to(fmt.scale_dtype) if fmt.offset else None
    return QTensor(fmt, codes, scale, zero, offset)


def formats() -> list[Case]:
    """Every width and symmetry, over group sizes, kernel shapes, token counts and dtypes in turn."""
    groups, tokens, dtypes = ("g32", "g48", "g64", "ch", "t"), (1, 3, 17), ("f32", "bf16", "f16")
    cases = []
    for i, (bits, symmetry) in enumerate((b, s) for b in range(1, 9) for s in ("sym", "asym")):
        for turn in (i,) if bits in (1, 2, 5, 6, 8) else (i, i + 16):
            schedule = SHAPES[turn % len(SHAPES)]
            m, dtype = tokens[(turn + turn // 3) % 3], dtypes[(turn + turn // 9) % 3]
            k = (64, 70, 130)[(turn + turn // 6) % 3]
            if schedule.get("gemv", 0):
                m = min(m, schedule.tile_m + 1)  # every program interprets some 300 operations
            fmt = f"int{bits}.{groups[turn % 5]}.{symmetry}"
            cases.append(Case(fmt, m, k, schedule, x=dtype, out=("f32", dtype)[turn % 2]))
    return cases


def shapes() -> list[Case]:
    """Every kernel shape with ragged groups, odd columns, several tiles each way, epilogues and scale types."""
    gated, chain = ("bias", "silu_mul", "residual"), ("bias", "residual")
    return [
        *(Case("int4.g48.asym", 2, 70, s, x="bf16", epilogue=chain) for s in SHAPES),
        *(Case("int3.g64.sym", 1, 96, s, (40, 40), epilogue=gated) for s in (DOT, SWAP_AFTER, SPLIT, SPLIT_GEMV)),
        Case("int4.g64.asym", 5, 64, Schedule(16, 32, 32, 4, 2), (70,), epilogue=("residual",), out="bf16"),
        Case("int4.g64.asym", 40, 64, Schedule(16, 32, 64, 4, 2), (33, 37), epilogue=("bias",), out="f16"),
        Case("int4.g32.sym.f32", 3, 64, SWAP),
        Case("int4.g32.sym.bf16", 3, 64, DOT, x="bf16", out="bf16"),
        Case("int5.ch.asym", 2, 33, GEMV),
        Case("int2.g1.sym", 1, 5, DOT),
        *(Case(fmt, 3, 100, s) for fmt, s in (("int4.g16.sym", DOT), ("int4.g8.asym", GEMV), ("int3.g16.fz", SWAP))),
    ]


def integers() -> list[Case]:
    """Products of int8 activations."""
    split = Schedule(16, 64, 32, 4, 2, split_k=2)
    return [
        Case("int4.g32.asym", 3, 96, DOT, compute="int8"),
        Case("int8.g96.sym", 17, 130, SWAP, compute="int8"),
        Case("int8.ch.asym", 3, 140, split, compute="int8", x="bf16"),
        Case("int3.g48.asym", 1, 130, split, compute="int8", epilogue=("bias",)),
        Case("int2.g64.sym", 3, 128, DOT, (40, 40), compute="int8", epilogue=("silu_mul",)),
    ]


def offsets() -> list[Case]:
    """Float offsets: with weights, with sums, in integer products."""
    split = Schedule(16, 64, 32, 4, 2, split_k=2)
    return [
        Case("int2.g64.fz", 3, 70, GEMV_AFTER, epilogue=("bias",)),
        Case("int2.g64.fz", 17, 130, AFTER, x="bf16"),
        Case("int3.g48.fz", 1, 130, GEMV, x="bf16"),
        Case("int4.ch.fz.f32", 3, 70, SWAP_AFTER),
        Case("int8.g32.fz", 2, 70, SPLIT_GEMV, (40, 40), epilogue=("silu_mul",)),
        Case("int2.g64.fz", 3, 128, DOT, compute="int8"),
        Case("int3.g48.fz", 3, 130, split, compute="int8"),
        Case("int8.ch.fz", 17, 140, SWAP, compute="int8"),
    ]


def trellises() -> list[Case]:
    """Values that depend on codes of the words before: every width, within and across blocks and steps."""
    return [
        Case("tcq2.ch", 3, 130, DOT),
        Case("tcq2.g64", 3, 192, GEMV_AFTER, x="bf16"),
        Case("tcq1.ch", 1, 70, GEMV),
        Case("tcq3.g32", 5, 96, SWAP_AFTER, epilogue=("bias",)),
        Case("tcq4.g96", 3, 200, SPLIT, x="f16"),
        Case("tcq2.g64", 2, 192, SPLIT_GEMV, (40, 40), epilogue=("silu_mul",)),
    ]


CASES = [*formats(), *shapes(), *integers(), *offsets(), *trellises()]


def inputs(case: Case) -> tuple[torch.Tensor, list[QTensor], torch.Tensor | None, torch.Tensor | None]:
    rng = torch.Generator().manual_seed(sum(map(ord, str(case))))
    spec = case.spec
    weights = [quantized(parse_format(case.fmt), n, case.k, rng) for n in case.segments]
    x = torch.randn(case.m, case.k, generator=rng).to(DTYPES[case.x])
    bias = torch.randn(sum(case.segments), generator=rng) if "bias" in case.epilogue else None
    residual = torch.randn(case.m, spec.n_out, generator=rng).to(DTYPES[case.out])
    return x, weights, bias, residual if "residual" in case.epilogue else None


def rounded_activations(case: Case, x: torch.Tensor) -> torch.Tensor:
    """x as int8 per token and chunk times its scale, as the integer kernels see it."""
    spec = case.spec
    chunk = spec.chunk_blocks * 32
    cols = math.ceil(padded_columns(spec.fmt, case.k) / chunk) * chunk
    padded = torch.zeros(case.m, cols)
    where = column_map(spec.fmt, case.k)
    padded[:, where] = x.float()
    chunks = padded.view(case.m, -1, chunk)
    largest = chunks.abs().amax(dim=2, keepdim=True)
    q = torch.round(chunks * torch.where(largest > 0, 1 / (largest / 127), 0.0))
    return (q * (largest / 127)).view(case.m, cols)[:, where]


def expected(
    case: Case, x: torch.Tensor, weights: Sequence[QTensor], bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    wide = rounded_activations(case, x) if case.compute == "int8" else x
    y = wide.double() @ torch.cat([w.dequantize() for w in weights]).double().T
    if bias is not None:
        y = y + bias
    if "silu_mul" in case.epilogue:
        gate, up = y.chunk(2, dim=1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual


@dataclass(frozen=True)
class MadeUp(Element):
    """An element no backend has heard of: a 3-bit code (two planes) is an index into a table."""

    bits: int = 3
    symmetric: bool = False
    table: tuple[float, ...] = (-4.0, -2.5, -1.0, -0.25, 0.125, 0.5, 3.0, 6.0)

    @property
    def name(self) -> str:
        return "madeup3"

    @property
    def integer(self) -> bool:
        return False

    def levels(self) -> torch.Tensor:
        return torch.tensor(self.table)

    def decode(self) -> Program:
        p = program("code")
        p.result(p.lut(p.arg("code"), self.table))
        return p.done()


MADE_UP = "madeup3"


def made_up_call(schedule: Schedule) -> tuple[Call, torch.Tensor]:
    """A call of a kernel for `MadeUp`, and its expected output."""
    rng = torch.Generator().manual_seed(5)
    fmt = Format(MadeUp(), Granularity("g", 48))
    q = quantized(fmt, 40, 130, rng)
    x = torch.randn(3, 130, generator=rng)
    plain = KernelSpec((40,), 130, "int3.g48.asym", str(LAYOUTS["words"]), "float")
    spec = replace(plain)
    spec.__dict__["weight_format"] = fmt  # what parsing its text would give, were it in the list of elements
    call = Call(plain, schedule, x, pack([q], LAYOUTS["words"]), source=emit_source(spec, schedule))
    return call, x.double() @ q.dequantize().double().T


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    calls = []
    for case in CASES:
        x, weights, bias, residual = inputs(case)
        calls.append(Call(case.spec, case.schedule, x, pack(weights, LAYOUTS["words"]), bias, residual))
    made_up = [made_up_call(s)[0] for s in (DOT, GEMV)]
    results = run_interpreted([*calls, *made_up])
    return dict(zip([*map(str, CASES), f"{MADE_UP}-dot", f"{MADE_UP}-gemv"], results, strict=True))


@pytest.mark.parametrize(("name", "schedule"), [("dot", DOT), ("gemv", GEMV)])
def test_a_made_up_element_runs(name: str, schedule: Schedule, outputs: dict[str, torch.Tensor]) -> None:
    """A new format is one element: the emitter prints its decode program and nothing else changes."""
    _, want = made_up_call(schedule)
    torch.testing.assert_close(outputs[f"{MADE_UP}-{name}"].double(), want, rtol=1e-4, atol=1e-4)


def test_cases_cover_every_width_and_kernel_shape() -> None:
    elements = {f"int{b}" for b in range(1, 9)} | {f"tcq{b}" for b in range(1, 5)}
    assert {c.fmt.split(".")[0] for c in CASES} == elements
    assert {c.schedule for c in formats()} == set(SHAPES)
    assert len(set(map(str, CASES))) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_dequantized_matrix(case: Case, outputs: dict[str, torch.Tensor]) -> None:
    want = expected(case, *inputs(case))
    got = outputs[str(case)]
    assert got.dtype == DTYPES[case.out]
    assert got.shape == want.shape
    error = float((got.double() - want).norm() / want.norm())
    limit = max(TOLERANCE[case.x] if case.compute == "float" else 2e-6, TOLERANCE[case.out])
    assert error <= limit, f"relative error {error:.2e}"
