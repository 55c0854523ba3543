"""Blocks of GGUF say the same numbers as the matrices they are made of, by gguf's own decoder."""

from __future__ import annotations

import pytest
import torch
from _models import random_qtensor

from lowbit.compiler.io.gguf_types import BLOCK_BYTES, block_type, misfit, pack_blocks, suggestion, value_misfit
from lowbit.quantizers.formats import Format, Granularity, LevelElement, WeightFormat, parse_format, scalar_format
from lowbit.quantizers.qtensor import QTensor

gguf = pytest.importorskip("gguf")

TABLE = tuple(float(v) for v in gguf.quants.IQ4_NL.kvalues)
IQ4_NL = Format(LevelElement("iq4nl", TABLE), Granularity("g", 32))
PLAIN = {"int8.g32.sym": "Q8_0", "int4.g32.sym": "Q4_0", "int5.g32.sym": "Q5_0"}
WIDER = {
    "int4.g64.sym": "Q4_0",
    "int4.g128.asym": "Q5_0",
    "int4.ch.sym": "Q4_0",
    "int8.t.sym": "Q8_0",
    "int3.g64.sym": "Q4_0",
    "int3.g32.asym": "Q4_0",
    "int2.ch.asym": "Q4_0",
    "int1.g32.sym": "Q4_0",
    "int1.g32.asym": "Q4_0",
    "int5.g96.asym": "Q8_0",
    "int6.g64.sym": "Q8_0",
    "int7.g32.asym": "Q8_0",
}
SHIFTED = {"int4.g32.fz": "Q4_1", "int5.g32.fz": "Q5_1", "int2.g64.fz": "Q4_1", "int3.ch.fz": "Q4_1"}


def assert_same(q: QTensor, name: str) -> None:
    """Every float32 that gguf finds in the blocks is the one the matrix stands for."""
    assert block_type(q.fmt) == name
    assert misfit(q.fmt, q.shape[1]) is None
    assert value_misfit(q) is None
    kind, blocks = gguf.GGMLQuantizationType[name], pack_blocks(q)
    assert blocks.shape == (q.shape[0], q.shape[1] // 32 * gguf.GGML_QUANT_SIZES[kind][1])
    assert BLOCK_BYTES[name] == gguf.GGML_QUANT_SIZES[kind][1]
    assert torch.equal(torch.from_numpy(gguf.dequantize(blocks.numpy(), kind)), q.dequantize())


def with_minima(fmt: Format, seed: int) -> QTensor:
    """A random matrix whose minima are float16 numbers: scales of few bits, offsets on their grid."""
    q = random_qtensor(fmt, 33, 160, seed)
    scale = (torch.randint(1, 64, q.scale.shape) / 64).half()
    offset = (torch.randint(-256, 256, q.scale.shape) / 64).half() if fmt.offset else None
    return QTensor(fmt, q.codes, scale, q.zero, offset)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("text", [*PLAIN, *WIDER])
def test_integers(text: str, seed: int) -> None:
    assert_same(random_qtensor(text, 33, 160, seed), {**PLAIN, **WIDER}[text])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("text", SHIFTED)
def test_integers_with_a_minimum(text: str, seed: int) -> None:
    assert_same(with_minima(scalar_format(text), seed), SHIFTED[text])


@pytest.mark.parametrize("seed", range(4))
def test_a_table(seed: int) -> None:
    assert_same(random_qtensor(IQ4_NL, 33, 160, seed), "IQ4_NL")


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_small_floats_with_every_exponent() -> None:
    q = random_qtensor("mxfp4", 51, 160)
    scale = torch.arange(255, dtype=torch.uint8).reshape(51, 5).view(torch.float8_e8m0fnu)
    assert_same(QTensor(q.fmt, q.codes, scale), "MXFP4")


def test_every_code_of_every_column() -> None:
    for text, name in PLAIN.items():
        fmt = scalar_format(text)
        codes = (torch.arange(2**fmt.bits)[:, None] + torch.arange(32)).to(torch.uint8) & 2**fmt.bits - 1
        assert_same(QTensor(fmt, codes, torch.full((2**fmt.bits, 1), -0.37).half()), name)


@pytest.mark.parametrize("text", SHIFTED)
def test_minima_that_float16_does_not_hold(text: str) -> None:
    q = random_qtensor(text, 33, 160)
    assert "float16" in str(value_misfit(q))


def test_a_scale_that_is_no_number() -> None:
    q = random_qtensor("mxfp4", 2, 32)
    scale = torch.tensor([[127], [255]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert value_misfit(QTensor(q.fmt, q.codes, scale)) == "a scale is NaN"


@pytest.mark.parametrize(
    ("text", "why", "instead"),
    [
        ("int4.g48.sym", "one scale for 32 columns", "int4.g32.sym"),
        ("int5.g16.asym", "one scale for 32 columns", "int5.g32.sym"),
        ("int4.g32.sym.bf16", "float16, not bf16", "int4.g32.sym"),
        ("int4.g32.sym.perm", "in the order of the columns", "int4.g32.sym"),
        ("int8.g32.asym", "no such numbers", "int8.g32.sym"),
        ("int6.g32.fz", "no such numbers", "int8.g32.sym"),
        ("int1.g32.fz", "no such numbers", "int4.g32.sym"),
        ("nf4.g32", "no such numbers", "int4.g32.sym"),
        ("nvfp4", "one code per weight and one scale", "int4.g32.sym"),
        ("bcq2.g32", "one code per weight", "int4.g32.sym"),
        ("tcq2.g32", "no such numbers", "int4.g32.sym"),
        ("vq.d4.k256", "one code per weight", "int4.g32.sym"),
    ],
)
def test_formats_that_gguf_lacks(text: str, why: str, instead: str) -> None:
    fmt: WeightFormat = parse_format(text)
    assert block_type(fmt) is None
    assert why in str(misfit(fmt, 128))
    assert suggestion(fmt) == instead
    assert block_type(parse_format(instead)) is not None


def test_columns_that_do_not_fill_blocks() -> None:
    assert misfit(scalar_format("int4.g32.sym"), 80) == "its 80 columns are no multiple of 32"
