"""Powers of two folded into scales: bit for bit the same numbers, refused where the scales' type would overflow."""

from __future__ import annotations

import torch

from lowbit.codegen.cpp.plan import half_factor
from lowbit.codegen.operand import expand
from lowbit.codegen.scales import fold_scale, place_of
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.quantizers.formats import catalog, scalar_format


def test_folding_changes_no_bit() -> None:
    """float16 kernels: code as float16, times 2**k, times scale; or times one scale that has the power in it."""
    scales = torch.logspace(-4, 1.17, 2000).half()[:, None]
    for text in ("e3m2.ch", "e2m3.ch", "e2m1.ch", "e3m1.ch", "e2m2.ch"):
        fmt = scalar_format(text)
        found = expand(fmt.element, "f16")
        bound = min(14.9, 65504 / 2.0**found.exponent)
        fold = fold_scale(fmt, "f16", "f16", largest=bound)
        assert fold.factor == 2.0**found.exponent
        mine = scales[scales[:, 0] <= bound]
        half = torch.tensor(found.codes).to(torch.int16).view(torch.float16)[None, :]
        twice = (half * torch.tensor(fold.factor).half()) * mine
        assert torch.equal(half * (mine * torch.tensor(fold.factor).half()), twice), text


def test_ranges() -> None:
    e3m2 = scalar_format("e3m2.ch")
    assert fold_scale(e3m2, "f16", "f16", largest=15.9).factor == 4096
    for largest in (16.0, 20.0, 0.0):
        found = fold_scale(e3m2, "f16", "f16", largest)
        assert found.factor == 1
        assert "overflow f16" in found.reason
    assert fold_scale(e3m2, "f16", "f32").factor == 4096
    # bfloat16 is 2**-124 times the value: float32 holds a scale times that up to 16.
    assert fold_scale(e3m2, "bf16", "f32", largest=15.9).factor == 2.0**124
    assert fold_scale(e3m2, "bf16", "f32", largest=16.0).factor == 1
    assert fold_scale(scalar_format("int4.ch"), "f16").factor == 1
    assert fold_scale(scalar_format("e5m2.ch"), "f16").factor == 1


def test_kernels_fold_what_the_pass_says() -> None:
    """The C++ backend's own factor of float products is the pass's."""
    for fmt in catalog():
        spec = KernelSpec((16,), 64, str(fmt), str(LAYOUTS["panel16"]), "float")
        own = half_factor(spec)
        if own is not None:
            assert fold_scale(fmt, "f16").factor == own, fmt


def test_places() -> None:
    assert place_of(scalar_format("e3m2.ch"), 64) == "epilogue"
    assert place_of(scalar_format("e3m2.g64"), 64) == "epilogue"
    assert place_of(scalar_format("nvfp4"), 64) == "loop"
