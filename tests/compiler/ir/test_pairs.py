"""The pair layout: rotations and masks leave every code as the right 16-bit float, at every place in the words."""

from __future__ import annotations

import pytest
import torch

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.pairs import HALF_FORMATS, PairLayout
from lowbit.quantizers.formats import FloatElement

FLOATS = [(e, m) for e in range(1, 6) for m in range(5) if e + m in (4, 5)]
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("target", HALF_FORMATS)
@pytest.mark.parametrize(("exponent", "mantissa"), FLOATS)
def test_every_code_at_every_place(exponent: int, mantissa: int, target: str) -> None:
    levels = FloatElement(exponent, mantissa).levels()
    layout = PairLayout.derive(exponent, mantissa, target)
    if exponent == 5 and target == "f16":
        levels = levels[: 2**layout.bits]  # the top exponent is a number here and infinity in float16
    for first in range(2**layout.bits):
        codes = [(first + 5 * i) % 2**layout.bits for i in range(layout.group)]
        top, low = layout.pack(codes)
        words = [layout.read(top, low, p) for p in range(layout.group // 2)]
        halves = torch.tensor([w >> s & 0xFFFF for w in words for s in (0, 16)])
        got = halves.to(torch.int32).to(torch.int16).view(DTYPES[target]).double() * 2.0**layout.exponent
        want = levels[codes].double()
        usable = got.isfinite() if exponent == 5 and target == "f16" else torch.ones(len(got), dtype=torch.bool)
        assert torch.equal(got[usable], want[usable])


def test_constants_of_fp6() -> None:
    fp6 = {("f16", 3, 2): (0x90009000, 0x0F000F00, 12), ("bf16", 3, 2): (0x82008200, 0x01E001E0, 124)}
    fp6 |= {("f16", 2, 3): (0x88008800, 0x07800780, 14)}
    for (target, e, m), want in fp6.items():
        layout = PairLayout.derive(e, m, target)
        assert (layout.top, layout.low, layout.exponent) == want
        assert layout.group == 16


def test_other_widths_are_refused() -> None:
    for e, m, target in ((2, 1, "f16"), (4, 3, "f16"), (6, 0, "f16")):
        with pytest.raises(FormatError, match="LB0207"):
            PairLayout.derive(e, m, target)
