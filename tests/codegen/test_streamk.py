"""Cutting the work of a matrix into equal shares."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.codegen.streamk import FixedLine, Line
from lowbit.compiler.errors import KernelError

SIZES = st.tuples(st.integers(1, 300), st.integers(1, 20), st.integers(1, 140))
LINES = SIZES.map(lambda s: Line(s[0], s[1], min(s[2], s[0] * s[1])))


@given(LINES)
@settings(max_examples=60, deadline=None)
def test_every_unit_once_in_equal_shares(line: Line) -> None:
    found = [line.pieces(block) for block in range(line.blocks)]
    units = sorted((p.tile, u) for pieces in found for p in pieces for u in range(p.first, p.last))
    assert units == [(tile, u) for tile in range(line.tiles) for u in range(line.units)]
    work = [sum(p.last - p.first for p in pieces) for pieces in found]
    assert max(work) - min(work) <= 1
    assert max(work) == line.longest


@given(LINES)
@settings(max_examples=60, deadline=None)
def test_who_shares_a_tile_is_known_without_looking(line: Line) -> None:
    """Workspace holds two parts a block, and the last arriver knows whom it waits for."""
    whole = line.waves * line.blocks
    sharers: dict[int, list[int]] = {}
    for block in range(line.blocks):
        parts = [p for p in line.pieces(block) if p.last - p.first < line.units]
        assert len(parts) <= 2
        for p in parts:
            assert p.tile >= whole
            sharers.setdefault(p.tile - whole, []).append(block)
    for tile, blocks in sharers.items():
        first, last = line.owner(tile * line.units), line.owner((tile + 1) * line.units - 1)
        assert blocks == list(range(first, last + 1))


def test_waves_are_whole_where_they_fit() -> None:
    assert (Line(264, 10, 132).waves, Line(264, 10, 132).rest) == (2, 0)
    assert (Line(300, 10, 132).waves, Line(300, 10, 132).rest) == (1, 168)
    assert (Line(50, 10, 132).waves, Line(50, 10, 132).longest) == (0, 4)


@given(SIZES, st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_fixed_cuts_do_not_depend_on_the_number_of_tiles(sizes: tuple[int, int, int], split: int) -> None:
    tiles, units, blocks = sizes
    split = min(split, units)
    line, one = FixedLine(tiles, units, blocks, split), FixedLine(1, units, 1, split)
    cuts = [(p.first, p.last) for p in one.pieces(0)]
    found = [line.pieces(block) for block in range(blocks)]
    for tile in range(tiles):
        assert sorted((p.first, p.last) for pieces in found for p in pieces if p.tile == tile) == cuts
    assert [first for first, _ in cuts] == [0, *(last for _, last in cuts[:-1])]
    assert cuts[-1][1] == units
    assert max(sum(p.last - p.first for p in pieces) for pieces in found) <= line.longest
    assert line.parts == (0 if split == 1 else tiles * split)


def test_nonsense_is_refused() -> None:
    for sizes in ((0, 1, 1), (2, 3, 7)):
        with pytest.raises(KernelError, match="LB0418"):
            Line(*sizes)
    with pytest.raises(KernelError, match="LB0418"):
        FixedLine(4, 3, 2, 4)
