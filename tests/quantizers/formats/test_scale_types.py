"""8-bit scales: powers of two by the MX rule, e4m3 with a float32 per tensor, and all they go through."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.codegen.reference.backend import decode_weight
from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import ALIASES, parse_format, scalar_format
from lowbit.quantizers.methods import Gptq, Rtn
from lowbit.quantizers.qtensor import QTensor, pack, unpack
from lowbit.quantizers.scales import power_of_two, stored_scale
from lowbit.quantizers.tunable import tunable
from lowbit.quantizers.weights import from_stored, random_weight, stored, stored_shapes

TEXTS = [*ALIASES, "int4.g16.asym.e4m3.t32", "e3m2.g48.e8m0", "int8.g32.sym.e8m0", "e2m1.ch.e4m3", "e2m1.t.e4m3.t32"]
PLAIN = Rtn(clip_search=False, signed_scale=False)
ELEMENTS = {
    "mxfp4": (ml_dtypes.float4_e2m1fn, 2, 6.0),
    "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, 2, 7.5),
    "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, 4, 28.0),
    "mxfp8_e4m3": (ml_dtypes.float8_e4m3fn, 8, 448.0),
    "mxfp8_e5m2": (ml_dtypes.float8_e5m2, 15, 57344.0),
}


def weights(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Rounded to bfloat16, so that quotients by powers of two meet ties."""
    rng = torch.Generator().manual_seed(seed)
    size = torch.exp(2 * torch.randn(n, 1, generator=rng))
    return (torch.randn(n, k, generator=rng) * size).bfloat16().float()


@pytest.mark.parametrize("name", ELEMENTS)
def test_plain_rounding_is_what_mx_specifies(name: str) -> None:
    dtype, emax, largest = ELEMENTS[name]
    weight = weights(64, 96)
    weight[0, :32] = torch.tensor([2.0, -1.0]).repeat(16)  # the largest is a power of two
    weight[1, :32] = 0.0
    got = PLAIN.quantize(weight, parse_format(name), None).qtensor
    groups = weight.reshape(64, 3, 32).numpy()
    amax = np.abs(groups).max(-1, keepdims=True)
    scale = np.where(amax > 0, 2.0 ** (np.floor(np.log2(np.where(amax > 0, amax, 1))) - emax), 1.0).astype(np.float32)
    values = np.clip(groups / scale, -largest, largest).astype(dtype).astype(np.float32) * scale
    assert isinstance(got, QTensor)
    assert torch.equal(got.scale.float(), torch.from_numpy(scale[..., 0]))
    assert torch.equal(got.dequantize(), torch.from_numpy(values.reshape(64, 96)))


def test_plain_rounding_is_what_nvfp4_specifies() -> None:
    weight = weights(32, 64, 1)
    got = PLAIN.quantize(weight, parse_format("nvfp4"), None).qtensor
    groups = weight.reshape(32, 4, 16)
    assert isinstance(got, QTensor)
    assert got.tensor_scale is not None
    whole = got.tensor_scale[0]
    assert torch.allclose(whole, weight.abs().max() / (6 * 448), rtol=3e-7), "off by what a reciprocal rounds"
    scale = (groups.abs().amax(-1) / 6 / whole).clamp(2.0**-9, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    full = torch.from_numpy(scale.astype(np.float32)) * whole
    codes = (groups / full[..., None]).clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert torch.equal(got.scale.float(), torch.from_numpy(scale.astype(np.float32)))
    same = got.dequantize() == (torch.from_numpy(codes) * full[..., None]).reshape(32, 64)
    assert int((~same).sum()) <= 2, "a product with the inverse may fall on the other side of a tie"


@pytest.mark.parametrize("layout", ["panel16", "words"])
@pytest.mark.parametrize("text", TEXTS)
def test_packing_and_storage_are_exact(text: str, layout: str, tmp_path: Path) -> None:
    fmt = scalar_format(text)
    parts = [random_weight(fmt, n, 75, torch.Generator().manual_seed(n)) for n in (17, 5)]
    parts = [q for q in parts if isinstance(q, QTensor)]
    packed = pack(parts, LAYOUTS[layout])
    assert packed.scale.dtype in ((torch.float16, torch.float32) if layout == "words" else (fmt.scale_dtype,))
    assert torch.equal(decode_weight(packed), torch.cat([q.dequantize() for q in parts]))
    for q, back in zip(parts, unpack(packed), strict=True):
        save_file(stored(back), tmp_path / "x.safetensors")
        tensors = load_file(tmp_path / "x.safetensors")
        shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        assert shapes == stored_shapes(fmt, *q.shape)
        again = from_stored(fmt, *q.shape, tensors)
        assert torch.equal(again.dequantize(), q.dequantize())
        assert torch.equal(back.scale.view(torch.uint8), q.scale.view(torch.uint8))
        held = 8 * sum(t.nbytes for name, t in tensors.items() if name != "weight_shape")
        assert held >= q.bits_per_weight * q.codes.numel() - 1e-6


@pytest.mark.parametrize("text", TEXTS)
def test_searched_scales_are_stored_exactly_and_never_worse(text: str) -> None:
    fmt, weight = parse_format(text), weights(16, 96, 2)
    searched = Rtn().quantize(weight, fmt, None)
    plain = PLAIN.quantize(weight, fmt, None)
    squares = [float((r.qtensor.dequantize() - weight).square().sum()) for r in (searched, plain)]
    assert squares[0] <= squares[1] * 1.0001
    assert bool(searched.qtensor.dequantize().isfinite().all())


def test_rounding_of_scales() -> None:
    element = scalar_format("mxfp4").element
    amax = torch.tensor([4.0, 7.99, 8.0, 1.0, 0.0, 1e-44, 3e38])
    assert power_of_two(amax, element).tolist() == [1.0, 1.0, 2.0, 0.25, 2.0**-126, 2.0**-126, 2.0**125]
    fmt = scalar_format("mxfp4")
    values = torch.exp2(torch.arange(-126.0, 127.0))
    assert torch.equal(stored_scale(values, fmt), values)
    assert bool((stored_scale(torch.tensor([0.0, -1.5, 1e-45]), fmt) > 0).all())
    narrow = scalar_format("int4.ch.sym.e4m3")
    assert stored_scale(torch.tensor([0.0, 1e-6, -1e-6, 1000.0]), narrow).tolist() == [0, 2.0**-9, -(2.0**-9), 448]


@pytest.mark.parametrize("text", ["nvfp4", "mxfp4", "e3m2.g32.e4m3.t32"])
@pytest.mark.parametrize("static", [True, False])
def test_gptq_beats_rounding(text: str, static: bool) -> None:
    rng = torch.Generator().manual_seed(3)
    x = (torch.randn(400, 64, generator=rng) @ (torch.randn(64, 64, generator=rng) / 8 + torch.eye(64))).double()
    stats = LayerStats(x.T @ x / 400, 400)
    found = Gptq(static_groups=static, act_order=static).quantize(weights(24, 64), parse_format(text), stats)
    assert found.proxy_error < 0.95 * found.rtn_error


def test_second_scales_survive_tuning_and_mismatches_are_refused() -> None:
    q = PLAIN.quantize(weights(8, 32), parse_format("nvfp4"), None).qtensor
    held = tunable(q)
    assert torch.allclose(held.weight(), q.dequantize())
    assert torch.equal(held.result().dequantize(), q.dequantize())
    assert isinstance(q, QTensor)
    with pytest.raises(FormatError, match="LB0228"):
        QTensor(q.fmt, q.codes, q.scale)
    for text in ("e2m1.g16.t32", "e2m1.g16.e8m0.t32", "e2m1.g16.fz.e8m0", "int4.g16.fz.e4m3", "vq.d4.k256.e8m0"):
        with pytest.raises(FormatError, match="LB021"):
            parse_format(text)


def test_short_names_stand_for_formats() -> None:
    assert {name: str(parse_format(name)) for name in ALIASES} == ALIASES
    assert parse_format("nvfp4").bits_per_weight(64, 64) == 4.5 + 32 / 4096
    assert parse_format("mxfp6_e3m2").bits_per_weight(64, 64) == 6.25
