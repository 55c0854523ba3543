"""Which schedules are trusted where: what measurements decided, that predictions do not see."""

from __future__ import annotations

import pytest
from _cpp import BACKEND, spec_of

from lowbit.codegen.schedule import Schedule
from lowbit.compiler.ir.target import Target


def trusted(fmt: str, compute: str, arch: str, m: int) -> list[Schedule]:
    found = list(BACKEND.schedules(spec_of(fmt, compute, (4096,), 4096, arch), Target("cpu", arch), m))
    assert len(found) <= 8
    return found


@pytest.mark.parametrize("m", [1, 4, 8])
def test_fewer_panels_fetch_further_ahead_where_weights_go_to_the_second_level_cache(m: int) -> None:
    for fmt, together in (("int4.g128.sym", 4096), ("e3m2.ch", 6144), ("int2.g64.fz", 8192)):
        direct = [s for s in trusted(fmt, "int8", "avx512vbmi", m) if not s.get("buffered", 0) and s.get("prefetch", 0)]
        assert direct
        assert all(s.get("prefetch", 0) == min(4096, together * 16 // s.tile_n) for s in direct), (fmt, direct)
    bytes_ = [s for s in trusted("int8.ch.sym", "int8", "avx512vbmi", m) if s.get("prefetch", 0)]
    assert all(s.get("prefetch", 0) == (1024 if s.tile_n == 64 else 4096) for s in bytes_)
    near = [s for s in trusted("int8.ch.sym", "int8", "avx512vnni", m) if not s.get("buffered", 0)]
    assert {s.get("prefetch", 0) for s in near} <= {0, 1024}


@pytest.mark.parametrize("arch", ["avx512bf16", "avx512vnni"])
def test_groups_within_blocks_leave_registers_for_sums_of_the_panel_at_hand(arch: str) -> None:
    """Eight tokens of two panels took 1.5 times as long as of one: their sums and results were spilled."""
    for fmt, compute in (("nvfp4", "int8"), ("int4.g16.asym", "int16"), ("int4.g16.sym", "int8")):
        for m in (1, 4, 8, 16):
            direct = [s for s in trusted(fmt, compute, arch, m) if not s.get("buffered", 0)]
            assert direct
            assert all(s.tile_m * (s.tile_n // 16 + 1) <= 20 and s.tile_m <= 8 for s in direct), (fmt, m)
    sides = spec_of("nvfp4", "int8", (64, 64), 256, arch, epilogue=("silu_mul",))
    pairs = [s for s in BACKEND.schedules(sides, Target("cpu", arch), 8) if not s.get("buffered", 0)]
    assert {(s.tile_m, s.tile_n) for s in pairs} == {(4, 32)}


def test_a_few_tokens_of_two_digits_are_multiplied_as_words_with_vbmi() -> None:
    for fmt in ("int8.ch.sym", "int4.g128.sym", "int2.g64.fz"):
        for m, words in ((1, 0), (2, 0), (4, 1), (8, 1), (32, 1), (64, 0), (512, 0)):
            assert {s.get("words", 0) for s in trusted(fmt, "int16", "avx512vbmi", m)} == {words}, (fmt, m)
            assert {s.get("words", 0) for s in trusted(fmt, "int16", "avx512vnni", m)} == {0}, (fmt, m)
            assert {s.get("words", 0) for s in trusted(fmt, "int8", "avx512vbmi", m)} == {0}, (fmt, m)
    target = Target("cpu", "avx512vbmi")
    spec = spec_of("int8.ch.sym", "int16", (4096,), 4096, target.arch)
    for m, tile in ((4, (4, 64)), (8, (8, 32)), (16, (8, 32))):
        cost = {BACKEND.predict(spec, s, target, m): s for s in BACKEND.schedules(spec, target, m)}
        best = cost[min(cost)]
        assert (best.tile_m, best.tile_n) == tile
