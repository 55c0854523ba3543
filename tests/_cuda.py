"""Shared by tests of the CUDA backend: one layer, its kernel's source run on the CPU, and the reference's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowbit.codegen.check import sample_weight
from lowbit.codegen.cuda.any_plan import make_plan
from lowbit.codegen.cuda.emulate import Emulation
from lowbit.codegen.cuda.launch import core_spec
from lowbit.codegen.reference.backend import run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import Compute, KernelSpec, rounded_products
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.quantizers.formats import VectorFormat, parse_activation, parse_format
from lowbit.quantizers.qtensor import PackedWeight

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FRAGMENTS = LAYOUTS["fragments"]


def spec_of(
    fmt: str,
    segments: tuple[int, ...],
    k: int,
    x: str = "bf16",
    out: str = "f32",
    epilogue: tuple[str, ...] = (),
    activation: str = "",
) -> KernelSpec:
    """compute: as a layer chooses it for rounded activations."""
    parsed = parse_format(fmt)
    layout = LAYOUTS["vectors8"] if isinstance(parsed, VectorFormat) else FRAGMENTS
    compute: Compute = "float"
    if activation:
        compute = rounded_products(parsed, k, layout, parse_activation(activation))
    return KernelSpec(segments, k, str(parsed), str(layout), compute, x, out, epilogue, activation)


@dataclass
class Layer:
    """A spec with random weights and whatever its epilogue wants."""

    spec: KernelSpec
    weight: PackedWeight
    rng: torch.Generator
    bias: torch.Tensor | None

    @staticmethod
    def make(spec: KernelSpec, seed: int = 0) -> Layer:
        rng = torch.Generator().manual_seed(seed)
        weight = sample_weight(spec, seed)
        bias = torch.randn(sum(spec.segments), generator=rng) if "bias" in spec.epilogue else None
        return Layer(spec, weight, rng, bias)

    def inputs(self, m: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = torch.randn(m, self.spec.k, generator=self.rng)
        if self.spec.reads_rows:
            x = self.spec.x_rows.write(x, self.weight.tensors.get("input_scale"))
        else:
            x = x.to(DTYPES[self.spec.x_dtype])
        residual = torch.randn(m, self.spec.n_out, generator=self.rng).to(DTYPES[self.spec.out_dtype])
        return x, residual if "residual" in self.spec.epilogue else None

    def error(self, schedule: Schedule, m: int, blocks: int = 3, order: Sequence[int] | None = None) -> float:
        """||emulated - reference|| / ||reference||; NaN when an element was not written."""
        x, residual = self.inputs(m)
        out = torch.full((m, self.spec.n_out), float("nan"), dtype=DTYPES[self.spec.out_dtype])
        emulation = Emulation(make_plan(core_spec(self.spec), schedule))
        emulation.launch(x, self.weight, self.bias, residual, out, blocks, order)
        want = run_reference(self.spec, x, self.weight, self.bias, residual).float()
        return float((out.float() - want).norm() / want.norm())
