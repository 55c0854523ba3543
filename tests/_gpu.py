"""A layer on the GPU beside its float64 result: what the tests of every GPU backend compare with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lowbit.codegen.backend import Launcher
from lowbit.codegen.spec import KernelSpec
from lowbit.quantizers.qtensor import PackedWeight
from lowbit.quantizers.weights import pack_weights, random_weight

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TOLERANCE = {"f32": 2e-5, "bf16": 6e-3, "f16": 1e-3}
INT8_TOLERANCE = 2e-2  # activations are rounded to 8 bits


@dataclass
class Problem:
    """One layer on the GPU with everything an epilogue may want."""

    spec: KernelSpec
    weight: PackedWeight
    dense: torch.Tensor
    bias: torch.Tensor | None

    @staticmethod
    def of(spec: KernelSpec) -> Problem:
        rng = torch.Generator().manual_seed(7)
        parts = [random_weight(spec.weight_format, n, spec.k, rng) for n in spec.segments]
        p = pack_weights(parts, spec.layout_)
        weight = replace(p, tensors={name: t.cuda() for name, t in p.tensors.items()})
        dense = torch.cat([q.dequantize() for q in parts]).double().cuda()
        bias = torch.randn(sum(spec.segments), generator=rng).cuda() if "bias" in spec.epilogue else None
        return Problem(spec, weight, dense, bias)

    def tokens(self, m: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        dtype = DTYPES[self.spec.x_dtype]
        x = torch.randn(m, self.spec.k, device="cuda").to(dtype)
        residual = torch.randn(m, self.spec.n_out, device="cuda").to(dtype)
        return x, residual if "residual" in self.spec.epilogue else None

    def out(self, m: int) -> torch.Tensor:
        return torch.full((m, self.spec.n_out), float("nan"), dtype=DTYPES[self.spec.out_dtype], device="cuda")

    def check(self, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> None:
        want = x.double() @ self.dense.T
        if self.bias is not None:
            want = want + self.bias
        if "silu_mul" in self.spec.epilogue:
            gate, up = want.chunk(2, dim=1)
            want = torch.nn.functional.silu(gate) * up
        if residual is not None:
            want = want + residual
        error = float((out.double() - want).norm() / want.norm())
        limit = TOLERANCE[self.spec.x_dtype] if self.spec.compute == "float" else INT8_TOLERANCE
        assert error <= limit, f"relative error {error:.2e}"

    def run(self, launch: Launcher, m: int) -> None:
        x, residual = self.tokens(m)
        out = self.out(m)
        launch(x, self.weight, self.bias, residual, out)
        self.check(x, residual, out)
