"""Scalar formats that keep their columns in an order of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.codegen.reference.backend import decode_weight
from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.quantizers.formats import parse_format, scalar_format
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.weights import from_stored, pack_weights, random_weight, stored, unpack_weights

FMT = scalar_format("int4.g48.asym.f32.perm")


def matrix(seed: int = 0) -> QTensor:
    q = random_weight(FMT, 20, 100, torch.Generator().manual_seed(seed))
    assert isinstance(q, QTensor)
    return q


def test_the_matrix_has_its_own_order_and_groups_have_the_stored_one() -> None:
    q = matrix()
    assert q.perm is not None
    plain = replace(q, fmt=replace(q.fmt, ordered=False), perm=None)
    assert torch.equal(q.dequantize()[:, q.perm.long()], plain.dequantize())
    again = plain.in_order(q.perm)
    assert again.fmt == FMT
    assert torch.equal(again.dequantize(), q.dequantize())


def test_text_bits_and_stored_form() -> None:
    assert str(FMT) == "int4.g48.asym.f32.perm"
    assert parse_format(str(FMT)) == FMT
    plain = replace(FMT, ordered=False)
    assert FMT.bits_per_weight(20, 100) == plain.bits_per_weight(20, 100) + 16 / 20
    q = matrix()
    tensors = stored(q)
    assert torch.equal(from_stored(FMT, 20, 100, tensors).dequantize(), q.dequantize())
    with pytest.raises(FormatError, match="LB0227"):
        from_stored(FMT, 20, 100, {**tensors, "weight_perm": torch.zeros(100, dtype=torch.int16)})
    with pytest.raises(FormatError, match="LB0213"):
        FMT.check(4, 2**16 + 1, "here")


@pytest.mark.parametrize("layout", ["panel16", "words"])
def test_packing_keeps_the_order_that_siblings_share(layout: str) -> None:
    q = matrix()
    assert q.perm is not None
    sibling = replace(matrix(1), perm=q.perm)
    packed = pack_weights([q, sibling], LAYOUTS[layout])
    assert torch.equal(decode_weight(packed), torch.cat([q.dequantize(), sibling.dequantize()]))
    for found, given in zip(unpack_weights(packed), (q, sibling), strict=True):
        assert torch.equal(found.dequantize(), given.dequantize())
    with pytest.raises(FormatError, match="LB0223"):
        pack_weights([q, matrix(1)], LAYOUTS[layout])


def test_orders_that_are_none_are_refused() -> None:
    q = matrix()
    for perm in (None, torch.zeros(100, dtype=torch.int32), torch.arange(99, dtype=torch.int32)):
        with pytest.raises(FormatError, match="LB0219"):
            replace(q, perm=perm)
    with pytest.raises(FormatError, match="LB0219"):
        replace(q, fmt=replace(FMT, ordered=False))
