"""Operands of matrix instructions: derived from two codecs, exact for every code, or refused."""

from __future__ import annotations

import pytest
import torch

from lowbit.codegen.operand import OPERANDS, expand
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.formats import FloatElement, catalog, parse_format

SMALL = [FloatElement(e, m) for e in range(1, 5) for m in range(4) if e + m <= 6]


@pytest.mark.parametrize("element", SMALL, ids=lambda e: e.name)
def test_small_floats_become_e4m3_code_by_code(element: FloatElement) -> None:
    found = expand(element, "e4m3")
    assert found.program is not None
    assert found.exponent == 7 - element.exponent_bias
    wide = FloatElement(4, 3, "fn").levels()
    for code, level in enumerate(element.levels().tolist()):
        assert wide[found.codes[code]] * 2.0**found.exponent == level
    # The two codecs agree from the other side too: encoding the values as e4m3 gives the same codes, -0 included.
    again = FloatElement(4, 3, "fn").encode(element.levels() * 2.0**-found.exponent)
    assert again.tolist() == list(found.codes)


def test_fp6_is_two_moves() -> None:
    e3m2, e2m3 = expand(FloatElement(3, 2), "e4m3"), expand(FloatElement(2, 3), "e4m3")
    assert list(e3m2.codes) == [(c & 0x20) << 2 | (c & 0x1F) << 1 for c in range(64)]
    assert list(e2m3.codes) == [(c & 0x20) << 2 | (c & 0x1F) for c in range(64)]
    assert (e3m2.exponent, e2m3.exponent) == (4, 6)


@pytest.mark.parametrize("operand", ["f16", "bf16"])
def test_wide_floats_hold_what_they_can(operand: str) -> None:
    dtype = OPERANDS[operand][2]  # type: ignore[index]
    for fmt in catalog():
        levels = fmt.element.levels()
        if fmt.element.name == "nf4":
            with pytest.raises(KernelError, match="LB0419"):
                expand(fmt.element, operand)  # type: ignore[arg-type]
            continue
        found = expand(fmt.element, operand)  # type: ignore[arg-type]
        values = torch.tensor(found.codes).to(torch.int16).view(dtype).double() * 2.0**found.exponent
        finite = levels.isfinite()
        assert torch.equal(values[finite], levels[finite].double()), fmt


def test_what_e4m3_does_not_hold_is_refused() -> None:
    for element in (FloatElement(5, 2), FloatElement(4, 3, "none"), FloatElement(2, 4), FloatElement(3, 4)):
        with pytest.raises(KernelError, match="LB0419"):
            expand(element, "e4m3")
    with pytest.raises(KernelError, match="LB0419"):
        expand(parse_format("int8.ch.sym").element, "e4m3")  # type: ignore[union-attr]
    int4 = expand(parse_format("int4.ch.sym").element, "e4m3")  # type: ignore[union-attr]
    assert int4.program is None
    values = torch.tensor(int4.codes).to(torch.uint8).view(torch.float8_e4m3fn).float() * 2.0**int4.exponent
    assert values.tolist() == list(range(-8, 8))
