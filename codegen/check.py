"""Comparing a kernel with the reference on random data: before it is used, and before it is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lowbit.codegen.backend import Launcher
from lowbit.codegen.reference.backend import decode_stored, prepare_activations, run_reference
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import Format, scalar_format
from lowbit.quantizers.qtensor import PackedWeight, QTensor
from lowbit.quantizers.weights import QWeight, pack_weights, random_weight

__all__ = [
    "TOLERANCE",
    "Oracle",
    "Sample",
    "check_kernel",
    "dense_on_device",
    "device_of",
    "random_words",
    "sample_weight",
]

TOLERANCE = {"float": 2e-5, "int16": 2e-4, "int8": 2e-2}
"""Largest allowed root-mean-square error relative to the reference's, by how products are formed (float32 output)."""

_OUT_EPS = {"f32": 0.0, "bf16": 2**-8, "f16": 2**-11}
_TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_PLAIN_OPERANDS = {"scale", "zero", "offset"}


def device_of(target: Target) -> str:
    """The torch device that kernels of a target run on."""
    return "cuda" if target.kind == "cuda" else "cpu"


def sample_weight(spec: KernelSpec, seed: int = 0) -> PackedWeight:
    """Random codes in the spec's format and layout, for checks and measurements."""
    rng = torch.Generator().manual_seed(seed)
    parts: list[QWeight] = []
    for n in spec.segments:
        parts.append(random_weight(spec.weight_format, n, spec.k, rng))
        if isinstance(parts[0], QTensor) and parts[0].perm is not None:
            parts[-1] = replace(parts[-1], perm=parts[0].perm)  # siblings share the order of their input
    weight = pack_weights(parts, spec.layout_)
    if spec.norm_eps:
        weight = replace(weight, tensors={**weight.tensors, "norm_weight": 0.5 + torch.rand(spec.k, generator=rng)})
    sides = (("input_scale", spec.rounding, spec.k, 2.0), ("output_scale", spec.out_rounding, spec.n_out, spec.k**0.5))
    for name, rounding, columns, size in sides:
        if rounding is not None and rounding.static:
            scales = (1 + torch.rand(rounding.groups(columns), generator=rng)) * size / rounding.tops(columns)
            weight = replace(weight, tensors={**weight.tensors, name: scales})
    return weight


def random_words(spec: KernelSpec, device: str, seed: int = 0) -> PackedWeight | None:
    """As `sample_weight`, made on a GPU in no time: any words are valid codes where nothing is padded. None where that
    does not hold."""
    fmt, layout = spec.weight_format, spec.layout_
    if not isinstance(fmt, Format) or layout.container != 32 or len(spec.segments) != 1 or not _unpadded(spec, fmt):
        return None
    rng, n, k = torch.Generator(device=device).manual_seed(seed), spec.segments[0], spec.k
    parts = {
        f"plane{i}": torch.randint(
            -(2**31), 2**31 - 1, (k * bits // 32 * n,), generator=rng, device=device, dtype=torch.int32
        )
        for i, bits in enumerate(layout.widths(fmt.bits))
    }
    groups, tile = fmt.granularity.groups(k), layout.row_tile
    side = (groups, n) if tile == 1 else (n // tile, groups, tile)
    parts["scale"] = (torch.rand(side, generator=rng, device=device) * 0.02 + 0.001).to(fmt.scale_dtype)
    if fmt.zero:
        parts["zero"] = torch.randint(0, 2**fmt.bits, side, generator=rng, device=device, dtype=torch.uint8)
    if fmt.offset:
        parts["offset"] = (torch.randn(side, generator=rng, device=device) * 0.02).to(fmt.scale_dtype)
    return PackedWeight(fmt, layout, (n,), k, parts)


def _unpadded(spec: KernelSpec, fmt: Format) -> bool:
    size = fmt.granularity.group_size(spec.k)
    plain = {name for name in spec.operands if not name.startswith("plane")} <= _PLAIN_OPERANDS and spec.terms == 1
    whole = spec.k % min(size, spec.k) == 0 and min(size, spec.k) % 32 == 0 and spec.segments[0] == spec.rows
    halves = fmt.scale_dtype in (torch.float16, torch.float32)
    return plain and whole and halves and spec.blocks * 32 == spec.k and bool(fmt.element.levels().isfinite().all())


def dense_on_device(weight: PackedWeight) -> torch.Tensor:
    """float32 [N, K] of plain scalar formats on the weight's device, by the layout's own inverse."""
    n, k, fmt, layout = weight.n, weight.k, scalar_format(str(weight.fmt)), weight.layout
    values = fmt.element.values(layout.unpack(list(weight.planes), fmt.bits, n, k))
    size = fmt.granularity.group_size(k)

    def spread(side: torch.Tensor) -> torch.Tensor:
        return layout.unpack_side(side).float().repeat_interleave(size, dim=1)[:, :k]

    if weight.zero is not None:
        values -= spread(weight.zero)
    values *= spread(weight.scale)
    if weight.offset is not None:
        values += spread(weight.offset)
    return values


@dataclass(frozen=True)
class Sample:
    """A random weight of one kernel on its device, and the matrix it stands for: the costly half of an `Oracle`."""

    spec: KernelSpec
    target: Target
    seed: int = 0

    @cached_property
    def weight(self) -> PackedWeight:
        """The packed weight."""
        device = device_of(self.target)
        made = random_words(self.spec, device, self.seed) if device == "cuda" else None
        if made is not None:
            return made
        host = sample_weight(self.spec, self.seed)
        return replace(host, tensors={name: t.to(device) for name, t in host.tensors.items()})

    @cached_property
    def dense(self) -> torch.Tensor:
        """float32 [sum(segments), K], in the stored order of columns."""
        device = device_of(self.target)
        if device == "cuda" and random_words(self.spec, device, self.seed) is not None:
            return dense_on_device(self.weight)
        return decode_stored(self.weight).to(device)


@dataclass(frozen=True)
class Oracle:
    """Random operands of one kernel for `m` tokens, and what the reference makes of them."""

    sample: Sample
    m: int = 3
    seed: int = 1

    @cached_property
    def operands(self) -> tuple[torch.Tensor, PackedWeight, torch.Tensor | None, torch.Tensor | None]:
        """x, weight, bias and residual on the device: what a launcher takes before the output."""
        spec, device = self.sample.spec, device_of(self.sample.target)
        rng = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.m, spec.k, generator=rng)
        if spec.reads_rows:
            held = self.sample.weight.tensors.get("input_scale")
            x = spec.x_rows.write(x, None if held is None else held.cpu()).to(device)
        else:
            x = x.to(_TORCH_DTYPES[spec.x_dtype]).to(device)
        bias = torch.randn(sum(spec.segments), generator=rng).to(device) if "bias" in spec.epilogue else None
        if "residual" not in spec.epilogue:
            return x, self.sample.weight, bias, None
        residual = torch.randn(self.m, spec.n_out, generator=rng).to(_TORCH_DTYPES[spec.out_dtype])
        return x, self.sample.weight, bias, residual.to(device)

    @cached_property
    def want(self) -> torch.Tensor:
        """float32 [m, n_out]: the reference's output, as a kernel writes it where that is rounded."""
        spec = self.sample.spec
        if spec.out_rows:
            return self._numbers(run_reference(spec, *self.operands, dense=self.sample.dense))
        return run_reference(replace(spec, out_dtype="f32"), *self.operands, dense=self.sample.dense)

    def _numbers(self, out: torch.Tensor) -> torch.Tensor:
        """float32 [m, n_out]: what an output stands for."""
        rows = self.sample.spec.out_rows
        return rows.numbers(out, self.sample.weight.tensors.get("output_scale")) if rows else out.float()

    @cached_property
    def size(self) -> float:
        """Root mean square of the outputs or, where that is larger, of the dot products themselves: a fair yardstick
        where terms cancel."""
        x, weight, _, _ = self.operands
        size = float(self.want.square().mean().sqrt())
        if "silu_mul" not in self.sample.spec.epilogue:
            products = prepare_activations(self.sample.spec, x, weight) @ self.sample.dense.T
            size = max(size, float(products.square().mean().sqrt()))
        return max(size, 1e-30)

    @property
    def limit(self) -> float:
        """The largest error that is allowed."""
        spec = self.sample.spec
        rounded = "float" if spec.activation else spec.compute  # rounding that is meant is no error
        half = 1e-2 if _OUT_EPS.get(spec.x_dtype) and self.sample.target.kind == "cuda" else 0
        # The least difference between two kernels' numbers may be that between two levels, now and then.
        steps = 2 / spec.out_rounding.top if spec.out_rounding else 0.0
        return TOLERANCE[rounded] + _OUT_EPS[spec.out_dtype] + half + steps

    def output(self) -> torch.Tensor:
        """A poisoned output: elements that are not written are found out."""
        spec, device = self.sample.spec, device_of(self.sample.target)
        if spec.out_rows:
            return torch.full((self.m, spec.out_width), 0xFF, dtype=torch.uint8, device=device)
        return torch.full((self.m, spec.n_out), float("nan"), dtype=_TORCH_DTYPES[spec.out_dtype], device=device)

    def check(self, launch: Launcher) -> float:
        """Relative root-mean-square error of a kernel; raises KernelError (LB0408) beyond tolerance."""
        out = self.output()
        launch(*self.operands, out)
        error = float((self._numbers(out) - self.want).square().mean().sqrt()) / self.size
        if not error <= self.limit:
            text = f"kernel disagrees with the reference: relative error {error:.2g} > {self.limit:.2g}"
            raise KernelError("LB0408", text)
        return error


def check_kernel(spec: KernelSpec, launch: Launcher, target: Target, m: int = 3) -> float:
    """Relative root-mean-square error of the kernel on random data; raises KernelError (LB0408) beyond tolerance."""
    return Oracle(Sample(spec, target), m).check(launch)
