"""Shapes of elementwise operations where torch knows more of one operand than of the other."""

from __future__ import annotations

import pytest
from xdsl.utils.exceptions import VerifyException
from xdsl.utils.test_value import create_ssa_value

from lowbit.compiler.ir.graph import Add
from lowbit.compiler.ir.types import DTYPE_NAMES, tensor

Shape = tuple[int | None, ...]


def _add(a: Shape, b: Shape, out: Shape) -> Add:
    kind = DTYPE_NAMES["float32"]
    return Add([create_ssa_value(tensor(s, kind)) for s in (a, b)], [tensor(out, kind)])


def test_a_dimension_that_one_operand_knows_is_known() -> None:
    _add((None, None, 64), (None, 16, 64), (None, 16, 64)).verify()
    _add((None, None, 64), (None, None, 64), (None, None, 64)).verify()
    _add((None, None, 64), (64,), (None, None, 64)).verify()
    for wrong in ((None, 8, 64), (None, 1, 64), (16, 16, 64), (None, 16)):
        with pytest.raises(VerifyException, match="its type says"):
            _add((None, None, 64), (None, 16, 64), wrong).verify()
    with pytest.raises(VerifyException, match="its type says"):
        _add((None, 64), (1, 64), (1, 64)).verify()
