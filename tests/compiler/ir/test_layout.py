"""Layouts are invertible, and `address` says where `pack` put every bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import LAYOUTS, Layout, plane_bits

CODES = ["panel16", "words"]  # layouts of scalar codes; those of indices are tested with vector formats


@pytest.mark.parametrize("name", LAYOUTS)
def test_text_form_round_trips(name: str) -> None:
    assert Layout.parse(str(LAYOUTS[name])) == LAYOUTS[name]


@pytest.mark.parametrize(
    "text", ["", "n=p k=b", "n=p.r16 k=b.s mem=p.b pack=s/8 block=32", "n=? k=b mem=b pack=s/8 block=1"]
)
def test_bad_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        Layout.parse(text)


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_are_powers_of_two_that_add_up(bits: int) -> None:
    assert sum(plane_bits(bits)) == bits
    assert all(8 % width == 0 for width in plane_bits(bits))


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("bits", range(1, 9))
@given(tiles=st.integers(1, 3), blocks=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(name: str, bits: int, tiles: int, blocks: int, seed: int) -> None:
    layout = LAYOUTS[name]
    rows, cols = tiles * layout.row_tile, blocks * layout.block
    codes = torch.randint(0, 2**bits, (rows, cols), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    planes = layout.pack(codes, bits)
    assert sum(p.numel() * p.element_size() for p in planes) * 8 == rows * cols * bits
    assert torch.equal(layout.unpack(planes, bits, rows, cols), codes)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_address_agrees_with_pack(name: str, bits: int) -> None:
    layout = LAYOUTS[name]
    codes = torch.randint(0, 2**bits, (32, 64)).to(torch.uint8)
    words = layout.pack_plane(codes, bits).to(torch.int64) & (2**layout.container - 1)
    index, shift = layout.address(bits, 32, 64)
    assert torch.equal(((words[index] >> shift) & (2**bits - 1)).to(torch.uint8), codes)


def test_panel16_puts_four_consecutive_columns_of_sixteen_rows_in_a_vector() -> None:
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[3, 4:8] = torch.tensor([1, 2, 3, 4])  # row 3, second sub-column of the first vector
    plane = LAYOUTS["panel16"].pack_plane(codes, 4)
    assert plane[3 * 4 : 3 * 4 + 4].tolist() == [1 << 4, 2 << 4, 3 << 4, 4 << 4]


def test_unpadded_codes_are_refused() -> None:
    with pytest.raises(FormatError, match="LB0206"):
        LAYOUTS["panel16"].pack(torch.zeros(15, 32, dtype=torch.uint8), 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_side_values_round_trip(name: str) -> None:
    side = torch.rand(48, 5)
    assert torch.equal(LAYOUTS[name].unpack_side(LAYOUTS[name].pack_side(side)), side)
