"""Spaces of the real backends: every candidate is legal or rejected with a sentence; what is measured; timing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from _tune_backend import SLOW, schedule, use_fake

from lowbit.codegen import load_backend
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune.device import device_name
from lowbit.codegen.tune.measure import race
from lowbit.codegen.tune.space import candidates_of, legal_schedules, neighbours, rejections, schedule_text, shortlist
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import parse_format

CASES = [
    ("cpp", "cpu-avx512vnni", "int4.g64.sym", "int16"),
    ("cpp", "cpu-avx2", "e3m2.ch", "int16"),
    ("cpp", "cpu-generic", "int3.g64.fz", "float"),
    ("cpp", "cpu-avx512", "vq.d8.k256.r256", "float"),
    ("cuda", "sm_90", "int4.g128.sym", "float"),
    ("cutlass", "sm_90", "int4.g128.asym", "float"),
    ("triton", "sm_80", "int4.g128.asym", "float"),
    ("triton", "sm_90", "vq.d4.k256", "float"),
    ("triton", "sm_90", "vq.d8.k256.r256.in.rn", "float"),
]


def spec_of(backend: str, fmt: str, compute: str, n: int = 1024, epilogue: tuple[str, ...] = ()) -> KernelSpec:
    layout = LAYOUTS[load_backend(backend).layout_of(parse_format(fmt))]
    dtype = "f32" if backend == "cpp" else "bf16"
    segments = (n, n) if epilogue else (n,)
    return KernelSpec(segments, 1024, fmt, str(layout), compute, dtype, dtype, epilogue)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "arch", "fmt", "compute"), CASES)
@pytest.mark.parametrize("m", [1, 16, 512])
def test_every_candidate_is_legal_or_rejected_with_a_reason(
    name: str, arch: str, fmt: str, compute: str, m: int
) -> None:
    backend, target, spec = load_backend(name), Target.parse(arch), spec_of(name, fmt, compute)
    found = candidates_of(backend, spec, target, m)
    legal = legal_schedules(found)
    trusted = list(backend.schedules(spec, target, m))
    assert legal[0] == trusted[0]
    assert set(trusted) <= set(legal)
    assert len({c.schedule for c in found}) == len(found)
    assert all((c.predicted or 0) > 0 if not c.problem else c.predicted is None for c in found)
    assert sum(n for _, n, _ in rejections(found)) == len(found) - len(legal)
    short = shortlist(backend, legal, 6)
    assert len(short) == len(set(short)) == min(6, len(legal))
    assert short[0] == legal[0]
    for near in neighbours(legal, short[0]):
        a, b = near.to_dict(), short[0].to_dict()
        assert sum(a.get(k, 0) != b.get(k, 0) for k in {*a, *b}) == 1


def test_reasons_name_what_is_exceeded() -> None:
    def reasons(name: str, arch: str, spec: KernelSpec, m: int) -> str:
        found = candidates_of(load_backend(name), spec, Target.parse(arch), m)
        return "\n".join(c.problem for c in found if c.problem)

    many = spec_of("triton", "int4.g128.sym", "float")
    assert "bytes of shared memory, sm_86 has 101376" in reasons("triton", "sm_86", many, 512)
    assert "registers a thread, there are 255" in reasons("triton", "sm_86", many, 512)
    gated = spec_of("cpp", "int4.g64.sym", "int16", 64, ("silu_mul",))
    assert "16 rows are no whole pairs" in reasons("cpp", "cpu-avx512vnni", gated, 1)
    assert "need more than 16 registers" in reasons("cpp", "cpu-avx2", gated, 16)
    assert "need vector units" in reasons("cpp", "cpu-generic", gated, 1)


def test_a_shortlist_has_one_of_every_kind_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, spec = load_backend("cpp"), spec_of("cpp", "int4.g64.sym", "int16")
    legal = legal_schedules(candidates_of(backend, spec, Target.parse("cpu-avx512vnni"), 4))
    short = shortlist(backend, legal, 6)
    kinds = {(s.get("buffered", 0), s.get("words", 0)) for s in legal}
    assert {(s.get("buffered", 0), s.get("words", 0)) for s in short[: len(kinds)]} == kinds
    use_fake(monkeypatch, tmp_path)
    assert schedule_text(schedule(SLOW)) == "tile_m=2 does=1"


def test_a_race_takes_turns_and_drops_what_is_far_behind() -> None:
    order: list[int] = []
    bursts = [lambda s=s: s for s in (2.0, 1.0, 9.0)]  # type: ignore[misc]
    assert race(bursts, 1e9, order.append) == [2.0, 1.0, 9.0]
    assert order[:9] == [0, 1, 2] * 3
    assert set(order[9:]) == {1}
    times = itertools.cycle([5.0, 1.0, 1.0])
    assert race([lambda: next(times)], 0.0) == [1.0]  # some rounds whatever the budget


def test_devices_are_told_apart() -> None:
    here = device_name(Target("cpu", "generic"))
    assert here is not None
    assert here.startswith("cpu-generic; ")
    assert "thread" in here
    assert device_name(Target("ref", "ref")) is None
