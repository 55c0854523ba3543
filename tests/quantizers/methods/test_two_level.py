"""Scales of two levels: whole numbers by group, float16 by row."""

from __future__ import annotations

import pytest
import torch

from lowbit.codegen.reference.backend import decode_weight
from lowbit.compiler.errors import FormatError, RunError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import parse_format, scalar_format
from lowbit.quantizers.methods import make_method
from lowbit.quantizers.methods.two_level import BYTE_LIMIT, round_two_levels
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.weights import from_stored, pack_weights, stored, unpack_weights


@pytest.mark.parametrize("text", ["int4.g64.asym.i8ch", "int4.g48.sym.i8ch", "int3.g32.asym.i8ch", "int8.g64.sym.i8ch"])
def test_levels_are_bytes_and_close(text: str) -> None:
    fmt = scalar_format(text)
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1, :40], weight[2] = 0.0, 7.0, weight[2].abs() + 1
    q = round_two_levels(weight, fmt)
    assert q.channel_scale is not None
    levels = (q.dequantize() / q.channel_scale.float()).double()
    assert torch.equal(levels, levels.round())
    assert levels.min() >= -128
    assert levels.max() <= 127
    # Half a step of the row, half of the group, half of a moved zero, and what a rounded scale cuts off at the ends.
    size = fmt.granularity.group_size(160)
    scale = q.scale.float().repeat_interleave(size, 1)[:, :160]
    limit = q.channel_scale.float() * (0.51 + 1.51 * scale + (2**fmt.bits - 1) / 2)
    assert ((q.dequantize() - weight).abs() <= limit + 1e-6).all()
    assert not q.dequantize()[0].any()


def test_four_weights_come_of_one_multiplication() -> None:
    """QServe's reason for whole group scales: code * scale - zero * scale + 128 never leaves its byte, so that words of
    four codes can be multiplied at once."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    q = round_two_levels(weight, scalar_format("int4.g64.asym.i8ch"))
    assert q.zero is not None
    assert q.channel_scale is not None
    scale, zero = (side.to(torch.int64).repeat_interleave(64, 1) for side in (q.scale, q.zero))
    biased = q.codes.to(torch.int64) * scale - zero * scale + 128
    assert biased.min() >= 0
    assert biased.max() < 256
    assert torch.equal((biased - 128) * q.channel_scale.float(), q.dequantize())
    assert (biased - 128).abs().max() <= BYTE_LIMIT + 8


def test_stored_and_packed_forms_are_exact() -> None:
    fmt = scalar_format("int4.g48.asym.i8ch")
    assert str(fmt) == "int4.g48.asym.i8ch"
    assert fmt.bits_per_weight(64, 96) == 4 + 12 * 2 / 96 + 16 / 96
    q = round_two_levels(torch.randn(20, 100), fmt)
    again = from_stored(fmt, 20, 100, stored(q))
    for name in ("panel16", "words"):
        packed = pack_weights([q, again], LAYOUTS[name])
        assert torch.equal(decode_weight(packed), torch.cat([q.dequantize()] * 2))
        for found in unpack_weights(packed):
            assert torch.equal(found.scale, q.scale)
            assert torch.equal(found.channel_scale, q.channel_scale)


@pytest.mark.parametrize("text", ["int4.g32.asym.i8ch", "int2.g48.sym.i8ch"])
def test_gptq_chooses_codes_under_scales_of_two_levels(text: str) -> None:
    rng = torch.Generator().manual_seed(3)
    weight, fmt = torch.randn(24, 100, generator=rng), scalar_format(text)
    x = torch.randn(400, 100, generator=rng) @ torch.randn(100, 100, generator=rng)
    stats = LayerStats(x.T @ x / 400, 400)
    found = make_method("gptq", {}).quantize(weight, fmt, stats)
    q = found.qtensor
    assert isinstance(q, QTensor)
    assert q.channel_scale is not None
    levels = q.dequantize() / q.channel_scale.float()
    assert torch.equal(levels, levels.round())
    assert levels.min() >= -128
    assert levels.max() <= 127
    assert found.proxy_error < 0.7 * found.rtn_error


def test_methods_and_formats_that_cannot() -> None:
    weight, fmt = torch.randn(16, 64), parse_format("int4.g32.asym.i8ch")
    assert make_method("rtn", {}).quantize(weight, fmt, None).proxy_error < 0.02
    for method, options in (("decoupleq", {}), ("gptq", {"act_order": False, "static_groups": False})):
        with pytest.raises(RunError, match="LB0515"):
            make_method(method, options).quantize(weight, fmt, None)
    for bad in ("int4.ch.asym.i8ch", "int4.g32.fz.i8ch", "e2m1.g32.i8ch"):
        with pytest.raises(FormatError, match="LB0216"):
            parse_format(bad)
