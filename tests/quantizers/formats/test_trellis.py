"""Trellis codes: what they stand for, in canonical form, in every layout, and by the shared decode programs."""

from __future__ import annotations

import pytest
import torch

from lowbit.codegen.decode import trellis_program
from lowbit.codegen.library.dequantize import dense_rows
from lowbit.codegen.reference.backend import decode_weight
from lowbit.codegen.reference.torch_ops import TORCH
from lowbit.codegen.table import TableSpec
from lowbit.compiler.errors import FormatError, KernelError
from lowbit.compiler.ir.layout import LAYOUTS, plane_bits
from lowbit.quantizers.formats import TrellisElement, parse_activation, parse_format, scalar_format, trellis_catalog
from lowbit.quantizers.qtensor import pack, unpack
from lowbit.quantizers.weights import random_weight

TEXTS = [str(f) for f in trellis_catalog()] + ["tcq2.ch", "tcq3.g32.bf16", "tcq1.t", "tcq2.g64.perm", "tcq4.g96.e8m0"]


def value(element: TrellisElement, codes: list[int]) -> int:
    """The definition, in words: a field per plane of the last codes, earlier ones lower; four bytes of a product."""
    last, state, low, at = [0] * element.window, 0, 0, 0
    for code in codes:
        last = [*last[1:], code]
    for width in plane_bits(element.bits):
        for place, code in enumerate(last):
            state |= (code >> low & 2**width - 1) << (at + width * place)
        low, at = low + width, at + width * element.window
    product = state * 0xDB5B
    return sum(product >> 8 * i & 255 for i in range(4)) // 4 - 96


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(text: str) -> None:
    fmt = scalar_format(text)
    assert str(fmt) == text
    assert scalar_format(str(fmt)) == fmt
    assert fmt.bits_per_weight(128, 256) >= fmt.bits


@pytest.mark.parametrize("bits", range(1, 5))
def test_values_are_those_of_the_definition(bits: int) -> None:
    element = TrellisElement(bits)
    codes = torch.randint(0, 2**bits, (3, 40), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    found = element.values(codes)
    for row in range(3):
        for column in range(40):
            assert found[row, column] == value(element, codes[row, : column + 1].tolist())


@pytest.mark.parametrize("bits", range(1, 5))
def test_the_decode_program_gives_every_level(bits: int) -> None:
    element = TrellisElement(bits)
    states = torch.arange(2**element.state_bits)
    levels = element.decode().run(TORCH, {"code": states})
    assert torch.equal(levels, element.levels())
    assert levels.min() == -96
    assert levels.max() == 86
    assert levels.std() == pytest.approx(32, abs=0.5)
    assert element.integer_levels is not None
    assert element.integer_levels.plain
    assert element.integer_levels.integers == tuple(range(-96, 87))


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("text", TEXTS)
def test_every_layout_gives_back_codes_and_numbers(text: str, layout: str) -> None:
    if LAYOUTS[layout].block == 1:
        pytest.skip("a layout of vectors' indices")
    fmt = scalar_format(text)
    q = random_weight(fmt, 37, 200, torch.Generator().manual_seed(0))
    packed = pack([q], LAYOUTS[layout])
    if fmt.granularity.kind != "t":
        assert torch.equal(unpack(packed)[0].codes, q.codes)
    assert torch.equal(decode_weight(packed), q.dequantize())
    assert torch.equal(dense_rows(packed, 0, 0, 37), q.dequantize())


@pytest.mark.parametrize("bits", range(1, 5))
def test_programs_find_states_in_words(bits: int) -> None:
    """Of columns whose state begins in the word before, and of those whose words hold all of it."""
    fmt = scalar_format(f"tcq{bits}.ch")
    q = random_weight(fmt, 5, 64, torch.Generator().manual_seed(1))
    words = [plane.view(-1, 5).long() & 0xFFFFFFFF for plane in pack([q], LAYOUTS["words"]).planes]
    for column in range(64):
        args, shifts = {"scale": torch.ones(5)}, []
        for i, (width, plane) in enumerate(zip(plane_bits(bits), words, strict=True)):
            word, place = divmod(column, 32 // width)
            args |= {f"w{i}": plane[word], f"p{i}": plane[word - 1] if word else torch.zeros(5, dtype=torch.int64)}
            shifts.append(place * width)
        got = trellis_program(fmt, tuple(shifts)).run(TORCH, args)
        assert torch.equal(got, fmt.element.values(q.codes)[:, column]), column


@pytest.mark.parametrize("text", ["tcq2.g48", "tcq2.g16", "tcq2.g64.fz", "tcq2.g32.e4m3.t32", "tcq2.g64.i8ch"])
def test_what_trellises_do_not_have_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match=r"LB02(34|16)"):
        parse_format(text)


@pytest.mark.parametrize("text", ["tcq2.g64.asym", "tcq5.ch", "tcq0.ch", "tcq.ch"])
def test_what_is_no_trellis_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="LB0210"):
        parse_format(text)


def test_activations_and_tables_are_no_trellises() -> None:
    with pytest.raises(FormatError):
        parse_activation("tcq2.token")
    with pytest.raises(KernelError, match="LB0431"):
        TableSpec(64, 64, "tcq2.ch", str(LAYOUTS["runs16"]))
