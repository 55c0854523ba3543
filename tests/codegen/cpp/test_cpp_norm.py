"""Kernels that normalise their input: against torch, whatever the products, the order of columns and the rest of the
prologue; and the spec through the kernel dialect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _cpp import Job, build, spec_of

from lowbit.codegen.check import sample_weight
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.reference.backend import decode_weight
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import host_target
from lowbit.passes import lower_kernels

EPS = 1e-5
SPECS = [
    (spec_of("int4.g32.sym", "int16", (32, 16), 100, norm_eps=EPS, epilogue=("residual",)), 2e-4),
    (spec_of("int3.g64.asym.perm", "float", (32,), 80, norm_eps=EPS, x_dtype="bf16"), 1e-5),
    (spec_of("int8.ch.sym", "int8", (16,), 64, norm_eps=EPS, rotate=16, activation="int8.token"), 2e-2),
]


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_rows_are_normalised_before_everything_else() -> None:
    kernels = build([Job(spec, host_target().arch, 2) for spec, _ in SPECS])
    for (spec, tolerance), run in zip(SPECS, kernels, strict=True):
        rng, weight = torch.Generator().manual_seed(0), sample_weight(spec)
        x = (torch.randn(2, spec.k, generator=rng) * torch.tensor([[0.01], [30.0]])).to(
            torch.bfloat16 if spec.x_dtype == "bf16" else torch.float32
        )
        residual = torch.randn(2, spec.n_out, generator=rng) if spec.epilogue else None
        out = torch.empty(2, spec.n_out)
        run(x, weight, None, residual, out)
        normed = torch.nn.functional.rms_norm(x.float(), (spec.k,), weight.tensors["norm_weight"], EPS)
        if spec.rotate:
            from lowbit.quantizers.hadamard import rotate

            normed = rotate(normed, spec.rotate)
        want = normed @ decode_weight(weight).T
        error = (out - want - (0 if residual is None else residual)).norm() / want.norm()
        assert float(error) < tolerance, spec.format


def test_the_norm_is_part_of_the_kernel_in_the_ir() -> None:
    spec, plain = SPECS[0][0], replace(SPECS[0][0], norm_eps=0.0)
    kernel = lower_kernels.kernel_op("k", replace(spec, x_dtype="f32"))
    assert lower_kernels.spec_of(kernel) == spec
    assert "lbk.rms_norm" in str(kernel)
    assert "norm" not in plain.key()
    assert spec.operands == (*plain.operands, "norm_weight")
    with pytest.raises(KernelError, match="LB0401"):
        KernelSpec((32,), 64, "vq.d4.k256", "vectors8", "float", norm_eps=EPS)
