"""Every code of every format: the decode program, the level table and `dequantize` say the same number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.codegen.decode import decode_program, extract_program
from lowbit.codegen.reference.backend import decode_weight
from lowbit.codegen.reference.torch_ops import TORCH
from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import LAYOUTS, plane_bits
from lowbit.quantizers.bitstream import pack_bits, unpack_bits
from lowbit.quantizers.formats import Format, catalog, scalar_format
from lowbit.quantizers.qtensor import QTensor, pack, unpack

FORMATS = [str(f) for f in catalog()]
GRANULARITIES = ["t", "ch", "g32", "g48", "g7", "g64"]


def random_qtensor(fmt: Format, n: int, k: int, seed: int = 0) -> QTensor:
    rng = torch.Generator().manual_seed(seed)
    side = fmt.side_shape(n, k)
    finite = fmt.element.levels().isfinite().nonzero().flatten().to(torch.uint8)
    codes = finite[torch.randint(0, len(finite), (n, k), generator=rng)]
    scale = (torch.rand(side, generator=rng) + 0.01).to(fmt.scale_dtype)
    zero = torch.randint(0, 2**fmt.bits, side, generator=rng).to(torch.uint8) if fmt.zero else None
    offset = torch.randn(side, generator=rng).to(fmt.scale_dtype) if fmt.offset else None
    return QTensor(fmt, codes, scale, zero, offset)


@pytest.mark.parametrize("text", FORMATS)
def test_text_form_round_trips(text: str) -> None:
    assert str(scalar_format(text)) == text


@pytest.mark.parametrize(
    "text", ["int9", "int0.ch", "int4.g0.sym", "int4.q64", "fp4", "", "int4.g64.sym.f64", "int4..sym"]
)
def test_bad_formats_are_refused_with_advice(text: str) -> None:
    with pytest.raises(FormatError, match="LB021"):
        scalar_format(text)


@pytest.mark.parametrize("text", FORMATS)
def test_program_of_the_element_gives_its_levels(text: str) -> None:
    element = scalar_format(text).element
    codes = torch.arange(2**element.bits)
    got, want = element.decode().run(TORCH, {"code": codes}), element.levels()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()], want[~want.isnan()])
    if element.integer:
        assert torch.equal(element.levels(), codes.float() - element.bias)


@pytest.mark.parametrize("bits", range(1, 9))
def test_extract_reassembles_every_code(bits: int) -> None:
    codes, args, low = torch.arange(2**bits), {}, 0
    for i, width in enumerate(plane_bits(bits)):
        args[f"w{i}"] = ((codes >> low) & (2**width - 1)) << 3
        args[f"s{i}"] = torch.tensor(3)
        low += width
    assert torch.equal(extract_program(*plane_bits(bits)).run(TORCH, args), codes)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("layout", ["panel16", "whole16", "signs16", "words"])
def test_packed_decode_equals_dequantize(text: str, granularity: str, layout: str) -> None:
    fmt = scalar_format(text.replace(".ch", f".{granularity}", 1))
    q = random_qtensor(fmt, 17, 75)
    packed = pack([q, q], LAYOUTS[layout])
    assert torch.equal(decode_weight(packed), torch.cat([q.dequantize()] * 2))
    for back in unpack(packed):
        assert torch.equal(back.codes, q.codes)
        assert torch.equal(back.scale, q.scale)
        assert (back.zero is None) == (q.zero is None)
        assert back.zero is None or torch.equal(back.zero, q.zero)
        assert (back.offset is None) == (q.offset is None)
        assert back.offset is None or torch.equal(back.offset, q.offset)


@pytest.mark.parametrize("scale", ["f16", "bf16", "f32"])
def test_scale_types_are_kept_exactly(scale: str) -> None:
    fmt = scalar_format(f"int4.g32.asym.{scale}")
    q = random_qtensor(fmt, 16, 64)
    back = unpack(pack([q], LAYOUTS["panel16"]))[0]
    assert back.scale.dtype == fmt.scale_dtype
    assert torch.equal(back.scale, q.scale)


@given(bits=st.integers(1, 32), rows=st.integers(1, 5), cols=st.integers(1, 80), seed=st.integers(0, 2**31))
def test_bit_stream_round_trips(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, cols), generator=torch.Generator().manual_seed(seed))
    codes = codes.to(torch.uint8) if bits <= 8 else codes
    words = pack_bits(codes, bits)
    assert words.shape == (rows, -(-cols * bits // 32))
    assert torch.equal(unpack_bits(words, bits, cols), codes)


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    assert scalar_format("int4.g64.sym").bits_per_weight(64, 128) == 4 + 16 / 64
    assert scalar_format("int3.g64.asym").bits_per_weight(64, 128) == 3 + 19 / 64
    assert scalar_format("int4.g128.sym").bits_per_weight(1, 576) == 4 + 5 * 16 / 576  # ragged last group
    assert scalar_format("int8.t.sym.f32").bits_per_weight(10, 10) == 8 + 32 / 100


def test_qtensor_refuses_side_values_that_do_not_fit() -> None:
    fmt = scalar_format("int4.g32.sym")
    with pytest.raises(FormatError, match="LB0220"):
        QTensor(fmt, torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(4, 3, dtype=torch.float16))
    with pytest.raises(FormatError, match="LB0221"):
        QTensor(
            fmt,
            torch.zeros(4, 64, dtype=torch.uint8),
            torch.zeros(4, 2, dtype=torch.float16),
            torch.zeros(4, 2, dtype=torch.uint8),
        )


def test_decode_program_is_one_per_format() -> None:
    fmt = scalar_format("int3.g64.asym")
    assert decode_program(fmt) is decode_program(scalar_format("int3.g64.asym"))
    assert decode_program(fmt).args == ("w0", "s0", "w1", "s1", "scale", "zero")
