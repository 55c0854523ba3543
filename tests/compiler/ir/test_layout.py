"""Layouts are invertible, and `address` says where `pack` put every bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import LAYOUTS, Layout, plane_bits

PLANES, WHOLE = (
    ["panel16", "words", "fragments"],
    ["whole16", "signs16"],
)  # layouts of scalar codes; those of indices are tested with vector formats


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


@pytest.mark.parametrize("name", PLANES + WHOLE)
@pytest.mark.parametrize("bits", range(1, 9))
@given(tiles=st.integers(1, 3), blocks=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(name: str, bits: int, tiles: int, blocks: int, seed: int) -> None:
    layout = LAYOUTS[name]
    rows, cols = tiles * layout.row_tile, blocks * layout.block
    codes = torch.randint(0, 2**bits, (rows, cols), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    planes = layout.pack(codes, bits)
    assert sum(p.numel() * p.element_size() for p in planes) * 8 == rows * cols * bits
    assert torch.equal(layout.unpack(planes, bits, rows, cols), codes)


@pytest.mark.parametrize("name", PLANES + WHOLE)
@pytest.mark.parametrize("bits", range(1, 9))
def test_places_are_where_pack_put_every_bit(name: str, bits: int) -> None:
    layout = LAYOUTS[name]
    rows, cols = 2 * max(16, layout.row_tile), 128
    codes = torch.randint(0, 2**bits, (rows, cols)).to(torch.uint8)
    planes, found, low = layout.pack(codes, bits), torch.zeros(rows, cols, dtype=torch.int64), 0
    assert len(planes) == len(layout.widths(bits))
    for plane, width, index, shift in layout.places(bits, rows, cols):
        words = planes[plane].to(torch.int64) & (2**layout.container - 1)
        found |= ((words[index] >> shift) & (2**width - 1)) << low
        low += width
    assert torch.equal(found.to(torch.uint8), codes)


@pytest.mark.parametrize("name", ["panel16", *WHOLE])
@pytest.mark.parametrize("bits", range(1, 9))
def test_parts_are_the_places_of_one_row_and_every_fourth_column(name: str, bits: int) -> None:
    layout, found = LAYOUTS[name], list[list[tuple[int, int, int]]]()
    places = [
        (plane, index[0, ::4] // 64, shift[0, ::4] + b)
        for plane, width, index, shift in layout.places(bits, 16, 32)
        for b in range(width)
    ]
    for parts in layout.parts(bits):
        found.append([(p.plane, p.container, p.shift + b) for p in parts for b in range(p.width)])
    assert found == [[(plane, int(at[q]), int(shift[q])) for plane, at, shift in places] for q in range(8)]


@pytest.mark.parametrize(("bits", "masked"), [(3, 6), (5, 5), (6, 6), (7, 7)])
def test_most_codes_stay_whole(bits: int, masked: int) -> None:
    parts = LAYOUTS["whole16"].parts(bits)
    assert sum(len(part) == 1 for part in parts) == masked
    assert sum(part[0].shift == 0 and len(part) == 1 for part in parts) == bits


def test_codes_with_signs_are_indices_of_a_shuffle_as_they_lie() -> None:
    """The lowest four bits, the fifth in the byte's highest, the sign below it."""
    plane = LAYOUTS["signs16"].pack(torch.full((16, 32), 0b011001, dtype=torch.uint8), 6)[0]
    assert int(plane[0]) & 0b11001111 == 0b10001001
    plane = LAYOUTS["signs16"].pack(torch.full((16, 32), 0b100110, dtype=torch.uint8), 6)[0]
    assert int(plane[0]) & 0b11001111 == 0b01000110


def test_whole_codes_have_no_planes_and_need_containers_of_their_own() -> None:
    with pytest.raises(FormatError, match="LB0205"):
        LAYOUTS["whole16"].address(2, 16, 32)
    with pytest.raises(FormatError, match="LB0202"):
        Layout.parse("n=n k=b.s mem=b.n pack=s/16 block=1 whole=8")


@pytest.mark.parametrize("name", PLANES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_address_agrees_with_pack(name: str, bits: int) -> None:
    layout = LAYOUTS[name]
    rows, cols = 2 * max(16, layout.row_tile), 128
    codes = torch.randint(0, 2**bits, (rows, cols)).to(torch.uint8)
    words = layout.pack_plane(codes, bits).to(torch.int64) & (2**layout.container - 1)
    index, shift = layout.address(bits, rows, cols)
    assert torch.equal(((words[index] >> shift) & (2**bits - 1)).to(torch.uint8), codes)


def test_panel16_puts_four_consecutive_columns_of_sixteen_rows_in_a_vector() -> None:
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[3, 4:8] = torch.tensor([1, 2, 3, 4])  # row 3, second sub-column of the first vector
    plane = LAYOUTS["panel16"].pack_plane(codes, 4)
    assert plane[3 * 4 : 3 * 4 + 4].tolist() == [1 << 4, 2 << 4, 3 << 4, 4 << 4]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_fragments_are_operands_of_the_matrix_instructions(bits: int) -> None:
    """Every code of a tile: a lane's `bits` words hold exactly what PTX says the lane holds of operand A of m16n8k16,
    the two columns of a register 16 bits apart, those of its other half of columns 8 bits apart."""
    index, shift = LAYOUTS["fragments"].address(bits, 128, 128)
    for row in range(128):
        for col in range(128):
            lane = row % 8 * 4 + col % 8 // 2
            unit = (row // 64 * 2 + col // 64) * 4 + row % 64 // 16  # 16 rows x 64 columns
            part = col % 64 // 16 * 2 + row % 16 // 8  # step of 16 columns, half of the rows
            per = 8 // bits
            assert index[row, col] == (unit * 32 + lane) * bits + part // per
            assert shift[row, col] == col % 2 * 16 + col % 16 // 8 * 8 + part % per * bits


def test_side_values_of_a_lane_are_neighbours() -> None:
    rows = LAYOUTS["fragments"].side_order.reshape(8, 8)
    assert rows[3].tolist() == [3, 11, 19, 27, 35, 43, 51, 59]


def test_positions_that_do_not_fill_a_container_are_refused() -> None:
    with pytest.raises(FormatError, match="LB0205"):
        Layout.parse("n=p k=b.c3.e2 mem=p.b.c pack=e/32 block=6").pack_plane(torch.zeros(1, 6, dtype=torch.uint8), 8)


def test_unpadded_codes_are_refused() -> None:
    with pytest.raises(FormatError, match="LB0206"):
        LAYOUTS["panel16"].pack(torch.zeros(15, 32, dtype=torch.uint8), 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_side_values_round_trip(name: str) -> None:
    side = torch.rand(3 * max(16, LAYOUTS[name].row_tile), 5)
    assert torch.equal(LAYOUTS[name].unpack_side(LAYOUTS[name].pack_side(side)), side)
