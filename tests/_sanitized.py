"""Kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, run on odd shapes in a process of their own.

`python tests/_sanitized.py FAMILY` with the sanitizers' libraries preloaded prints how many shapes it ran; a finding, a
wrong result, or one that depends on the number of threads ends it with a status other than 0.
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _cpp import BACKEND, DTYPES, error, expected, finished, spec_of, tensors_of

import lowbit.codegen.cpp.launch as launching
import lowbit.codegen.cpp.toolchain as toolchain
from lowbit.codegen.attend import AttendSpec
from lowbit.codegen.cpp.attend import attend_source
from lowbit.codegen.cpp.attend_launch import load_attend
from lowbit.codegen.cpp.toolchain import compile_shared
from lowbit.codegen.reference.backend import prepare_activations
from lowbit.codegen.reference.kvstate import KVState, allocate, attend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.target import Target, host_target, isa_runs_here
from lowbit.quantizers.weights import pack_weights

SANITIZERS = "address,undefined"
FLAGS = ("-O0", "-g", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=undefined")
HOST = host_target().arch
FEW, MANY = (0, 1, 2, 3, 4, 5, 7, 8, 9, 11), (0, 1, 2, 3, 5, 6, 7, 13, 17, 33, 193)
"""Token counts of direct and of buffered kernels: none, whole tiles, tails, more than one block of tokens."""
EVERY = ("bias", "silu_mul", "residual")
THREADS = (1, 2, 3)


@dataclass(frozen=True)
class Case:
    """One kernel: format, products, rows of segments, columns, token class of the schedule, more of the spec."""

    fmt: str
    compute: str
    segments: tuple[int, ...]
    k: int
    m: int
    arch: str = HOST
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token counts to run."""
        return FEW if self.m <= 4 else MANY

    def spec(self) -> KernelSpec:
        """What the kernel computes."""
        return spec_of(self.fmt, self.compute, self.segments, self.k, self.arch, **self.rest)


FAMILIES: dict[str, list[Case]] = {
    "integers": [
        Case("int4.g128.asym", "int16", (257,), 601, 1),
        Case("int8.ch.sym", "int8", (131, 150), 577, 1, rest={"epilogue": ("bias", "residual"), "x_dtype": "bf16"}),
        Case("int3.g48.fz", "int16", (300,), 460, 4),
        Case("int2.g64.asym", "int8", (83, 83), 900, 4, rest={"epilogue": EVERY, "out_dtype": "f16"}),
        Case("int5.g32.asym", "float", (33,), 100, 2),
        Case("bcq3.g48", "int16", (41, 41), 205, 2, rest={"epilogue": EVERY}),
        Case("tcq3.g96", "int16", (41, 41), 205, 2, rest={"epilogue": EVERY}),
        Case("tcq2.ch", "int8", (33,), 77, 17),
        Case("int1.t.asym", "int8", (1,), 33, 1),
        Case("int7.g16.asym", "int8", (200,), 700, 17),
        Case("int6.ch.sym", "int16", (140,), 999, 33, rest={"epilogue": ("residual", "bias"), "out_dtype": "bf16"}),
    ],
    "floats": [
        Case("e3m2.ch", "int16", (259,), 545, 1),
        Case("mxfp4", "int8", (140, 140), 500, 4, rest={"epilogue": EVERY}),
        Case("e4m3.ch", "float", (260,), 531, 1, rest={"x_dtype": "f16"}),
        Case("nvfp4", "int16", (33,), 176, 17),
        Case("e5m2.g48.f32", "float", (37,), 145, 33, rest={"epilogue": ("bias",)}),
        Case("e4m3.g48", "float", (67,), 145, 4, rest={"x_dtype": "bf16", "epilogue": EVERY[:1]}),
        Case("nvfp4", "int16", (41, 41), 176, 33, rest={"x_dtype": "bf16", "epilogue": EVERY}),
    ],
    "rounded": [
        Case("int4.g128.asym.i8ch", "int8", (259,), 577, 1, rest={"activation": "int8.token"}),
        Case("int4.g64.sym.perm", "int8", (270,), 520, 4, rest={"activation": "int4.g64.w3.c90"}),
        Case("e2m3.ch", "int8", (130,), 160, 2, rest={"activation": "int8.g64", "rotate": 32}),
        Case("int4.g48.sym", "float", (17,), 200, 17, rest={"activation": "int8.g64"}),
        Case("e4m3.ch", "float", (35,), 100, 33, rest={"activation": "e5m2.g48"}),
        Case("int8.ch.asym.f32", "int8", (131,), 580, 17, rest={"activation": "int8.token", "epilogue": ("bias",)}),
    ],
    "vectors": [
        Case("vq.d8.k4096", "float", (330,), 450, 1),
        Case("vq.d4.k256.r256", "float", (133, 140), 477, 4, rest={"epilogue": ("bias",), "x_dtype": "bf16"}),
        Case("vq.d6.k16.c4.o9v4k16.cn", "float", (131,), 333, 17, rest={"epilogue": ("bias", "residual")}),
        Case("vq.d3.k16.rn", "float", (41, 41), 65, 17, rest={"epilogue": EVERY}),
        Case("vq.d8.k65536.o5v3k16.c2.cn.f32", "float", (100,), 45, 4),
        Case("vq.d12.k256", "float", (50, 17), 33, 1),
        Case("vq.d8.k4096.s8", "int16", (330,), 450, 1),
        Case("vq.d3.k16.rn.s8", "int8", (41, 41), 65, 17, rest={"epilogue": EVERY}),
        Case("vq.d6.k16.r16.c4.o9v13k16.cn.s8", "int8", (131,), 333, 4, rest={"x_dtype": "bf16"}),
        Case("vq.d4.k256.r16.s8", "int8", (133, 140), 477, 33, rest={"activation": "int8.token"}),
        Case("vq.d4.k64.r16.s8", "int16", (97,), 67, 1),
        Case("vq.d5.k256.s8", "float", (97,), 66, 1),
    ],
    "inputs": [
        Case("vq.d8.k256.r256.in.rn", "int16", (200,), 264, 1, rest={"x_dtype": "bf16", "out_dtype": "bf16"}),
        Case("vq.d4.k64.r256.in.s8", "int16", (70, 70), 332, 4, rest={"epilogue": EVERY, "out_dtype": "bf16"}),
        Case("vq.d3.k128.r8.in.cn.f32", "int16", (97,), 333, 17, rest={"out_dtype": "bf16"}),
        Case("vq.d8.k4096.r256.in", "float", (150,), 1304, 1, rest={"epilogue": ("residual",)}),
        Case("vq.d6.k65536.in.rn.s8", "float", (70, 70), 390, 33, rest={"epilogue": EVERY}),
    ],
    "elsewhere": [
        Case("int4.g128.asym", "int8", (257,), 601, 1, "avx2"),
        Case("e3m2.ch", "int16", (129,), 145, 17, "avx2"),
        Case("int1.g64.asym", "int16", (259,), 545, 2, "avx2"),
        Case("e3m2.g64", "int8", (129,), 145, 2, "avx2"),
        Case("bcq2.g64", "int8", (129,), 345, 1, "avx2"),
        Case("tcq2.g64", "int16", (129,), 345, 1, "avx2"),
        Case("int8.ch.sym", "int8", (41, 41), 160, 33, "avx2", {"epilogue": EVERY}),
        Case("int4.g64.sym", "int16", (33,), 333, 17, "avx2"),
        Case("int8.g48.asym", "int16", (33,), 160, 4, "avx512"),
        Case("vq.d6.k256.o5v4k16.cn", "float", (97,), 66, 4, "avx2"),
        Case("int3.g48.fz", "int16", (33,), 160, 17, "generic"),
        Case("vq.d4.k256", "float", (97,), 66, 17, "generic"),
        Case("vq.d4.k256.s8", "int16", (97,), 67, 2, "avx2"),
        Case("vq.d16.k16.r16.s8", "int8", (97,), 67, 17, "generic"),
    ],
}
ATTENTION = [
    AttendSpec("k2v4.kc32.vt32.w64", 80),
    AttendSpec("kv8.kc64.vc32.w64", 64),
    AttendSpec("k16v4.vt.w64", 64),
    AttendSpec("kv16", 48, "f32"),
    AttendSpec("kv16", 80, "bf16"),
]
LENGTHS = ((5, 1), (63, 2), (131, 3), (389, 1))
"""Tokens in the cache and queries."""


def shapes(family: str) -> int:
    """How many shapes a family runs."""
    if family == "attention":
        return len(ATTENTION) * len(LENGTHS)
    return sum(len(case.tokens) for case in FAMILIES[family] if isa_runs_here(case.arch))


def main(family: str) -> None:
    os.environ.pop("LD_PRELOAD", None)  # the compiler, a process of its own, takes minutes with it
    toolchain.TIMEOUT = 600.0
    launching._room = exact_room  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix="lowbit-test-") as name:
        folder = Path(name)
        print(run_attention(folder) if family == "attention" else run_family(FAMILIES[family], folder))


_room: list[torch.Tensor] = []


def exact_room(size: int) -> int:
    """Scratch memory of just the size that a call asks for, so that whatever lies beyond it is found."""
    _room[:] = [torch.empty(size, dtype=torch.uint8)]
    return _room[0].data_ptr()


def run_family(cases: list[Case], folder: Path) -> int:
    """Builds and runs the cases that this machine can; returns the number of shapes."""
    here = [case for case in cases if isa_runs_here(case.arch)]

    def build(n: int) -> Any:
        spec, target = here[n].spec(), Target("cpu", here[n].arch)
        schedule = next(iter(BACKEND.schedules(spec, target, here[n].m)))
        source = BACKEND.emit(spec, schedule, target)
        BACKEND.compile(replace(source, flags=(*source.flags, *FLAGS)), folder / f"{n}.so")
        return BACKEND.load(folder / f"{n}.so", spec, schedule), schedule

    with ThreadPoolExecutor(2) as pool:
        kernels = list(pool.map(build, range(len(here))))
    return sum(check(run, case, schedule) for (run, schedule), case in zip(kernels, here, strict=True))


def check(run: Any, case: Case, schedule: Schedule) -> int:
    """One kernel at all its token counts, with 1, 2 and 3 threads: right, and the same bits."""
    spec, rng = case.spec(), torch.Generator().manual_seed(7)
    weights = tensors_of(spec)
    packed = pack_weights(weights, spec.layout_)
    limit = {"f32": 1e-5, "bf16": 2**-5, "f16": 2**-8}[spec.out_dtype]
    for m in case.tokens:
        x = torch.randn(m, spec.k, generator=rng).to(DTYPES[spec.x_dtype])
        bias = torch.randn(sum(spec.segments), generator=rng)
        residual = torch.randn(m, spec.n_out, generator=rng).to(DTYPES[spec.out_dtype])
        got = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            out = torch.full((m, spec.n_out), float("nan"), dtype=DTYPES[spec.out_dtype])
            run(x, packed, bias, residual, out)
            got.append(out)
        assert error(got[0], wanted(spec, schedule, x, weights, packed, bias, residual)) < limit, (case, m)
        assert all(torch.equal(got[0], other) for other in got[1:]), (case, m)
    return len(case.tokens)


def wanted(
    spec: KernelSpec,
    schedule: Schedule,
    x: torch.Tensor,
    weights: list[Any],
    packed: Any,
    bias: torch.Tensor,
    residual: torch.Tensor,
) -> torch.Tensor:
    """float64: the definition, epilogue included."""
    if (spec.activation or spec.rotate) and not spec.vector:
        dense = torch.cat([w.dequantize() for w in weights]).double()
        dense = dense if weights[0].perm is None else dense[:, weights[0].perm.long()]
        y = prepare_activations(spec, x, packed).double() @ dense.T
    else:
        y = expected(spec, x, weights, schedule)
    return finished(spec, y, bias, residual)


def run_attention(folder: Path) -> int:
    """Packed key-value caches: appended to in pieces, then read by grouped heads."""
    for n, spec in enumerate(ATTENTION):
        source = attend_source(spec, HOST)
        (folder / f"{n}.cpp").write_text(source.text)
        compile_shared(folder / f"{n}.cpp", (*source.flags, *FLAGS), folder / f"{n}.so")
        kernel = load_attend(folder / f"{n}.so", spec)
        for tokens, queries in LENGTHS:
            check_attention(spec, kernel, tokens, queries)
    return len(ATTENTION) * len(LENGTHS)


def check_attention(spec: AttendSpec, kernel: Any, tokens: int, queries: int) -> None:
    """Two sequences, three key-value heads, nine query heads."""
    rng = torch.Generator().manual_seed(tokens)
    capacity = -(-tokens // spec.span) * spec.span
    state = KVState(spec, allocate(spec, 2, 3, capacity, torch.device("cpu")))
    parts, first = list(state.parts.values()), tokens // 3
    for begin, end in ((0, first), (first, tokens)):
        keys, values = (torch.randn(2, 3, end - begin, spec.head_dim, generator=rng) for _ in "kv")
        kernel.append(keys, values, parts, begin)
    q = torch.randn(2, 9, queries, spec.head_dim, generator=rng)
    got = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        got.append(kernel.attend(q, parts, tokens, None, 0.125))
    want = attend(q, state, tokens, None, 0.125)
    assert float((got[0] - want).norm() / want.norm()) < 1e-3, (spec, tokens)
    assert all(torch.equal(got[0], other) for other in got[1:]), (spec, tokens)


if __name__ == "__main__":
    main(sys.argv[1])
