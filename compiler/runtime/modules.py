"""Drop-in modules: `QuantLinear` for `nn.Linear`, on packed weights held once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

import lowbit.compiler.runtime.ops  # noqa: F401  (defines torch.ops.lowbit.linear)
from lowbit.codegen.spec import Compute, KernelSpec
from lowbit.compiler.errors import FormatError
from lowbit.compiler.runtime.dispatch import device_target
from lowbit.quantizers.formats import WeightFormat, exact_integers
from lowbit.quantizers.qtensor import PackedWeight
from lowbit.quantizers.weights import (
    QWeight,
    from_stored,
    kernel_layout,
    pack_weights,
    stored,
    stored_shapes,
    unpack_weights,
)

__all__ = ["PackedLinear", "QuantLinear", "default_compute"]


def default_compute(fmt: WeightFormat, device: torch.device) -> Compute:
    """How products are formed unless the user says otherwise.

    On CPUs formats of integers, or of integers times a power of two, use 16-bit activations as two int8 digits, which
    is as exact as bfloat16 activations and runs on the byte dot product; elsewhere weights are decoded to floats.
    """
    vector = device.type == "cpu" and device_target(device).arch != "generic"
    return "int16" if vector and exact_integers(fmt) is not None else "float"


class PackedLinear(nn.Module):
    """Packed weights of one or more sibling linear layers, and the kernel call that reads them.

    The packed tensors are the only copy in memory and are never cast when the model's dtype changes.
    """

    def __init__(self, packed: PackedWeight, compute: Compute, epilogue: tuple[str, ...]) -> None:
        super().__init__()
        self._meta = (packed.fmt, packed.layout, packed.segments, packed.k)
        self._names = tuple(packed.tensors)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.compute: Compute = compute
        self._specs: dict[tuple[str, ...], str] = {}
        self.key = self.spec_key(epilogue)

    def spec_key(self, epilogue: tuple[str, ...]) -> str:
        """The kernel spec with this weight and `epilogue`, as text (dtypes are filled in by the dispatcher)."""
        fmt, layout, segments, k = self._meta
        return KernelSpec(segments, k, str(fmt), str(layout), self.compute, epilogue=epilogue).key()

    def packed(self) -> PackedWeight:
        """The weight as a value."""
        fmt, layout, segments, k = self._meta
        return PackedWeight(fmt, layout, segments, k, dict(zip(self._names, self.operands(), strict=True)))

    def operands(self) -> list[torch.Tensor]:
        """The packed tensors, in the order of `KernelSpec.operands`."""
        return [getattr(self, name) for name in self._names]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return cast(torch.Tensor, getattr(self, self._names[0])).device

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[..., K] -> [..., n_out]."""
        out: torch.Tensor = torch.ops.lowbit.linear(x, self.operands(), bias, residual, self.key)
        return out

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        """Move with the model, but keep every dtype: scales are data, not parameters of the model's precision."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self


class QuantLinear(nn.Module):
    """A linear layer with weights stored in `fmt`; the drop-in for `nn.Linear`.

    Built empty (shapes only), it has the tensors of a checkpoint as buffers, see `quantizers.weights.stored`.
    `prepare` turns them into the kernel's layout, after which that is the only copy; `state_dict` still gives the
    checkpoint's tensors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: WeightFormat,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        fmt.check(out_features, in_features, "QuantLinear")
        self.in_features, self.out_features, self.fmt = in_features, out_features, fmt
        self._stored = stored_shapes(fmt, out_features, in_features)
        for name, (kind, shape) in self._stored.items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.inner: PackedLinear | None = None

    @classmethod
    def from_qtensor(
        cls, q: QWeight, bias: torch.Tensor | None = None, *, compute: Compute | None = None
    ) -> QuantLinear:
        """A prepared layer holding `q`."""
        n, k = q.shape
        layer = cls(k, n, q.fmt, bias is not None, device="meta")
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        device = bias.device if bias is not None else torch.device("cpu")
        layer._adopt(pack_weights([q], kernel_layout(q.fmt, device)), compute)
        return layer

    @property
    def prepared(self) -> bool:
        """True once the weights are in the kernel's layout."""
        return self.inner is not None

    def qtensor(self) -> QWeight:
        """The weights in canonical form."""
        if self.inner is not None:
            return unpack_weights(self.inner.packed())[0]
        tensors = {name: cast(torch.Tensor, self._buffers[name]) for name in self._stored}
        return from_stored(self.fmt, self.out_features, self.in_features, tensors)

    def prepare(self, *, compute: Compute | None = None) -> QuantLinear:
        """Pack the checkpoint's tensors for this device's kernels and drop them; does nothing the second time."""
        if self.inner is None:
            device = cast(torch.Tensor, self.weight_shape).device
            if device.type == "meta":
                raise FormatError("LB0224", "the layer has no weights yet", hint="load a state dict first")
            cpu = self.cpu() if device.type != "cpu" else self
            packed = pack_weights([cpu.qtensor()], kernel_layout(self.fmt, device))
            self._adopt(packed, compute, device)
        return self

    def _adopt(self, packed: PackedWeight, compute: Compute | None, device: torch.device | None = None) -> None:
        device = device or next(iter(packed.tensors.values())).device
        epilogue = ("bias",) if self.bias is not None else ()
        self.inner = PackedLinear(packed, compute or default_compute(self.fmt, device), epilogue).to(device)
        for name in self._stored:
            self._buffers.pop(name, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N], in x's dtype."""
        if self.inner is None:
            self.prepare()
        assert self.inner is not None
        return cast(torch.Tensor, self.inner(x, self.bias))

    def canonical(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors by name."""
        if self.inner is None:
            return {name: cast(torch.Tensor, self._buffers[name]) for name in self._stored}
        return stored(self.qtensor())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.inner is not None:
            destination.update({prefix + name: value for name, value in self.canonical().items()})

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.fmt}, bias={self.bias is not None}"
