"""GGUF's blocks as quantized matrices, beside the package gguf's own decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _gguf import random_blocks

from lowbit.compiler.io.gguf_blocks import BLOCK_TYPES, read_blocks
from lowbit.compiler.io.gguf_types import block_type, pack_blocks

gguf = pytest.importorskip("gguf")


def numbers(name: str, raw: torch.Tensor) -> torch.Tensor:
    """What the package makes of blocks."""
    return torch.from_numpy(np.array(gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name])))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_numbers_are_those_of_the_file(name: str) -> None:
    kind, raw = BLOCK_TYPES[name], random_blocks(name, 6, 768)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.columns, kind.nbytes)
    found, want = read_blocks(name, raw), numbers(name, raw)
    assert found.fmt == kind.format
    assert found.shape == (6, 768)
    if kind.exact:
        assert torch.equal(found.dequantize(), want)
    else:
        error = (found.dequantize() - want).norm() / want.norm()
        assert 0 < error < 2.0**-11


@pytest.mark.parametrize("name", [name for name, kind in BLOCK_TYPES.items() if kind.exact and kind.columns == 32])
def test_blocks_come_back_bit_by_bit(name: str) -> None:
    raw = random_blocks(name, 4, 96)
    found = read_blocks(name, raw)
    assert block_type(found.fmt) == name
    assert torch.equal(pack_blocks(found), raw)


@pytest.mark.parametrize("name", ["Q3_K", "Q6_K", "IQ4_XS"])
def test_negative_scales(name: str) -> None:
    """Scales of these types have signs of their own, which the codes must not take over."""
    found = read_blocks(name, random_blocks(name, 2, 512))
    assert bool((found.scale < 0).any())
    assert bool((found.scale > 0).any())


@pytest.mark.parametrize(
    ("name", "at", "value", "why"),
    [
        ("Q4_0", 0, float("inf"), "outside the range of float16"),
        ("Q6_K", 208, 3e4, "outside the range of float16"),
        ("Q4_0", 0, float("nan"), "NaN"),
    ],
)
def test_numbers_that_are_none(name: str, at: int, value: float, why: str) -> None:
    raw = random_blocks(name, 2, 256)
    raw[1, at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(ValueError, match=why):
        read_blocks(name, raw)


def test_the_smallest_scales_are_exact() -> None:
    """Products of whole numbers and float16's smallest one are float16 numbers again."""
    raw = random_blocks("Q4_K", 2, 256)
    raw[:, 0:2] = raw[:, 2:4] = torch.tensor([2.0**-24], dtype=torch.float16).view(torch.uint8)
    assert torch.equal(read_blocks("Q4_K", raw).dequantize(), numbers("Q4_K", raw))


def test_rows_that_are_no_blocks() -> None:
    with pytest.raises(ValueError, match="no blocks of 18"):
        read_blocks("Q4_0", random_blocks("Q4_0", 2, 64)[:, :-1])


def test_a_ternary_code_that_stands_for_nothing() -> None:
    raw = random_blocks("TQ2_0", 2, 256)
    raw[0, 5] = 0xFF
    with pytest.raises(ValueError, match="neither 0, 1 nor 2"):
        read_blocks("TQ2_0", raw)


def test_powers_of_two_that_are_none() -> None:
    raw = random_blocks("MXFP4", 2, 64)
    raw[0, 0] = 255
    with pytest.raises(ValueError, match="NaN"):
        read_blocks("MXFP4", raw)
