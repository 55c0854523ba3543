"""Cutting mixed work into equal shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.streamk import Line, line_of, pieces
from lowbit.compiler.errors import KernelError

LINES = st.builds(
    Line,
    tiles=st.integers(1, 40),
    wide=st.integers(0, 12),
    narrow=st.integers(1, 30),
    cost_wide=st.integers(1, 5),
    cost_narrow=st.integers(1, 3),
    workers=st.integers(1, 140),
)


@given(LINES)
@settings(max_examples=200, deadline=None)
def test_every_step_once_in_equal_shares(line: Line) -> None:
    found = pieces(line)
    steps = [(p.tile, step) for p in found for step in range(p.first, p.last)]
    assert steps == [(tile, step) for tile in range(line.tiles) for step in range(line.steps)]
    cost = [0] * line.workers
    for p in found:
        cost[p.worker] += line.cost(p.first, p.last)
    share, most = line.tiles * line.tile_cost / line.workers, max(line.cost_wide, line.cost_narrow)
    assert all(abs(c - share) < most + 1 for c in cost)
    owners = [p.tile for p in found if p.owner]
    assert owners == list(range(line.tiles))
    assert [p.worker for p in found] == sorted(p.worker for p in found)


def test_costs_move_the_cuts() -> None:
    """Four wide steps of cost 2 weigh as much as eight narrow ones: that is where one tile is cut for two workers."""
    equal = pieces(Line(8, 4, 8, 1, 1, 2))
    weighted = pieces(line_of(Schedule().with_extra(workers=2), 8, 4, 8))
    assert [p.tile for p in weighted if p.worker == 0] == [p.tile for p in equal if p.worker == 0] == [0, 1, 2, 3]
    three = pieces(Line(1, 4, 8, 2, 1, 2))
    assert [(p.first, p.last) for p in three] == [(0, 4), (4, 12)]


def test_partial_sums_in_order_give_the_same_bits_every_time() -> None:
    line = Line(6, 2, 5, 2, 1, 4)
    partial = torch.randn(line.tiles, line.steps, 8, generator=torch.Generator().manual_seed(0))

    def run(order: list[int]) -> torch.Tensor:
        done: dict[tuple[int, int], torch.Tensor] = {}
        found = pieces(line)
        for i in order:  # whatever finishes first
            p = found[i]
            total = torch.zeros(8)
            for step in range(p.first, p.last):
                total = total + partial[p.tile, step]
            done[p.tile, p.first] = total
        out = torch.zeros(line.tiles, 8)
        for tile, first in sorted(done):
            out[tile] = out[tile] + done[tile, first]
        return out

    count = len(pieces(line))
    first = run(list(range(count)))
    assert torch.equal(first, run(list(reversed(range(count)))))
    assert torch.allclose(first, partial.sum(1), atol=1e-5)


def test_nonsense_is_refused() -> None:
    with pytest.raises(KernelError, match="LB0418"):
        Line(0, 1, 1, 1, 1, 1)
