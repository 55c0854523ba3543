"""Modules that run several quantized layers as one kernel: siblings on one input, and gate/up with silu-mul.

They take the place of ordinary submodules, so that a model's own `forward` stays as it is and its state dict keeps
the names and tensors of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from lowbit.codegen.rounded import ROUNDED
from lowbit.codegen.select import kernel_layout
from lowbit.compiler.runtime.dispatch import DTYPE_NAMES, device_target, parse_spec
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear, load_matrix, with_input_scale
from lowbit.compiler.runtime.ops import run_packed, unwatched
from lowbit.quantizers.hadamard import rotate
from lowbit.quantizers.weights import pack_weights, stored, unpack_weights

__all__ = ["QuantGatedMLP", "SiblingLinear", "fuse_gated_mlp", "fuse_siblings"]


def _stack(layers: list[QuantLinear], epilogue: tuple[str, ...]) -> PackedLinear:
    """The layers' weights, stacked by rows, on the device of the first."""
    inner = cast(PackedLinear, layers[0].prepare().inner)
    layout = kernel_layout(layers[0].fmt, device_target(inner.device), inner.activation)
    packed = pack_weights([layer.qtensor() for layer in layers], layout)
    packed = with_input_scale(packed, inner.activation, layers[0].static_scale)
    stacked = PackedLinear(packed, inner.compute, epilogue, inner.activation, inner.rotate).to(inner.device)
    if inner.invariant:
        stacked.make_invariant()
    return stacked


def _watched(layer: QuantLinear) -> bool:
    """Whether forward hooks wait for the layer's own call, which a fused kernel would not make."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _share_inputs(layers: list[QuantLinear]) -> bool:
    """True when the layers do the same to their input: rotate, order and round it, by the same static scales, and
    nobody watches one of them."""
    if any(map(_watched, layers)):
        return False
    first = cast(PackedLinear, layers[0].prepare().inner)
    others = [cast(PackedLinear, layer.prepare().inner) for layer in layers[1:]]
    return all(
        (o.activation, o.rotate, o.compute) == (first.activation, first.rotate, first.compute)
        and all(_equal(o._buffers.get(name), first._buffers.get(name)) for name in ("columns", "input_scale"))
        for o in others
    )


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _stored(packed: PackedLinear, index: int, prefix: str) -> dict[str, torch.Tensor]:
    q, scale = unpack_weights(packed.packed())[index], packed._buffers.get("input_scale")
    tensors = stored(q) if scale is None else {**stored(q), "input_scale": scale}
    return {f"{prefix}{name}": value for name, value in tensors.items()}


class _Siblings:
    """Results of the last call, waiting for the siblings that have not asked yet."""

    def __init__(self, packed: PackedLinear, widths: list[int]) -> None:
        self.packed, self.widths = packed, widths
        self.pending: tuple[torch.Tensor, dict[int, torch.Tensor]] | None = None

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of sibling `index` for `x`; computes all of them the first time `x` is seen."""
        held = self.pending
        if held is None or held[0] is not x or index not in held[1]:
            held = (x, dict(enumerate(self.packed(x).split(self.widths, dim=-1))))
        out = held[1].pop(index)
        self.pending = held if held[1] else None
        return out


class SiblingLinear(nn.Module):
    """One of several linear layers that read the same input and run as one kernel (q, k, v).

    The first to be called with an input computes all; the others pick their part up. Siblings are recognised by the
    identity of the input tensor, so a call out of order only costs time.
    """

    def __init__(self, shared: _Siblings, index: int, in_features: int) -> None:
        super().__init__()
        self._shared, self._index = shared, index
        if index == 0:
            self.packed = shared.packed
        self.in_features, self.out_features = in_features, shared.widths[index]

    @property
    def shared(self) -> PackedLinear:
        """The weights of all siblings."""
        return self._shared.packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        return self._shared.take(self._index, x)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(_stored(self._shared.packed, self._index, prefix))

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        load_matrix(self._shared.packed, self._index, state, prefix, missing, unexpected)


@dataclass(frozen=True)
class _Between:
    """Keys of two kernels, of which the first rounds for the second, by the type of activations; and the keys of the
    kernels in whose place they are."""

    replaced: tuple[str, str]
    keys: dict[torch.dtype, tuple[str, str]]

    @staticmethod
    def of(write: str, read: str) -> _Between:
        first, second = parse_spec(write), parse_spec(read)
        first = replace(first, out_activation=second.activation)
        keys = {
            dtype: (first.key(), replace(second, x_dtype=ROUNDED, out_dtype=name).key())
            for dtype, name in DTYPE_NAMES.items()
        }
        return _Between((write, read), keys)

    def holds(self, first: PackedLinear, reader: QuantLinear, x: torch.Tensor) -> bool:
        """Whether a call can do it so: layers are what they were, nobody watches or differentiates, and numbers are of
        16 bits or are rounded themselves."""
        same = reader.inner is not None and (first.key, reader.inner.key) == self.replaced
        short = x.dtype != torch.float32 or bool(first.activation)
        return same and short and not _watched(reader) and not (x.requires_grad and torch.is_grad_enabled())


def _call(
    x: torch.Tensor, layer: PackedLinear, bias: torch.Tensor | None, key: str, reader: PackedLinear | None = None
) -> torch.Tensor:
    """The layer's weights in the kernel of `key`; with the static scales, where there are, of the one that reads it."""
    scale = reader._buffers.get("input_scale") if reader is not None else None
    extra = {} if scale is None else {"output_scale": scale}
    if not torch.compiler.is_compiling() and unwatched(x):
        packed = layer.packed()
        return run_packed(x, replace(packed, tensors={**packed.tensors, **extra}), bias, None, key)
    found: torch.Tensor = torch.ops.lowbit.linear(x, [*layer.operands(), *extra.values()], bias, None, key)
    return found


class QuantGatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) with gate and up as one kernel whose epilogue is silu-mul."""

    def __init__(self, gate: QuantLinear, up: QuantLinear, down: nn.Module, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.gate_up, self._names = _stack([gate, up], ("silu_mul",)), names
        self.add_module(names[2], down)
        self._between: _Between | None = None

    @property
    def reader(self) -> nn.Module:
        """The layer that reads the product; a child module under the name it has in the model, such as `down_proj`."""
        return cast(nn.Module, self._modules[self._names[2]])

    def round_between(self) -> bool:
        """From now on the kernel of gate and up rounds what the reader multiplies; False where the reader is no layer
        that rounds its input and does no more to it. Raises KernelError (LB0422, LB0423) where no kernel can."""
        down = self.reader
        inner = cast(PackedLinear, down.prepare().inner) if isinstance(down, QuantLinear) else None
        if inner is None or not inner.activation or inner.rotate:
            return False
        self._between = _Between.of(self.gate_up.key, inner.key)
        return True

    def row_keys(self, dtype: torch.dtype) -> tuple[str, ...]:
        """Specs of the two kernels between which numbers are rounded, for activations of `dtype`; none where they are
        not."""
        return self._between.keys.get(dtype, ()) if self._between is not None else ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., K]."""
        down, between = getattr(self, self._names[2]), self._between
        if between is None or not between.holds(self.gate_up, down, x):
            return cast(torch.Tensor, down(self.gate_up(x)))
        write, read = between.keys[x.dtype]
        gate_up, inner = self.gate_up, down.inner
        rows = _call(rotate(x, gate_up.rotate) if gate_up.rotates_first else x, gate_up, None, write, inner)
        return _call(rows, inner, down.bias, read)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for index, name in enumerate(self._names[:2]):
            destination.update(_stored(self.gate_up, index, f"{prefix}{name}."))

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        for index, name in enumerate(self._names[:2]):
            load_matrix(self.gate_up, index, state, f"{prefix}{name}.", missing, unexpected)


def fuse_siblings(model: nn.Module, paths: tuple[str, ...]) -> bool:
    """Replace the layers at `paths` by siblings of one kernel; False when they are not plain quantized layers, or treat
    their input differently."""
    layers = [model.get_submodule(p) for p in paths]
    if not all(isinstance(m, QuantLinear) and m.bias is None for m in layers):
        return False
    linears = cast("list[QuantLinear]", layers)
    if not _share_inputs(linears):
        return False
    shared = _Siblings(_stack(linears, ()), [m.out_features for m in linears])
    for i, path in enumerate(paths):
        _replace(model, path, SiblingLinear(shared, i, linears[i].in_features))
    return True


def fuse_gated_mlp(model: nn.Module, gate: str, up: str) -> bool:
    """Replace the parent of `gate` and `up` by a QuantGatedMLP.

    False unless the parent consists of exactly two quantized layers without bias, one more linear layer that reads
    their product, and an activation: then its forward can only be the gated MLP the graph showed.
    """
    parent_path, _, gate_name = gate.rpartition(".")
    parent = model.get_submodule(parent_path)
    up_name = up.rpartition(".")[2]
    children = dict(parent.named_children())
    g, u = children.pop(gate_name, None), children.pop(up_name, None)
    downs = [n for n, m in children.items() if isinstance(m, (QuantLinear, nn.Linear))]
    plain = isinstance(g, QuantLinear) and isinstance(u, QuantLinear) and g.bias is None and u.bias is None
    if not plain or len(downs) != 1 or not up.startswith(f"{parent_path}."):
        return False
    if not _share_inputs([g, u]):  # type: ignore[list-item]
        return False
    down = children.pop(downs[0])
    if any(list(m.parameters()) for m in children.values()) or getattr(down, "in_features", 0) != g.out_features:  # type: ignore[union-attr]
        return False
    _replace(model, parent_path, QuantGatedMLP(g, u, down, (gate_name, up_name, downs[0])))  # type: ignore[arg-type]
    return True


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent_path, _, name = path.rpartition(".")
    new.train(model.training)
    setattr(model.get_submodule(parent_path), name, new)
